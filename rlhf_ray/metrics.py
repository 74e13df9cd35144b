"""What a run leaves behind in numbers: ``metrics.jsonl``, ``samples.jsonl``, ``quarantine.jsonl``, TensorBoard events
and ``summary.json``.

Metrics are values that roles return; the pipeline alone logs them, here. One JSON object per step, flushed at once, so
that a run that is killed keeps every step it took. JSON has no NaN: a value that is not finite is written as null.
What a full disk does not take is reported, kept, and written before the next row.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

log = logging.getLogger("rlhf_ray.metrics")

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
"""The prompts that a PPO run has left out, each with the cause; there is none where it has left out none."""
SUMMARY_FILE = "summary.json"
STATUS_FILE = "status.json"
"""How a PPO run stands at this moment; of use while ``summary.json`` says "running"."""
TENSORBOARD_FOLDER = "tensorboard"


class MetricsWriter:
    """Writes one line of metrics and a few samples per step into a run's folder.

    A new run appends to what is there. A resumed one passes ``resume_step``, the last step whose effect it kept: the
    lines of later steps, which it takes again, and a line torn by the crash are dropped first, so that each step stands
    there once. Of the prompts in quarantine it keeps those that are in ``quarantined``: the others are tried again.
    """

    def __init__(
        self, run_dir: Path, *, resume_step: int | None = None, quarantined: Collection[int] = frozenset()
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard_dir = run_dir / TENSORBOARD_FOLDER
        self._purge_step = None if resume_step is None else resume_step + 1
        if resume_step is not None:
            for name in (METRICS_FILE, SAMPLES_FILE):
                _keep(run_dir / name, lambda row: row.get("step", 0) <= resume_step)
            _keep(run_dir / QUARANTINE_FILE, lambda row: row.get("prompt_id") in quarantined)
        self._metrics = _Lines(run_dir / METRICS_FILE)
        self._metrics.open()
        self._samples = _Lines(run_dir / SAMPLES_FILE)
        self._quarantine = _Lines(run_dir / QUARANTINE_FILE)
        self._events: Any = None

    def write(self, metrics: Mapping[str, float], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """Log one step. ``metrics`` holds the step's number under ``step``; each sample's line gets it too."""
        step = int(metrics["step"])
        self._metrics.write(metrics)
        for sample in samples:
            self._samples.write({"step": step, **sample})
        try:
            events = self._tensorboard()
            for name, value in metrics.items():
                if name != "step" and math.isfinite(value):
                    events.add_scalar(f"{name.partition('_')[0]}/{name}", value, step)
            events.flush()
        except OSError as error:
            self._events, self._purge_step = None, step + 1  # its thread has ended: the next step gets another
            log.error("TensorBoard will lack step %d: %s", step, error)

    def quarantine(self, row: Mapping[str, Any]) -> None:
        """Name a prompt that the run leaves out; it is on disk at once, for the run may end with the same prompt."""
        self._quarantine.write(row)

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        for lines in (self._metrics, self._samples, self._quarantine):
            lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._events is None:
            # The import costs a second or two: only a run that takes a step pays for it.
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._tensorboard_dir), purge_step=self._purge_step)
        return self._events


class _Lines:
    """Appends rows to a JSONL file, which it makes with the first one, each on its way to the disk at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._kept = b""
        """What the disk has not taken yet; it may begin within a row."""

    def open(self) -> None:
        """Make the file."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        self._kept += _line(row).encode()
        try:
            self._write_kept()
        except OSError as error:
            log.error("a row of %s is kept and written with the next one: %s", self._path, error)

    def close(self) -> None:
        """Try the last time; close."""
        try:
            self._write_kept()
        except OSError as error:
            log.error("%s lacks its last rows: %s", self._path, error)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_kept(self) -> None:
        while self._kept:
            self.open()
            assert self._file is not None
            self._kept = self._kept[self._file.write(self._kept) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file in order; [] when there is no file. A line torn by a crash is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    # Not splitlines(): a model's text may hold U+2028, which it takes for an end of line and JSON does not.
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        row = _parsed(line)
        if row is not None:
            rows.append(row)
    return rows


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What ``summary.json`` holds; {} when no stage has written one."""
    return read_json(run_dir / SUMMARY_FILE)


def write_summary(run_dir: Path, updates: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``updates`` into ``summary.json`` and return the whole. Readers see the old file or the new one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    summary = {**read_summary(run_dir), **_finite(updates)}
    write_json(run_dir / SUMMARY_FILE, summary)
    return summary


@contextmanager
def status_kept(run_dir: Path) -> Iterator[None]:
    """``summary.json`` says "running" from here on, and how the block ended if it did not end well."""
    (run_dir / STATUS_FILE).unlink(missing_ok=True)  # an earlier run's
    write_summary(run_dir, {"status": "running", "cause": None})
    try:
        yield
    except KeyboardInterrupt:
        _note_end(run_dir, {"status": "interrupted"})
        raise
    except Exception as error:
        _note_end(run_dir, {"status": "failed", "cause": f"{type(error).__name__}: {error}"})
        raise


def _note_end(run_dir: Path, updates: Mapping[str, Any]) -> None:
    """A disk that does not take it must not hide the cause."""
    try:
        write_summary(run_dir, updates)
    except OSError as error:
        log.error("%s still says that the run goes on: %s", run_dir / SUMMARY_FILE, error)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file that ``write_json`` wrote; {} when there is none."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file through a temporary name, so that it is never seen in part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(_finite(value), out, indent=2, ensure_ascii=False, allow_nan=False)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with null in place of every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines of a JSONL file, if there is one."""
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if wanted(row)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as out:
        out.writelines(_line(row) for row in kept)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)

"""What a run leaves behind in numbers: ``metrics.jsonl``, ``samples.jsonl``, ``quarantine.jsonl``, TensorBoard events
and ``summary.json``.

Metrics are values that roles return; the pipeline alone logs them, here. One JSON object per step, flushed at once, so
that a run that is killed keeps every step it took. JSON has no NaN: a value that is not finite is written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

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
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._samples_path = run_dir / SAMPLES_FILE
        self._samples: TextIO | None = None
        self._quarantine_path = run_dir / QUARANTINE_FILE
        self._events: Any = None

    def write(self, metrics: Mapping[str, float], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """Log one step. ``metrics`` holds the step's number under ``step``; each sample's line gets it too."""
        step = int(metrics["step"])
        _write_line(self._metrics, metrics)
        for sample in samples:
            if self._samples is None:  # a run without samples leaves no file for them
                self._samples = self._samples_path.open("a", encoding="utf-8")
            _write_line(self._samples, {"step": step, **sample})
        events = self._tensorboard()
        for name, value in metrics.items():
            if name != "step" and math.isfinite(value):
                events.add_scalar(f"{name.partition('_')[0]}/{name}", value, step)
        events.flush()

    def quarantine(self, row: Mapping[str, Any]) -> None:
        """Name a prompt that the run leaves out; it is on disk at once, for the run may end with the same prompt."""
        with self._quarantine_path.open("a", encoding="utf-8") as out:
            _write_line(out, row)

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        self._metrics.close()
        if self._samples is not None:
            self._samples.close()
            self._samples = None
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
        write_summary(run_dir, {"status": "interrupted"})
        raise
    except Exception as error:
        write_summary(run_dir, {"status": "failed", "cause": f"{type(error).__name__}: {error}"})
        raise


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


def _write_line(out: TextIO, row: Mapping[str, Any]) -> None:
    out.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
    out.flush()


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
        for row in kept:
            _write_line(out, row)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)

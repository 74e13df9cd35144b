"""What reward, SFT and DPO have in common as stages: where checkpoints go, what may be resumed from them, and for the
two that train a policy how it gets its place."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_ray.checkpoint import latest_checkpoint, marked_checkpoints, replaced_folder, set_aside_after
from rlhf_ray.config import RunConfig, TrainerConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.metrics import METRICS_FILE, MetricsWriter, read_lines, status_kept
from rlhf_ray.roles.trainer_checkpoints import IDENTITY_FILE

log = logging.getLogger("rlhf_ray.train")

OnProgress = Callable[[Mapping[str, float]], None]

_CHECKPOINTS = {"ppo": "checkpoints", "sft": "sft.checkpoints", "dpo": "dpo.checkpoints"}
"""Of those that train a policy, in the run's folder."""

_MAY_CHANGE = {"data", "holdout", "on_bad_row", "min_accuracy", "max_length", "save_steps"} | {
    "num_workers",
    "num_cpus",
    "num_gpus",
    "threads",
}
"""Of the section: what a resumed run may have otherwise. The rows themselves are compared."""


def checkpoints_folder(config: RunConfig, section: TrainerConfig) -> Path:
    """Where a training under way keeps its checkpoints."""
    return config.run_dir / f"{section.section}.checkpoints"


def identity(config: RunConfig, section: TrainerConfig, rows: Sequence[Any], *, noun: str = "pairs") -> dict[str, Any]:
    """What a resumed training must share with the one it goes on from.

    Args:
        rows: what is trained on, as dataclasses.
        noun: what messages call them.
    """
    digest = hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()
    return {
        "seed": config.seed,
        "model.path": config.model.path,
        **{
            f"{section.section}.{key}": value
            for key, value in section.model_dump(mode="json", exclude=_MAY_CHANGE).items()
        },
        f"training {noun}": digest[:12],
    }


def check_start(checkpoints: Path, identity: Mapping[str, Any], *, resume: bool) -> int | None:
    """Checkpoints are there only if they are to be resumed from, and they are of this very training.

    Returns:
        The step that it goes on from: 0 where it was cut short before its first checkpoint. None: it is a new one.

    Raises:
        InputError: which it is not.
    """
    if not resume:
        if marked_checkpoints(checkpoints):
            raise ConfigError(
                f"{checkpoints} holds checkpoints of an earlier training; resume it, choose another name, or remove "
                "that folder"
            )
        return None
    newest = latest_checkpoint(checkpoints)
    if newest is None:
        if damaged := len(marked_checkpoints(checkpoints)):
            raise ConfigError(
                f"--resume: there is no whole checkpoint in {checkpoints}, and the {damaged} that are marked complete "
                "are damaged; start afresh with --overwrite"
            )
        log.warning("--resume: there is no checkpoint in %s yet; beginning at the first step", checkpoints)
        return 0
    then = json.loads((newest / IDENTITY_FILE).read_text(encoding="utf-8"))
    if changed := [key for key, value in identity.items() if then.get(key) != value]:
        was = ", ".join(f"{key} = {then.get(key)}" for key in changed)
        raise ConfigError(f"--resume: {newest} was written with {was}; give the same, or start afresh with --overwrite")
    set_aside_after(newest)
    return int(newest.name.rpartition("-")[2])


def refuse_policy(config: RunConfig) -> None:
    """A run has one policy.

    Raises:
        ConfigError: it is there already.
    """
    if (folder := config.run_dir / "policy").exists():
        raise ConfigError(f"{folder} already holds a policy; remove it, or choose another name or output_dir")


def refuse_anothers(run_dir: Path, stage: str) -> None:
    """A training of the policy that is resumed where it has no checkpoint yet takes the place of its own try alone.

    Args:
        stage: "ppo", "sft" or "dpo".

    Raises:
        ConfigError: another one has left checkpoints or metrics.
    """
    if marked_checkpoints(run_dir / _CHECKPOINTS[stage]):
        return
    trainers = {name for name, folder in _CHECKPOINTS.items() if marked_checkpoints(run_dir / folder)}
    trainers |= {_trainer_of(row) for row in read_lines(run_dir / METRICS_FILE)}
    if others := trainers - {stage}:
        raise ConfigError(
            f"--resume: {run_dir} holds what {' and '.join(sorted(others))} has left, and no checkpoint of {stage}; "
            "choose another name, or delete it with --overwrite"
        )


def _trainer_of(row: Mapping[str, Any]) -> str:
    """Whose row of metrics it is."""
    return next((name for name in ("sft", "dpo") if f"{name}_loss" in row), "ppo")


@contextmanager
def policy_training(
    config: RunConfig, section: TrainerConfig, *, start: int | None, on_progress: OnProgress | None
) -> Iterator[tuple[Path, OnProgress]]:
    """An empty folder that becomes ``policy`` when the block ends without an error, and what is to hear of progress.

    Progress is handed on, and written to ``metrics.jsonl`` as SECTION_loss and so on. What else stands beside that
    folder is thrown away, and in the end the checkpoints are.

    Args:
        start: what ``check_start`` gave.
        on_progress: hears the role's ``Progress``.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f".{section.section}-", dir=config.run_dir))
    folder = scratch / "policy"
    folder.mkdir()
    try:
        with status_kept(config.run_dir):
            with MetricsWriter(config.run_dir, resume_step=start) as writer:
                yield folder, _recorder(section, writer, on_progress)
            with replaced_folder(config.run_dir / "policy") as whole:
                folder.replace(whole)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(checkpoints_folder(config, section), ignore_errors=True)


def _recorder(section: TrainerConfig, writer: MetricsWriter, on_progress: OnProgress | None) -> OnProgress:
    def hear(seen: Mapping[str, float]) -> None:
        if "step" not in seen:
            log.info("the reference has read %d of %d pairs", seen["pairs_read"], seen["pairs"])
            return
        named = {f"{section.section}_{key}": seen[key] for key in ("loss", "accuracy", "per_second")}
        writer.write({"step": seen["step"], **named})
        if on_progress is not None:
            on_progress(seen)

    return hear

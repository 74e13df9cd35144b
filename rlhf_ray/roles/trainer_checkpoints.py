"""Checkpoints of a training by TRL's trainers, and the weights that did best so far.

    reward.checkpoints/step-000500/    model.safetensors (or LoRA's), optimizer.pt, scheduler.pt, rng_state*.pth,
                                       trainer_state.json, identity.json, best.safetensors, COMPLETE

The trainer of transformers writes and reads them; here they are moved into place, and marked once they are whole. It
reads the ``.pt`` and ``.pth`` files with ``weights_only``, so reading a checkpoint never runs code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from rlhf_ray.checkpoint import mark_complete, prune

IDENTITY_FILE = "identity.json"
"""In a checkpoint: what a resumed run must share with the one that wrote it."""

BEST_FILE = "best.safetensors"

_PICKLED_ARGUMENTS = "training_args.bin"
"""The one file that only a pickle could read. Nobody does."""


class KeepCheckpoints(TrainerCallback):
    """Writes a checkpoint every so many steps, and keeps the newest whole one."""

    def __init__(self, root: Path, identity: Mapping[str, Any], *, every: int, best: Path | None = None) -> None:
        """
        Args:
            every: optimiser steps; 0: never.
            best: what ``KeepBest`` writes, where it is used.
        """
        self._root = root
        self._identity = identity
        self._every = every
        self._best = best

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._every and state.global_step % self._every == 0 and state.global_step < state.max_steps:
            control.should_save = control.should_log = True  # the mean loss of a resumed run is made of what was logged

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every worker has written its random state
        if not state.is_world_process_zero:
            return
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        (written / IDENTITY_FILE).write_text(json.dumps(self._identity, indent=2) + "\n", encoding="utf-8")
        if self._best is not None and self._best.is_file():
            shutil.copyfile(self._best, written / BEST_FILE)
        self._root.mkdir(exist_ok=True)
        folder = self._root / f"step-{state.global_step:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        written.rename(folder)
        mark_complete(folder)
        prune(self._root, 1)


class KeepBest(TrainerCallback):
    """Keeps the weights with the lowest validation loss, and ends training when it has long been no lower."""

    def __init__(self, path: Path, *, patience: int) -> None:
        """
        Args:
            path: of the weights.
            patience: looks in a row without a lower loss after which it ends.
        """
        self._path = path
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        losses = validation_losses(state.log_history)
        best = min(losses, key=lambda step: losses[step])
        if best == state.global_step:
            if state.is_world_process_zero:
                save_file({name: p.detach().contiguous() for name, p in _trained(model).items()}, self._path)
        elif sum(step > best for step in losses) >= self._patience:
            control.should_training_stop = True

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Put the weights that did best into ``model``."""
        best = load_file(self._path)
        for name, parameter in _trained(model).items():
            parameter.copy_(best[name])


def validation_losses(log_history: list[dict[str, Any]]) -> dict[int, float]:
    """Step → loss on the validation pairs; those before a resume are among them."""
    return {row["step"]: row["eval_loss"] for row in log_history if "eval_loss" in row}


def _trained(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

"""The checkpoints of a PPO run, written while it trains.

begin   the learner's ranks copy what they hold ─► training goes on
        │  a thread of each rank writes learner/, an actor scored/, the driver pipeline/
end     all of it is on disk ─► COMPLETE ─► older ones are removed
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.actors.scored_prompts import ScoredPromptsWriter
from rlhf_ray.checkpoint import mark_complete, prune, save_checkpoint
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.interfaces import Learner
from rlhf_ray.types import ScoredPrompt


class RunCheckpoints:
    """Writes ``step-N`` folders one at a time; satisfies ``interfaces.Checkpoints``."""

    def __init__(self, root: Path, learner: Learner, *, identity: Mapping[str, Any], keep: int) -> None:
        """
        Args:
            root: folder of all checkpoints.
            identity: what a resumed run must share with this one.
            keep: newest checkpoints kept.
        """
        self._root = root
        self._learner = learner
        self._identity = dict(identity)
        self._keep = keep
        self._writer = ScoredPromptsWriter()
        self._folder: Path | None = None
        self._own_part: asyncio.Task[None] | None = None

    async def begin(self, step: int, state: Mapping[str, Any], scored: Sequence[ScoredPrompt]) -> None:
        """See ``interfaces.Checkpoints``."""
        folder = self._root / f"step-{step:06d}"
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # what a killed run has left
        self._folder = folder
        self._own_part = asyncio.create_task(self._write_own_part(folder, state, scored))
        await self._learner.save(folder / "learner")

    async def end(self, *, wait: bool) -> bool:
        """See ``interfaces.Checkpoints``.

        Raises:
            ConfigError: the learner has another disk than this process.
        """
        if self._folder is None or self._own_part is None:
            return True
        try:
            if not wait and not (self._own_part.done() and await self._learner.written(wait=False)):
                return False
            await self._own_part
            await self._learner.written(wait=True)
            await asyncio.to_thread(self._mark, self._folder)
        except CheckpointError:
            self._own_part.cancel()
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = self._own_part = None
            raise
        self._folder = self._own_part = None
        return True

    async def close(self) -> None:
        """Stop writing what nobody will mark."""
        if self._own_part is not None:
            self._own_part.cancel()
            await asyncio.gather(self._own_part, return_exceptions=True)
        self._writer.close()

    async def _write_own_part(self, folder: Path, state: Mapping[str, Any], scored: Sequence[ScoredPrompt]) -> None:
        await self._writer.save(folder / "scored", scored)
        state = {**state, "identity": self._identity}
        await asyncio.to_thread(save_checkpoint, folder / "pipeline", tensors={}, state=state)

    def _mark(self, folder: Path) -> None:
        if not (folder / "learner").is_dir() or not (folder / "scored").is_dir():
            raise ConfigError(
                f"parts of the checkpoint were written on other nodes and are not in {folder}: "
                "set output_dir to a folder that all nodes share"
            )
        mark_complete(folder / "learner")
        mark_complete(folder)
        prune(self._root, self._keep)

"""The learner as Ray actors, one for each rank. Policies leave the first as return values, which outlive the actor in
the object store.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.actors.pulse import PulsingWorker
from rlhf_ray.actors.weights import pack_weights
from rlhf_ray.cluster import start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import LearnerDiedError, RlhfRayError, WorkerDiedError
from rlhf_ray.types import Experience, ExperienceRefs, Probe, Ref, StepReport, VersionedWeights

if TYPE_CHECKING:
    from rlhf_ray.roles.learner_state import LearnerCopy

P = ParamSpec("P")
T = TypeVar("T")

CAUSE_SECONDS = 5.0
"""How long the other ranks are heard after one of them has failed: theirs may be the cause."""

WRITING_NICENESS = 10
"""Of the thread that writes checkpoints: it gets a tenth of a core that others want, and all of one that is idle."""

CONCURRENT_CALLS = 8
"""Of one rank: its work, and questions about what it writes."""


class LearnerWorker(PulsingWorker):
    """Runs one rank's ``PPOLearner`` in a thread of its own, so that the actor keeps answering. What all ranks return
    alike, only the first one returns.
    """

    def __init__(self, learner_options: Mapping[str, Any], generator_dtype: str, rank: int, size: int) -> None:
        super().__init__()
        self._options = dict(learner_options)
        self._dtype = getattr(torch, generator_dtype)
        self._rank = rank
        self._size = size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_yield_the_cores)
        self._writing: Future[None] | None = None

    async def open_store(self) -> tuple[str, int]:
        """Where the other ranks find this one: address and port."""
        address = ray.util.get_node_ip_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._store.port

    async def ready(self, store: tuple[str, int] | None) -> None:
        """Joins the other ranks and loads the model. Not in the constructor: an error there would reach the driver as a
        mere death.

        Args:
            store: what ``open_store`` of the first one gave; None for one that is alone.
        """
        await self._work("loading", self._load_model, store)

    async def train_step(self, scores: Sequence[float], kl_coef: float, *opened: Any) -> StepReport | None:
        """``opened``: the batch's rollouts, then reference log-probabilities or None for each (Ray resolves refs)."""
        rollouts, ref_logprobs = opened[: len(scores)], opened[len(scores) :]
        batch = [
            Experience(rollout=rollout, score=score, ref_logprobs=ref)
            for rollout, score, ref in zip(rollouts, scores, ref_logprobs, strict=True)
        ]
        report = await self._work("training", lambda: self._learner.train_step(batch, kl_coef=kl_coef))
        return report if self._rank == 0 else None

    async def publish(self) -> tuple[tuple[int, Probe], dict[str, Any]]:
        """((version, probe), packed weights); no weights on other ranks than the first."""

        def publish() -> tuple[tuple[int, Probe], dict[str, Any]]:
            return (self._learner.version, self._learner.probe()), pack_weights(self._learner.weights(self._dtype))

        return await self._work("publishing", publish)

    async def save(self, folder: str) -> None:
        """Copies; a thread writes while the next steps are taken."""
        if self._writing is not None:  # one that another rank's failure has ended may still be under way here
            await asyncio.gather(asyncio.wrap_future(self._writing), return_exceptions=True)
        copy = await self._work("copying for a checkpoint", self._learner.copy)
        self._writing = self._writer.submit(self._write, copy, Path(folder))

    async def written(self, wait: bool) -> bool:
        assert self._writing is not None
        if not wait and not self._writing.done():
            return False
        await asyncio.wrap_future(self._writing)
        return True

    async def load(self, folder: str) -> int:
        return await self._work("loading a checkpoint", self._learner.load, Path(folder))

    async def export(self, folder: str) -> None:
        await self._work("exporting", self._learner.export, Path(folder))

    async def _work(self, phase: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In the learner's thread, as everything that touches the learner."""

        def run() -> T:
            with self._working(phase):
                return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _write(self, copy: LearnerCopy, folder: Path) -> None:
        with self._working("writing a checkpoint", bounded=True):
            copy.write(folder)

    def _load_model(self, store: tuple[str, int] | None) -> None:
        from rlhf_ray.roles.learner import PPOLearner
        from rlhf_ray.roles.ranks import Ranks

        if store is not None:
            reached = self._store if self._rank == 0 else TCPStore(*store, is_master=False)
            device = torch.device(self._options["device"])
            self._options["ranks"] = Ranks.joined(reached, rank=self._rank, size=self._size, device=device)
        self._learner = PPOLearner(**self._options, on_forward=self._advance)


def _yield_the_cores() -> None:
    """What this thread does can wait for training, where both want the same cores."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITING_NICENESS)


class LearnerRank(ActorClient):
    """Client of one rank's actor."""

    def call(self, method: str, *args: Any) -> Coroutine[Any, Any, Any]:
        """What the method returns. Raises what ``answer`` does."""
        return self.answer(getattr(self._actor, method).remote(*args))

    def publish(self) -> tuple[Coroutine[Any, Any, Any], Ref]:
        """The first part of what ``LearnerWorker.publish`` returns, and a ref of the second."""
        head, weights = self._actor.publish.options(num_returns=2).remote()
        return self.answer(head), weights


class RayLearner:
    """Client of the ranks' actors; satisfies ``interfaces.Learner``."""

    def __init__(self, ranks: Sequence[LearnerRank]) -> None:
        self._ranks = list(ranks)

    @classmethod
    def start(cls, config: RunConfig, model_folder: str, critic_folder: str | None = None) -> RayLearner:
        """Start the actors; ``ready_refs`` tells when they are up. Every precision of ``config`` must be resolved.

        Args:
            critic_folder: as of ``PPOLearner``.
        """
        section = config.learner
        device = config.device_of(section.num_gpus)
        options = {
            "config": config,
            "model_folder": model_folder,
            "critic_folder": critic_folder,
            "device": device,
            "precision": section.precision,
        }

        def rank(number: int) -> LearnerRank:
            actor = start_actor(
                LearnerWorker,
                options,
                config.generator.dtype,
                number,
                section.ranks,
                num_cpus=section.num_cpus,
                num_gpus=section.num_gpus,
                threads=section.threads,
                concurrency=CONCURRENT_CALLS,
            )
            return LearnerRank(f"rank {number} of the learner", actor, hang_timeout_s=config.hang_timeout_s)

        return cls([rank(number) for number in range(section.ranks)])

    def ready_refs(self) -> dict[str, Awaitable[None]]:
        """By name, what returns when that rank is up, and raises ``LearnerDiedError`` when it has died."""
        store = asyncio.ensure_future(self._meet())
        return {rank.name: _up(rank, store) for rank in self._ranks}

    async def train_step(self, batch: Sequence[ExperienceRefs], *, kl_coef: float) -> StepReport:
        scores = [e.score.value for e in batch]
        refs = [e.rollout for e in batch] + [e.ref_logprobs for e in batch]
        report, *_ = await self._all("train_step", scores, kl_coef, *refs)
        assert isinstance(report, StepReport)
        return report

    async def publish(self) -> VersionedWeights:
        published = [rank.publish() for rank in self._ranks]
        (version, probe), *_ = await self._gathered([head for head, _ in published])
        return VersionedWeights(version=version, weights=published[0][1], probe=probe)

    async def save(self, folder: Path) -> None:
        await self._all("save", str(folder))

    async def written(self, *, wait: bool) -> bool:
        return all(await self._all("written", wait))

    async def load(self, folder: Path) -> int:
        version, *_ = await self._all("load", str(folder))
        return int(version)

    async def export(self, folder: Path) -> None:
        await self._all("export", str(folder))

    def close(self) -> None:
        """End the actors."""
        for rank in self._ranks:
            rank.kill()

    async def _meet(self) -> tuple[str, int] | None:
        """Where the ranks meet, once each has a place: only then does a rank that waits for the others seem to hang."""
        await asyncio.gather(*(rank.placed() for rank in self._ranks))
        return await self._ranks[0].call("open_store") if len(self._ranks) > 1 else None

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return await self._gathered([rank.call(method, *args) for rank in self._ranks])

    async def _gathered(self, answers: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """What each rank answers.

        Raises:
            LearnerDiedError: a rank died or hung.
            DataLostError: a rollout is gone.
            RlhfRayError: or whatever else a rank raised.
        """
        calls = [asyncio.ensure_future(answer) for answer in answers]
        _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        if waiting:
            # A rank that died is often heard of last: first the others say that they were cut off from it.
            _, waiting = await asyncio.wait(waiting, timeout=CAUSE_SECONDS)
        dying = [call for call, rank in zip(calls, self._ranks, strict=True) if call in waiting and rank.is_dying]
        await asyncio.gather(*dying, return_exceptions=True)
        for call in waiting:
            call.cancel()
        errors = [error for call in calls if call.done() and not call.cancelled() and (error := call.exception())]
        if not errors:
            return [call.result() for call in calls]
        if deaths := [error for error in errors if isinstance(error, WorkerDiedError)]:
            # A rank that hangs has the others wait for it, so that they seem to hang too: tell of all.
            raise LearnerDiedError("; ".join(map(str, deaths))) from deaths[0]
        raise next((error for error in errors if isinstance(error, RlhfRayError)), errors[0])


async def _up(rank: LearnerRank, store: asyncio.Future[tuple[str, int] | None]) -> None:
    try:
        await rank.ready(await asyncio.shield(store))
    except WorkerDiedError as error:
        raise LearnerDiedError(str(error)) from error

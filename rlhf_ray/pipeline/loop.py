"""The loop: prompts in, policy versions out.

     PromptStream ──slot──► GeneratorPool ──Rollouts──► Scorer ──scores────────┐
       ▲  (ledger)          READY workers   (refs)  └─► ReferencePool ─ref lps─┴─► ExperienceBuffer ─► Learner ─► v+1
       │                          ▲                                                bounded by slots                │
       │                          └───── WeightSync: publish v+1; a generator that acknowledges it is READY ◄──────┤
       └──────────────────────────────── the batch's slots are freed with v+1 ◄────────────────────────────────────┘

    task      consumes            produces             waits for                       is unblocked by
    _feed     ids of the ledger   one _rollout a slot  a slot                          _learn, publishing a version
    _rollout  a prompt            its experiences      a READY generator, its          weight sync, the workers
                                                       responses, scores and ref lps
              (one that no worker can work on is quarantined, and its slot passes to the ledger's next id; one whose
              responses are lost with a node is sampled again)
    _learn    a batch             a version            B prompts' experiences that     _rollout
                                                       the buffer's rule lets go

One pipeline: with ``max_staleness`` 0 there are slots for one batch only, and this is synchronous training. Workers of
all pools may join, leave and die meanwhile. Refs pass through unopened. Exactly as many prompts are issued as the
steps need, and one more for each that is quarantined. The first task that fails ends all others, and ``run`` raises its
error; one more task, the watchdog, fails when nothing moves any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from rlhf_ray.config import PPOConfig
from rlhf_ray.errors import CheckpointError, DataLostError, PromptError, RlhfRayError
from rlhf_ray.interfaces import Checkpoints, Learner, Scorer
from rlhf_ray.pipeline.buffer import ExperienceBuffer
from rlhf_ray.pipeline.groups import first_error, task_group
from rlhf_ray.pipeline.ledger import Ledger
from rlhf_ray.pipeline.occupancy import Occupancy
from rlhf_ray.pipeline.pool import GeneratorPool, ReferencePool, ScorerPool
from rlhf_ray.pipeline.summary import RunSummary, Tally
from rlhf_ray.pipeline.watchdog import Watchdog
from rlhf_ray.pipeline.weight_sync import WeightSync
from rlhf_ray.pipeline.workers import WorkerPool, WorkerState
from rlhf_ray.types import ExperienceRefs, Prompt, Ref, ScoredPrompt

__all__ = ["KLController", "Pipeline", "PromptSource", "RunSummary", "quarantined"]

log = logging.getLogger("rlhf_ray.pipeline")

WAIT_NOTICE_SECONDS = 10.0

PROMPT_STAGES = WAITING, BEING_GENERATED, BEING_SCORED = "waiting for a generator", "being generated", "being scored"

T = TypeVar("T")


class PromptSource(Protocol):
    """A pure function from ordinal to prompt."""

    def prompt(self, prompt_id: int) -> Prompt: ...


class KLController(Protocol):
    """Sets the weight of the KL penalty from the KL that it sees."""

    coef: float

    def update(self, kl: float, samples: int) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class Pipeline:
    """One run of the loop; see the module's picture.

    Args:
        references: None where the learner is the reference too.
        scorer_pools: what ``scorer`` asks and is to run while the loop does.
        parity_tolerance: largest sampler-learner log-probability gap, nats (``ppo.parity_tolerance``, resolved).
        hang_timeout_s: the run ends when nothing moves for so long and no worker is at work (``watchdog.py``).
        on_step: is given each step's metrics and the learner's sample rows.
        on_quarantine: is given a row for each prompt that is quarantined: ``prompt_id``, ``prompt``, ``cause`` and the
            ``step``s taken before.
        checkpoints: is given this state and what is scored every ``checkpoint_every`` steps and at the end, and saves
            the learner beside them. Sampling and learning go on while it writes. What cannot be written is reported
            and tried again with the next checkpoint; the last one must be written.
        deaths_before: workers that died before this loop began, by kind, where it goes on with a run of this process.

    To resume, load the learner, then ``load_state_dict``, then ``run``.
    """

    def __init__(
        self,
        *,
        prompts: PromptSource,
        pool: GeneratorPool,
        references: ReferencePool | None,
        scorer: Scorer,
        scorer_pools: Sequence[ScorerPool] = (),
        learner: Learner,
        controller: KLController,
        config: PPOConfig,
        parity_tolerance: float,
        hang_timeout_s: float,
        on_step: Callable[[dict[str, float], Sequence[Mapping[str, Any]]], None],
        on_quarantine: Callable[[Mapping[str, Any]], None] = lambda row: None,
        checkpoints: Checkpoints | None = None,
        deaths_before: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._prompts = prompts
        self._pool = pool
        self._scorer = scorer
        self._scorer_pools = scorer_pools
        self._references = references
        self._learner = learner
        self._controller = controller
        self._config = config
        self._sync = WeightSync(pool, learner, tolerance=parity_tolerance)
        self._on_step = on_step
        self._on_quarantine = on_quarantine
        self._checkpoints = checkpoints
        self._deaths_before = dict(deaths_before)
        self._ledger = Ledger()
        self._tally = Tally()
        self._occupancy = Occupancy(_now)
        self._pools: list[WorkerPool[Any]] = [p for p in (pool, references, *scorer_pools) if p is not None]
        self._watchdog = Watchdog(self._occupancy, self._pools, timeout_s=hang_timeout_s, state=self.status)
        self._buffer = ExperienceBuffer(batch_size=config.prompts_per_step, max_staleness=config.max_staleness)
        self._step = 0
        self._saved_step = -1  # a stop before the first step leaves a checkpoint too
        self._is_saving = False
        self._restored: Sequence[ScoredPrompt] = ()
        self._stopping = False
        # Of ``PROMPT_STAGES``, for each prompt that has a slot and is not in the buffer.
        self._stages: dict[int, str] = {}
        self._rollouts: set[asyncio.Task[None]] = set()
        self._interrupted: deque[int] = deque()  # issued before a resume, and due again before all others
        self._ids = self._due()

    async def run(self) -> RunSummary:
        """Train until ``config.steps`` or ``request_stop``; ends the pool's workers in every case.

        Raises:
            RlhfRayError: or whatever else the first failing task raised, itself and not in a group.
        """
        began = _now()
        try:
            async with task_group() as tasks:
                self._buffer.version = await self._sync.publish()
                for prompt_id in self._buffer.restore(self._restored):
                    self._ledger.unscored(prompt_id)
                self._restored = ()
                self._interrupted.extend(self._ledger.unfinished())
                for pool in self._pools:
                    pool.start(tasks)
                feeder = tasks.create_task(self._feed(tasks), name="feeder")
                watchdog = tasks.create_task(self._watchdog.watch(), name="watchdog")
                await self._learn()
                self._ledger.close(in_flight=[*self._stages, *self._buffer.finished_ids(), *self._interrupted])
                for task in (feeder, watchdog, *self._rollouts):
                    task.cancel()
                await self._close_pools()
        finally:
            await self._close_pools()
        return self._tally.summary(
            status="finished" if self._step >= self._config.steps else "interrupted",
            steps=self._step,
            seconds=_now() - began,
            parity_max=self._sync.parity_max,
            lost=self._ledger.lost,
            trained_twice=self._ledger.trained_twice,
            quarantined=self._ledger.quarantined,
            deaths=self._all_deaths(),
        )

    def request_stop(self) -> None:
        """Finish the step in progress, write a checkpoint and return; call it in the loop's thread (Ctrl-C)."""
        self._stopping = True
        self._buffer.end()

    def may_stand_still(self, may: bool) -> None:
        """Whether something that is none of the pools' workers is being started, and nothing moving is no hang."""
        self._watchdog.is_asked_to_wait = may

    async def _feed(self, tasks: asyncio.TaskGroup) -> None:
        needed = self._config.steps * self._config.prompts_per_step - self._ledger.past_sampling()
        for _ in range(needed):
            await self._buffer.acquire()
            prompt_id = next(self._ids)
            self._stages[prompt_id] = WAITING
            rollout = tasks.create_task(self._rollout(prompt_id), name=f"prompt {prompt_id}")
            self._rollouts.add(rollout)
            rollout.add_done_callback(self._rollouts.discard)

    async def _rollout(self, prompt_id: int) -> None:
        """Fill one slot: by this prompt, or by the next one after those that are quarantined.

        Raises:
            DataLostError: the responses of one prompt were lost ``max_prompt_tries`` times.
        """
        losses: Counter[int] = Counter()
        while True:
            prompt = self._prompts.prompt(prompt_id)
            try:
                experiences = await self._experiences(prompt)
                break
            except DataLostError as error:
                losses[prompt_id] += 1
                if losses[prompt_id] == self._config.max_prompt_tries:
                    raise
                log.warning("prompt %d is sampled again: %s", prompt_id, error)
                self._ledger.reissue(prompt_id)
            except PromptError as error:
                self._quarantine(prompt, error)
                prompt_id = next(self._ids)
            self._stages[prompt_id] = WAITING
        self._ledger.scored(prompt_id)
        del self._stages[prompt_id]
        self._buffer.put(prompt_id, experiences)

    async def _experiences(self, prompt: Prompt) -> list[ExperienceRefs]:
        """The prompt's responses, scored.

        Raises:
            DataLostError: a response went with its node.
            PromptError: no worker can work on the prompt or on a response. In both cases the buffer awaits it no more.
        """
        prompt_id = prompt.prompt_id
        sampled = await self._pool.generate(prompt, on_admit=self._admit, on_withdraw=self._withdraw)
        self._tally.rollout_stage(prompt_id, "generate", max(receipt.seconds for receipt, _ in sampled))
        self._occupancy.leave("generate")
        self._stages[prompt_id] = BEING_SCORED
        scores = asyncio.gather(*(self._scorer.score(rollout) for _, rollout in sampled))
        references = asyncio.gather(*(self._ref_logprobs(prompt, rollout) for _, rollout in sampled))
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._timed(prompt_id, "score", scores))
                both.create_task(self._timed(prompt_id, "reference", references))
        except ExceptionGroup as group:
            _, others = group.split((DataLostError, PromptError))
            if others is not None:
                raise
            self._buffer.withdraw(prompt_id)
            cause = first_error(group.subgroup(DataLostError) or group)
            raise cause from cause.__cause__
        judged = zip(sampled, scores.result(), references.result(), strict=True)
        return [
            ExperienceRefs(receipt=receipt, score=score, rollout=rollout, ref_logprobs=ref_logprobs)
            for (receipt, rollout), score, ref_logprobs in judged
        ]

    def _quarantine(self, prompt: Prompt, cause: PromptError) -> None:
        """Leave a prompt out for good.

        Raises:
            RlhfRayError: there are ``max_quarantined`` already.
        """
        self._ledger.quarantine(prompt.prompt_id)
        self._tally.forget(prompt.prompt_id)
        del self._stages[prompt.prompt_id]
        row = {"prompt_id": prompt.prompt_id, "prompt": prompt.text, "cause": str(cause), "step": self._step}
        self._on_quarantine(row)
        allowed = self._config.max_quarantined
        if self._ledger.quarantined > allowed:
            raise RlhfRayError(
                f"prompt {prompt.named()} is quarantined, and it is number {self._ledger.quarantined} where "
                f"ppo.max_quarantined = {allowed}: {cause}; mend what the rows of quarantine.jsonl have in common, or "
                "raise ppo.max_quarantined"
            ) from cause
        log.warning(
            "prompt %d is quarantined (%d of %d): %s", prompt.prompt_id, self._ledger.quarantined, allowed, cause
        )

    async def _ref_logprobs(self, prompt: Prompt, rollout: Ref) -> Ref | None:
        return None if self._references is None else await self._references.logprobs(prompt, rollout)

    async def _learn(self) -> None:
        while self._step < self._config.steps and (batch := await self._next_batch()):
            await self._train(batch)
            await self._end_save(wait=False)
            if self._config.checkpoint_every and self._step % self._config.checkpoint_every == 0:
                await self._begin_save()
        await self._begin_save()
        await self._end_save(wait=True, last=True)

    async def _train(self, batch: list[ExperienceRefs]) -> None:
        self._ledger.trained(list(dict.fromkeys(e.receipt.prompt_id for e in batch)))
        began = _now()
        with self._occupancy.busy("train"):
            report = await self._learner.train_step(batch, kl_coef=self._controller.coef)
        if report.version != self._buffer.version + 1:
            raise RlhfRayError(
                f"a step at version {self._buffer.version} made version {report.version}, not the next one"
            )
        self._sync.check_rollouts(report.metrics.get("sampler_gap"), version=self._buffer.version)
        self._step += 1
        slots_in_use = self._buffer.slots_in_use
        self._tally.learner_stage("train", _now() - began)
        if not report.metrics.get("skipped"):
            self._controller.update(report.metrics["kl"], len(batch))
        if self._step < self._config.steps and not self._stopping:  # nobody would sample from a last version
            await self._publish(report.version)
        others = {"slots_in_use": slots_in_use, "generators": self._pool.size()}
        others |= {"quarantined": self._ledger.quarantined, "deaths": sum(self._all_deaths().values())}
        row = self._tally.step(self._step, batch, report, _now(), others | self._sync.collect_metrics())
        parts = [{"score_parts": dict(e.score.parts)} if e.score.parts else {} for e in batch]
        self._on_step(row, [{**sample, **of} for sample, of in zip(report.samples, parts, strict=False)])

    async def _publish(self, version: int) -> None:
        began = _now()
        with self._occupancy.busy("publish"):
            published = await self._sync.publish()
        if published != version:
            raise RlhfRayError(f"the learner made version {version} and published version {published}")
        self._buffer.release(published)
        self._tally.learner_stage("publish", _now() - began)

    async def _next_batch(self) -> list[ExperienceRefs]:
        """The next batch, or an empty one when a stop was requested; says every few seconds what it waits for."""
        began = _now()
        while True:
            try:
                async with asyncio.timeout(WAIT_NOTICE_SECONDS):
                    batch = await self._buffer.take()
            except TimeoutError:
                log.info("the learner has waited %.0f s for a batch: %s", _now() - began, self._what_is_under_way())
            else:
                self._tally.learner_stage("wait", _now() - began)
                return batch

    async def _begin_save(self) -> None:
        if self._checkpoints is None or self._saved_step == self._step:
            return
        await self._end_save(wait=True)
        began = _now()
        with self._occupancy.busy("checkpoint"):
            await self._checkpoints.begin(self._step, self.state_dict(), self._buffer.finished())
        self._saved_step, self._is_saving = self._step, True
        self._tally.learner_stage("checkpoint", _now() - began)

    async def _end_save(self, *, wait: bool, last: bool = False) -> None:
        """Mark the checkpoint under way if it is written; what died before it is then forgotten.

        Raises:
            CheckpointError: the last one could not be written. The failure of another one is only reported: a run of
                days should outlive an hour in which the disk was full.
        """
        if self._checkpoints is None or not self._is_saving:
            return
        began = _now()
        try:
            with self._occupancy.busy("checkpoint"):
                self._is_saving = not await self._checkpoints.end(wait=wait)
        except CheckpointError as error:
            if last:
                raise
            self._is_saving = False
            log.error("the checkpoint of step %d is missing, and training goes on: %s", self._saved_step, error)
        else:
            if not self._is_saving:
                for pool in self._pools:
                    pool.forget_deaths()
        self._tally.learner_stage("checkpoint", _now() - began)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state to resume from, beside what the learner saves and what is scored."""
        return {
            "step": self._step,
            "ledger": self._ledger.state_dict(),
            "controller": self._controller.state_dict(),
            "tally": self._tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], scored: Sequence[ScoredPrompt]) -> None:
        """Go on from a checkpoint: what was scored waits for the learner again, and what was in flight is issued again
        first, under its old ids and seeds.
        """
        self._restored = scored
        self._step = self._saved_step = state["step"]
        self._ledger.load_state_dict(state["ledger"])
        self._controller.load_state_dict(state["controller"])
        self._tally.load_state_dict(state["tally"])

    def status(self) -> dict[str, Any]:
        """How the run stands at this moment, JSON-ready: see ``rlhf_ray.status``."""
        stages = Counter(self._stages.values())
        return {
            "step": self._step,
            "steps": self._config.steps,
            "version": self._buffer.version,
            "staleness": self._tally.staleness() | {"bound": self._config.max_staleness},
            "queue": {
                "slots_in_use": self._buffer.slots_in_use,
                "slots": self._buffer.capacity,
                **{stage.replace(" ", "_"): stages[stage] for stage in PROMPT_STAGES},
                "finished": len(self._buffer.finished_ids()),
            },
            "quarantined": {"prompts": self._ledger.quarantined, "bound": self._config.max_quarantined},
            "deaths": self._all_deaths(),
            "occupancy": self._occupancy.shares(),
            "generators": self._pool.status(),
            "references": self._references.status() if self._references is not None else None,
            "scorers": {pool.kind: pool.status() for pool in self._scorer_pools if pool.is_watched},
        }

    def deaths(self) -> dict[str, int]:
        """Workers of the pools that died while this loop ran, by kind; the others left or live."""
        return {pool.kind: pool.deaths for pool in self._pools if pool.deaths}

    def _all_deaths(self) -> dict[str, int]:
        return dict(Counter(self._deaths_before) + Counter(self.deaths()))

    async def _close_pools(self) -> None:
        await asyncio.gather(*(pool.close() for pool in self._pools))

    def _due(self) -> Iterator[int]:
        """Ids without end, each issued as it is taken: interrupted ones first."""
        while self._interrupted:
            prompt_id = self._interrupted.popleft()
            self._ledger.reissue(prompt_id)
            yield prompt_id
        while True:
            prompt_id = self._ledger.next_id
            self._ledger.issue(prompt_id)
            yield prompt_id

    def _admit(self, prompt_id: int, version: int) -> None:
        self._buffer.admit(prompt_id, version)
        self._tally.admitted(_now())
        self._occupancy.enter("generate")
        self._stages[prompt_id] = BEING_GENERATED

    def _withdraw(self, prompt_id: int) -> None:
        self._ledger.reissue(prompt_id)
        self._buffer.withdraw(prompt_id)
        self._occupancy.leave("generate")
        self._stages[prompt_id] = WAITING

    async def _timed(self, prompt_id: int, stage: str, call: Awaitable[T]) -> T:
        began = _now()
        with self._occupancy.busy(stage):
            result = await call
        self._tally.rollout_stage(prompt_id, stage, _now() - began)
        return result

    def _what_is_under_way(self) -> str:
        prompts = [f"{n} {stage}" for stage, n in Counter(self._stages.values()).items()]
        finished = f"{len(self._buffer.finished_ids())} finished of a batch of {self._config.prompts_per_step}"
        workers = ", ".join(f"{name} {state.value}" for name, state in self._pool.states().items())
        said = f"prompts: {', '.join([*prompts, finished])}; generators: {workers or 'none'}"
        for pool in self._pools[1:]:
            states = pool.states()
            if states and WorkerState.READY not in states.values():
                said += f"; waiting for {', '.join(f'{name} {state.value}' for name, state in states.items())}"
        return said


def quarantined(state: Mapping[str, Any]) -> frozenset[int]:
    """Ids of the prompts that a pipeline of this ``state_dict`` holds in quarantine."""
    return frozenset(state["ledger"]["quarantined"])


def _now() -> float:
    return asyncio.get_running_loop().time()

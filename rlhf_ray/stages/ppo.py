"""The asynchronous PPO loop put together on a Ray cluster: who is started, with what, and what is left on disk.

prepare ─► check ─► reward model served ─► learner, references, scorers, generators ─► Pipeline.run ─► export
                                           ▲     a rank of the learner died: again from     │
                                           └──────────── the newest checkpoint ◄────────────┘
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray import checkpoint
from rlhf_ray.actors.generator import RayGenerator, engine_options
from rlhf_ray.actors.learner import RayLearner
from rlhf_ray.actors.reference import CONCURRENT_CALLS, ReferenceActor, reference_options
from rlhf_ray.actors.scored_prompts import load_scored_refs
from rlhf_ray.actors.scorer import RayScorers
from rlhf_ray.actors.starting import ActorStarter
from rlhf_ray.algorithms.kl import kl_controller
from rlhf_ray.cluster import check_resources, connected, wait_ready, worker_needs
from rlhf_ray.config import RESOLVED_FILE, PoolSection, RunConfig, save_resolved
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.errors import ConfigError, DataLostError, HangError, LearnerDiedError, ModelError
from rlhf_ray.metrics import MetricsWriter, read_summary, status_kept, write_summary
from rlhf_ray.models.reward import check_reward_folder, model_version
from rlhf_ray.pipeline.loop import Pipeline, quarantined
from rlhf_ray.pipeline.pool import GeneratorPool, ReferencePool
from rlhf_ray.pipeline.summary import RunSummary
from rlhf_ray.stages.live import note_restart
from rlhf_ray.stages.ppo_checkpoints import RunCheckpoints
from rlhf_ray.stages.prepare import (
    Prepared,
    check_reward_model_reads,
    check_reward_quality,
    check_scorers,
    critic_folder,
    prepare,
)
from rlhf_ray.stages.serve import ServedReward, served_reward, sole_owner
from rlhf_ray.stages.steering import ElasticPool, Steering
from rlhf_ray.stages.training import refuse_anothers

log = logging.getLogger("rlhf_ray.ppo")

OnStep = Callable[[Mapping[str, float]], None]

PARITY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Default of ``ppo.parity_tolerance`` by the coarser dtype of generator and learner, nats."""


def run_ppo(
    config: RunConfig, *, resume: bool = False, service: ServedReward | None = None, on_step: OnStep | None = None
) -> RunSummary:
    """Improve the policy against its scorers; leaves metrics, checkpoints and the policy.

    Args:
        resume: go on from the newest whole checkpoint of this run.
        service: a reward model that is already served; by default this serves ``serve.model`` for the run alone, if one
            of the scorers is that model.
        on_step: hears of each step's metrics.

    Raises:
        InputError: something that cannot work, before anything is started.
        RlhfRayError: the run's cause of death.
    """
    check_scorers(config)
    reward_folder = reward_model_folder(config) if config.serves_reward else None
    if reward_folder is not None:
        check_reward_quality(reward_folder, min_accuracy=config.reward.min_accuracy)
    prepared = prepare(config, config.prompts.path)
    config = prepared.config
    encoded = prepared.encode(config.prompts.path)
    if reward_folder is not None:
        check_reward_model_reads(prepared, reward_folder, [ids for _, ids in encoded])
    prompts = PromptStream(encoded, seed=config.seed, completions=config.ppo.completions)
    critic = critic_folder(prepared)
    identity = _identity(config, encoded, reward_folder)
    start = _find_start(config, resume, identity)
    with connected():
        check_resources(worker_needs(config))
        save_resolved(config, config.run_dir / RESOLVED_FILE)
        with status_kept(config.run_dir), reward_handle(config, reward_folder, service) as handle:
            run = _Run(prepared, critic, prompts, handle, identity, on_step or (lambda metrics: None))
            summary = asyncio.run(_run_to_its_end(run, start))
            write_summary(config.run_dir, asdict(summary))
    return summary


@contextmanager
def reward_handle(config: RunConfig, folder: Path | None, service: ServedReward | None) -> Iterator[Any]:
    """The handle of ``service``, or of the model in ``folder`` served for the block; None where there is no folder."""
    if folder is None:
        yield None
        return
    if service is not None:
        yield service.handle
        return
    with sole_owner(config.run_dir, config.serve.name), served_reward(config, folder) as served:
        yield served.handle


def reward_model_folder(config: RunConfig) -> Path:
    """``serve.model``, or the reward model that this run trained.

    Raises:
        ModelError: there is none, or it cannot be one.
    """
    folder = Path(config.serve.model).expanduser() if config.serve.model else config.run_dir / "reward"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"there is no reward model in {folder}; train one with `rlhf-ray reward`, "
            "or name its folder with serve.model"
        )
    section = config.serve
    check_reward_folder(
        folder, label=section.label, trust_remote_code=section.trust_remote_code, allow_pickle=section.allow_pickle
    )
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """Where the run begins: at nothing, or at a checkpoint."""

    folder: Path | None = None
    state: Mapping[str, Any] | None = None
    again: bool = False
    """The run's folder holds rows of steps that will be taken again."""

    @property
    def step(self) -> int:
        return int(self.state["step"]) if self.state is not None else 0


@dataclass(frozen=True, slots=True)
class _Run:
    """What stays as it is when the loop's workers are started again."""

    prepared: Prepared
    critic: str | None
    prompts: PromptStream
    handle: Any
    """Of the served reward model."""
    identity: Mapping[str, Any]
    on_step: OnStep
    stop_wished: threading.Event = field(default_factory=threading.Event)
    """Somebody pressed Ctrl-C."""
    deaths: Counter[str] = field(default_factory=Counter)
    """Workers that died so far, by kind."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The loop's actors."""

    learner: RayLearner
    scorers: RayScorers
    generators: GeneratorPool
    references: ReferencePool | None
    elastic: dict[str, ElasticPool]
    """The pools by their names for people, each with what starts its workers."""
    service: str | None
    """The Serve application that scores."""

    def note_asked(self, asked: dict[str, int]) -> None:
        """How many workers of each pool people want, by the pool's name."""
        asked.update({name: pool.status()["asked"] for name, pool in self.elastic.items()})


def _find_start(config: RunConfig, resume: bool, identity: Mapping[str, Any]) -> _Start:
    root = config.run_dir / "checkpoints"
    marked = checkpoint.marked_checkpoints(root)
    if not resume:
        if marked:
            raise ConfigError(
                f"{root} holds checkpoints of an earlier run; resume it, choose another name, or remove that folder"
            )
        return _Start()
    start = _newest_start(config, identity)
    if start.folder is None:
        refuse_anothers(config.run_dir, "ppo")
        log.warning("--resume: there is no checkpoint in %s yet; beginning at the first step", root)
    is_finished = read_summary(config.run_dir).get("status") == "finished"
    if start.step > config.ppo.steps or (start.step == config.ppo.steps and is_finished):
        raise ConfigError(
            f"--resume: {start.folder} is at step {start.step} and ppo.steps = {config.ppo.steps}; "
            "raise ppo.steps to go on"
        )
    return start


def _newest_start(config: RunConfig, identity: Mapping[str, Any]) -> _Start:
    """At the newest whole checkpoint, or at the first step if none was written yet; what came after is set aside.

    Raises:
        ConfigError: all of them are damaged, or it is another run's.
    """
    root = config.run_dir / "checkpoints"
    marked = checkpoint.marked_checkpoints(root)
    if not marked:
        return _Start(again=True)
    folder = checkpoint.latest_checkpoint(root)
    if folder is None:
        raise ConfigError(
            f"there is no whole checkpoint in {root}, and the {len(marked)} that are marked complete are damaged; "
            "put a copy of one back, or use --overwrite to start afresh"
        )
    _, state = checkpoint.load_checkpoint(folder / "pipeline")
    then = state["identity"]
    changed = [key for key, value in identity.items() if key in then and then[key] != value]
    if changed:
        was = ", ".join(f"{key} = {then[key]}" for key in changed)
        raise ConfigError(f"--resume: {folder} was written with {was}; give the same, or start a run of another name")
    checkpoint.set_aside_after(folder)
    return _Start(folder=folder, state=state, again=True)


async def _run_to_its_end(run: _Run, start: _Start) -> RunSummary:
    """Run the loop; when a rank of the learner dies, or what waits for it is lost, all workers but the service begin
    again, as by ``--resume``.

    Raises:
        LearnerDiedError, DataLostError: ``learner.max_restarts`` times in a row no new checkpoint was reached.
    """
    config, in_a_row = run.prepared.config, 0
    asked: dict[str, int] = {}
    while True:
        try:
            async with AsyncExitStack() as stack:
                workers = await _start_workers(run, stack, asked)
                stack.callback(workers.note_asked, asked)
                return await _train(run, workers, start)
        except (LearnerDiedError, DataLostError) as error:
            if run.stop_wished.is_set():
                raise type(error)(f"{error}; the run was being stopped: go on with --resume") from error
            run.deaths["learner"] += isinstance(error, LearnerDiedError)
            before = start.step
            start = await asyncio.to_thread(_newest_start, config, run.identity)
            in_a_row = 1 if start.step > before else in_a_row + 1
            allowed = config.learner.max_restarts
            if in_a_row > allowed:
                raise type(error)(
                    f"{error}; learner.max_restarts = {allowed} restarts in a row are used up at step {start.step}: "
                    "mend the cause and go on with --resume, or raise learner.max_restarts"
                ) from error
            log.warning("%s; going on from step %d (restart %d of %d)", error, start.step, in_a_row, allowed)
            await asyncio.to_thread(note_restart, config.run_dir)


async def _train(run: _Run, workers: Workers, start: _Start) -> RunSummary:
    config, learner = run.prepared.config, workers.learner
    if start.folder is not None:
        version = await learner.load(start.folder / "learner")
        log.info("resumed from %s: step %d, version %d", start.folder, start.step, version)
    kl = config.ppo.kl
    left_out = quarantined(start.state) if start.state else frozenset()
    resume_step = start.step if start.again else None
    with MetricsWriter(config.run_dir, resume_step=resume_step, quarantined=left_out) as writer:

        def record(metrics: dict[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
            writer.write(metrics, samples)
            run.on_step(metrics)

        checkpoints = RunCheckpoints(
            config.run_dir / "checkpoints", learner, identity=run.identity, keep=config.ppo.keep_checkpoints
        )
        pipeline = Pipeline(
            prompts=run.prompts,
            pool=workers.generators,
            references=workers.references,
            scorer=workers.scorers,
            scorer_pools=workers.scorers.pools,
            learner=learner,
            controller=kl_controller(kl.controller, coef=kl.coef, target=kl.target, horizon=kl.horizon),
            config=config.ppo,
            parity_tolerance=parity_tolerance(config),
            hang_timeout_s=config.hang_timeout_s,
            on_step=record,
            on_quarantine=writer.quarantine,
            checkpoints=checkpoints,
            deaths_before=run.deaths,
        )
        if start.folder is not None and start.state is not None:
            scored = await asyncio.to_thread(load_scored_refs, start.folder / "scored")
            pipeline.load_state_dict(start.state, scored)
        steering = Steering(config, pipeline, workers.elastic, service=workers.service)
        try:
            with _stop_on_ctrl_c(pipeline, run.stop_wished):
                async with steering.kept():
                    summary = await pipeline.run()
        except HangError as error:
            raise HangError(f"{error}{steering.word_of_serve()}") from error
        finally:
            run.deaths.update(pipeline.deaths())
            await checkpoints.close()
        await learner.export(config.run_dir / "policy")
    return summary


async def _start_workers(run: _Run, stack: AsyncExitStack, asked: Mapping[str, int]) -> Workers:
    """Start every worker at once; returns when all but those of pools are up (a pool waits for its own).

    Whatever was started is ended with ``stack``, also when another worker fails to start.

    Args:
        asked: for pools by name, how many workers people wanted before these were started again.
    """
    prepared, handle = run.prepared, run.handle
    config, folder = prepared.config, prepared.model_folder
    learner = RayLearner.start(config, folder, run.critic)
    stack.callback(learner.close)
    elastic: dict[str, ElasticPool] = {}
    references = None
    if config.reference.count:
        reads = reference_options(config, folder)
        starter = _starter(config.reference, "reference", lambda name: ReferenceActor.start(name, config, reads), asked)
        stack.push_async_callback(starter.close)
        references = ReferencePool(starter, **_size(config, config.reference, CONCURRENT_CALLS))
        elastic["references"] = ElasticPool(config.reference, references, starter)
    scorers = RayScorers.start(config, handle)
    stack.push_async_callback(scorers.close)
    options = engine_options(config, folder, context_length=prepared.context_length)
    starter = _starter(config.generator, "generator", lambda name: RayGenerator.start(name, config, options), asked)
    stack.push_async_callback(starter.close)
    prompts_each = max(1, config.generator.max_num_seqs // config.ppo.completions)
    generators = GeneratorPool(starter, **_size(config, config.generator, prompts_each))
    elastic["generators"] = ElasticPool(config.generator, generators, starter)
    for name, number in asked.items():
        elastic[name].scale(number)
    await wait_ready(learner.ready_refs())
    service = handle.app_name if handle is not None else None
    return Workers(learner, scorers, generators, references, elastic, service)


def _starter(
    section: PoolSection, kind: str, start: Callable[[str], Any], asked: Mapping[str, int]
) -> ActorStarter[Any]:
    """The pool names its workers in this order; the first ones load their model while the learner loads its own."""
    first = min(section.needed, asked.get(f"{kind}s", section.needed))
    return ActorStarter(start, ahead=[f"{kind}-{i}" for i in range(first)])


def _size(config: RunConfig, section: PoolSection, max_concurrent: int) -> dict[str, Any]:
    """Arguments of a pool."""
    return {
        "count": section.count,
        "max_concurrent": max_concurrent,
        "max_restarts": section.max_restarts,
        "max_prompt_tries": config.ppo.max_prompt_tries,
        "shrink_to": section.needed if section.max is not None else None,
    }


def parity_tolerance(config: RunConfig) -> float:
    """``ppo.parity_tolerance``, by default what the coarser dtype of the two sides needs, nats."""
    coarser = "bfloat16" if "bfloat16" in (config.generator.dtype, config.learner.precision) else "float32"
    return config.ppo.parity_tolerance or PARITY_TOLERANCE[coarser]


def _identity(config: RunConfig, encoded: Sequence[Any], reward_folder: Path | None) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from: what a prompt's number in the ledger stands for,
    seeds and the scale of scores follow from these.
    """
    prompts = hashlib.sha256(json.dumps(encoded).encode()).hexdigest()
    return {
        "seed": config.seed,
        "model.path": config.model.path,
        "prompts.path": config.prompts.path,
        "prompts' content": prompts[:12],
        "ppo.batch_size": config.ppo.batch_size,
        "ppo.completions": config.ppo.completions,
        "the reward model": model_version(reward_folder) if reward_folder is not None else None,
    }


@contextmanager
def _stop_on_ctrl_c(pipeline: Pipeline, wished: threading.Event) -> Iterator[None]:
    """The first Ctrl-C ends the run after the step in progress, with a checkpoint; a second one ends it at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        log.warning("stopping after the step in progress; its checkpoint is written first (Ctrl-C again to drop it)")
        wished.set()
        pipeline.request_stop()
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

"""The generator as a Ray actor: an engine thread that samples without pause, and the awaitable client of it.

generate() ──► inbox ──► engine thread: apply what is in the inbox, one engine step, hand out what finished ──► futures
update_weights() ─┘      (weights change between two steps; rollouts under way go on under the new ones)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.actors.pulse import PulsingWorker
from rlhf_ray.actors.weights import unpack_weights
from rlhf_ray.cluster import start_actor
from rlhf_ray.config import RunConfig
from rlhf_ray.data.prompts import sampling_seed
from rlhf_ray.errors import ConfigError, PromptError, WorkerDiedError
from rlhf_ray.types import Probe, Prompt, Ref, Rollout, RolloutReceipt, VersionedWeights, WeightAck

PROBE_ROOM = 192
"""Tokens that an engine must at least hold, so that the parity probe (``PROBE_TOKENS`` of the learner) fits."""


class GeneratorWorker(PulsingWorker):
    """Runs one ``VLLMGenerator`` in a thread of its own; every method is awaited from the actor's event loop."""

    def __init__(self, name: str, engine_options: Mapping[str, Any]) -> None:
        super().__init__()
        self._name = name
        self._inbox: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._rollouts: dict[int, asyncio.Future[Rollout]] = {}
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, args=(dict(engine_options),), name="engine", daemon=True)
        self._thread.start()

    async def ready(self) -> str:
        """Returns the name once the engine has loaded its model and warmed up."""
        await self._call(lambda engine: None, "loading")
        return self._name

    async def generate(self, prompt: Prompt) -> tuple[Any, ...]:
        """The receipts of all responses to the prompt, and each response; many calls share the engine's batch.

        Raises:
            PromptError: a log-probability of a response is not finite.
        """
        self._loop = asyncio.get_running_loop()
        began = time.monotonic()
        futures = [self._submit(member) for member in engine_prompts(prompt)]
        rollouts = [replace(rollout, prompt=prompt) for rollout in await asyncio.gather(*futures)]
        seconds = time.monotonic() - began
        if not all(math.isfinite(logprob) for rollout in rollouts for logprob in rollout.rollout_logprobs):
            raise PromptError(
                f"{self._name} gave NaN or infinity as a log-probability for prompt {prompt.named()}; where there are "
                "many of these the policy has collapsed: lower learner.lr, or raise ppo.kl.coef"
            )
        return [make_receipt(rollout, self._name, seconds) for rollout in rollouts], *rollouts

    def _submit(self, prompt: Prompt) -> asyncio.Future[Rollout]:
        assert self._loop is not None
        future: asyncio.Future[Rollout] = self._loop.create_future()
        self._rollouts[prompt.prompt_id] = future
        self._put(lambda engine: engine.submit(prompt))
        return future

    async def update_weights(self, version: int, packed: Mapping[str, Any], probe: Probe) -> WeightAck:
        """Load the weights between two engine steps and check them on the probe."""
        began = time.monotonic()
        weights = unpack_weights(packed)
        await self._call(lambda engine: engine.load_weights(weights, version), "updating weights")
        loaded = time.monotonic() - began
        mine = np.asarray(await self._call(lambda engine: engine.logprobs(probe.token_ids), "reading the probe"))
        gap = float(np.abs(mine - np.asarray(probe.logprobs)).max())
        return WeightAck(generator=self._name, version=version, seconds=loaded, parity_max=gap)

    async def load_policy(self, folder: str, version: int) -> None:
        """Go on with the weights of another model folder of the same architecture."""
        from rlhf_ray.models.loading import load_policy_model

        weights = load_policy_model(folder).state_dict()
        await self._call(lambda engine: engine.load_weights(weights, version), "updating weights")

    async def close(self) -> None:
        """Stop the engine; rollouts under way are dropped."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, work: Callable[[Any], Any], phase: str) -> Any:
        """Run ``work(engine)`` in the engine thread between two steps and await its result."""
        loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def run(engine: Any) -> None:
            try:
                with self._working(phase):
                    result = work(engine)
            except Exception as error:  # noqa: BLE001 (whoever asked gets the cause)
                loop.call_soon_threadsafe(_fail, future, error)
            else:
                loop.call_soon_threadsafe(_finish, future, result)

        self._put(run)
        while not future.done():
            # The thread may end before it reads the inbox: look at it now and then.
            await asyncio.wait([future], timeout=1.0)
            if self._failure is not None and not future.done():
                raise self._failure
        return future.result()

    def _put(self, work: Callable[[Any], None]) -> None:
        if self._failure is not None:
            raise self._failure
        self._inbox.put(work)

    def _run(self, engine_options: dict[str, Any]) -> None:
        """The engine thread: only it touches the engine."""
        try:
            with self._working("loading"):
                from rlhf_ray.roles.vllm_generator import VLLMGenerator

                engine = VLLMGenerator(**engine_options)
        except BaseException as error:  # noqa: BLE001 (an engine that cannot start fails every time: callers get the cause)
            cause = " ".join(str(error).split())[:500]
            self._end(
                ConfigError(
                    f"the engine of {self._name} cannot start ({type(error).__name__}: {cause}); "
                    "look at model.path, generator.dtype and generator.kv_cache_gb"
                )
            )
            return
        try:
            while self._apply_inbox(engine):
                with self._working("sampling"):
                    finished = engine.step()
                for rollout in finished:
                    self._hand_out(rollout)
            engine.shutdown()
            self._end(WorkerDiedError(f"{self._name} was closed"))
        except BaseException as error:  # noqa: BLE001 (one that ran before is replaced by another, like a dead process)
            died = WorkerDiedError(f"{self._name}'s engine failed: {type(error).__name__}: {error}")
            died.__cause__ = error
            self._end(died)

    def _end(self, error: BaseException) -> None:
        """Nobody waits for an engine that is gone."""
        self._failure = error
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail_all, error)

    def _apply_inbox(self, engine: Any) -> bool:
        """Apply everything asked for; sleep when there is nothing to do. False when closing."""
        while True:
            try:
                work = self._inbox.get(block=not engine.has_work)
            except queue.Empty:
                return True
            if work is None:
                return False
            work(engine)

    def _hand_out(self, rollout: Rollout) -> None:
        assert self._loop is not None
        future = self._rollouts.pop(rollout.prompt.prompt_id)
        self._loop.call_soon_threadsafe(_finish, future, rollout)

    def _fail_all(self, error: BaseException) -> None:
        for future in self._rollouts.values():
            _fail(future, error)
        self._rollouts.clear()


def _finish(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def engine_prompts(prompt: Prompt) -> list[Prompt]:
    """What the engine is asked for one prompt: each response under an id and a sampling seed of its own."""
    return [
        replace(
            prompt,
            prompt_id=prompt.prompt_id * prompt.completions + member,
            seed=sampling_seed(prompt.seed, member) if member else prompt.seed,
        )
        for member in range(prompt.completions)
    ]


def make_receipt(rollout: Rollout, generator: str, seconds: float) -> RolloutReceipt:
    """What the driver is told of a rollout."""
    return RolloutReceipt(
        prompt_id=rollout.prompt.prompt_id,
        generator=generator,
        oldest_version=min(rollout.policy_versions),
        newest_version=max(rollout.policy_versions),
        response_tokens=len(rollout.response_ids),
        truncated=rollout.finish_reason == "length",
        seconds=seconds,
    )


def engine_options(config: RunConfig, model_folder: str, *, context_length: int) -> dict[str, Any]:
    """Arguments of ``VLLMGenerator`` for this configuration. ``generator.dtype`` must be resolved."""
    return {
        "model": model_folder,
        "dtype": config.generator.dtype,
        "max_model_len": min(
            context_length, max(config.prompts.max_tokens + config.sampling.max_new_tokens, PROBE_ROOM)
        ),
        "max_num_seqs": 1 if config.deterministic else config.generator.max_num_seqs,
        "kv_cache_memory_bytes": int(config.generator.kv_cache_gb * 1e9),
        "temperature": config.sampling.temperature,
        "max_new_tokens": config.sampling.max_new_tokens,
        "tensor_parallel_size": config.generator.tensor_parallel_size,
        "trust_remote_code": config.model.trust_remote_code,
    }


class RayGenerator(ActorClient):
    """Client of a ``GeneratorWorker`` actor; satisfies ``interfaces.Generator``."""

    @classmethod
    def start(
        cls, name: str, config: RunConfig, options: Mapping[str, Any], *, threads: int | None = None
    ) -> RayGenerator:
        """Start the actor on the cluster; ``ready`` waits for its engine.

        Args:
            threads: instead of ``generator.threads``.
        """
        section = config.generator
        actor = start_actor(
            GeneratorWorker,
            name,
            dict(options),
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            threads=section.threads if threads is None else threads,
            concurrency=section.max_num_seqs + 8,
        )
        return cls(name, actor, hang_timeout_s=config.hang_timeout_s)

    async def generate(self, prompt: Prompt) -> Sequence[tuple[RolloutReceipt, Ref]]:
        receipts, *rollouts = self._actor.generate.options(num_returns=1 + prompt.completions).remote(prompt)
        return list(zip(await self.answer(receipts), rollouts, strict=True))

    async def update_weights(self, published: VersionedWeights) -> WeightAck:
        return await self.answer(
            self._actor.update_weights.remote(published.version, published.weights, published.probe)
        )

    async def load_policy(self, folder: str, version: int) -> None:
        """Go on with the weights of another model folder of the same architecture."""
        await self.answer(self._actor.load_policy.remote(folder, version))

    async def close(self) -> None:
        if self.is_placed:
            with contextlib.suppress(TimeoutError, WorkerDiedError):  # gone or stuck: ended below either way
                await asyncio.wait_for(self.answer(self._actor.close.remote()), timeout=10)
        await super().close()


async def sample(
    generators: Sequence[RayGenerator], prompts: Sequence[Prompt], done: Callable[[int, int], None]
) -> list[Rollout]:
    """Sample every prompt once over the generators, in the order of ``prompts``; ``done(n, of)`` hears of progress."""
    finished = 0

    async def one(i: int, prompt: Prompt) -> Rollout:
        nonlocal finished
        ((_, ref),) = await generators[i % len(generators)].generate(prompt)
        finished += 1
        done(finished, len(prompts))
        rollout: Rollout = await ref
        return rollout

    return list(await asyncio.gather(*(one(i, p) for i, p in enumerate(prompts))))

"""Evaluate on a cluster: sample both policies with vLLM, score them as the loop does, and measure each one's KL to
``model.path``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import numpy as np
import ray

from rlhf_ray.actors.reference import RayReference, reference_options
from rlhf_ray.actors.scorer import RayScorers
from rlhf_ray.cluster import check_resources, connected, wait_ready, worker_needs
from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.models.loading import same_architecture
from rlhf_ray.stages.collect import Progress, sample_responses
from rlhf_ray.stages.evaluate import Evaluation, check_trained_policy, evaluate, pairing
from rlhf_ray.stages.evaluate_input import make_judge, prepare_pair
from rlhf_ray.stages.ppo import reward_handle, reward_model_folder
from rlhf_ray.stages.prepare import check_reward_model_reads, check_scorers
from rlhf_ray.stages.serve import ServedReward
from rlhf_ray.types import Rollout, Score

log = logging.getLogger("rlhf_ray.evaluate")

CONCURRENT_SCORES = 256
"""Responses sent to the scorers at once: well below what the reward service queues."""

EVAL_SEED_OFFSET = 1_000_003
"""Added to the run's seed, so that held-out responses do not share sampling seeds with training."""


def run_evaluate(
    config: RunConfig, *, service: ServedReward | None = None, progress: Progress | None = None
) -> Evaluation:
    """Compare ``evaluate.policy`` with ``evaluate.baseline``: by default ``runs/NAME/policy`` with the base model on
    ``prompts.eval_path``.

    Args:
        service: a reward model that is already served; by default one is served for this alone, if a scorer needs it.

    Raises:
        InputError: a policy, a judge, a reward model or prompts that cannot be used.
    """
    check_trained_policy(config)
    gold = make_judge(config)
    scored = _anything_scores(config)
    if scored:
        check_scorers(config)
    else:
        log.info("there is no reward model in %s: the judge alone compares", config.run_dir / "reward")
    reward_folder = reward_model_folder(config) if scored and config.serves_reward else None
    prepared, folders, encoded = prepare_pair(config)
    config = prepared.config
    if reward_folder is not None:
        check_reward_model_reads(prepared, reward_folder, [ids for _, ids in encoded])
    if config.evaluate.of_the_run:
        save_resolved(config, config.run_dir / RESOLVED_FILE)

    def sample(policies: Sequence[str]) -> list[list[Rollout]]:
        n, seed = config.evaluate.samples_per_prompt, config.seed + EVAL_SEED_OFFSET
        models = [folders[policy] for policy in policies]
        together = same_architecture(*models, trust_remote_code=config.model.trust_remote_code)
        return [
            rollouts
            for group in ([models] if together else [[model] for model in models])
            for rollouts in sample_responses(prepared, group, encoded, n, seed=seed, progress=progress)
        ]

    with connected():
        idle = {"learner"} if reward_folder is not None else {"learner", "serve"}
        check_resources([need for need in worker_needs(config) if need.section not in idle])
        reference = RayReference.start(config, reference_options(config, prepared.model_folder))
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(reference))
            handle = stack.enter_context(reward_handle(config, reward_folder, service))
            evaluation = evaluate(
                config,
                sample=sample,
                gold=gold,
                measure=lambda rollouts: asyncio.run(
                    _measure(RayScorers.start(config, handle) if scored else None, reference, rollouts)
                ),
            )
    return evaluation


def _anything_scores(config: RunConfig) -> bool:
    """False where the run's own reward model would score alone, there is none, and it is not the judge: SFT and DPO
    need none.
    """
    own = all(scorer.kind == "served" for scorer in config.scorers) and config.serve.model is None
    return not own or pairing(config).judge.startswith("scorer ") or (config.run_dir / "reward").exists()


async def _measure(
    scorers: RayScorers | None, reference: RayReference, rollouts: Sequence[Rollout]
) -> tuple[list[Score] | None, list[np.ndarray]]:
    """Both at once, as in the loop: their threads are allotted for that."""
    if scorers is None:
        return None, await _logprobs(reference, rollouts)
    return await asyncio.gather(_scores(scorers, rollouts), _logprobs(reference, rollouts))


async def _scores(scorers: RayScorers, rollouts: Sequence[Rollout]) -> list[Score]:
    places = asyncio.Semaphore(CONCURRENT_SCORES)

    async def score(rollout: Rollout) -> Score:
        async with places:
            return await scorers.score(ray.put(rollout))

    async with scorers.running():
        return list(await asyncio.gather(*(score(rollout) for rollout in rollouts)))


async def _logprobs(reference: RayReference, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
    await wait_ready(reference.ready_refs())
    refs = await asyncio.gather(*(reference.logprobs(ray.put(rollout)) for rollout in rollouts))
    return list(await asyncio.gather(*refs))

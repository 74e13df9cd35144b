"""Collect: sample candidates for comparison, several for each prompt, through the vLLM generators."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.actors.generator import RayGenerator, engine_options, sample
from rlhf_ray.cluster import Need, check_resources, connected, wait_ready
from rlhf_ray.config import RESOLVED_FILE, RunConfig, save_resolved
from rlhf_ray.data.prompts import sampling_seed
from rlhf_ray.stages.prepare import Prepared, prepare
from rlhf_ray.types import Prompt, Rollout

Progress = Callable[[int, int], None]
"""Called with (responses done, responses in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectReport:
    """What was sampled."""

    prompts: int
    completions: int
    tokens: int
    path: Path


def collect(config: RunConfig, progress: Progress | None = None) -> CollectReport:
    """Sample ``collect.completions`` responses for each training prompt into ``completions.jsonl``.

    Raises:
        InputError: a prompt, model or resource that cannot work, before anything is started.
    """
    prepared = prepare(config, config.prompts.path)
    config = prepared.config
    encoded = prepared.encode(config.prompts.path)[: config.collect.max_prompts]
    n = config.collect.completions
    save_resolved(config, config.run_dir / RESOLVED_FILE)
    (rollouts,) = sample_responses(prepared, [prepared.model_folder], encoded, n, progress=progress)
    path = config.run_dir / "completions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".jsonl.tmp")
    with partial.open("w", encoding="utf-8") as out:
        for i, (text, _) in enumerate(encoded):
            row = {"prompt": text, "prompt_index": i, "completions": [r.text for r in rollouts[i * n : (i + 1) * n]]}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(path)
    return CollectReport(
        prompts=len(encoded), completions=len(rollouts), tokens=sum(len(r.response_ids) for r in rollouts), path=path
    )


def sample_responses(
    prepared: Prepared,
    model_folders: Sequence[str],
    encoded: Sequence[tuple[str, tuple[int, ...]]],
    per_prompt: int,
    *,
    seed: int | None = None,
    progress: Progress | None = None,
) -> list[list[Rollout]]:
    """``per_prompt`` responses for each prompt under each model, grouped by prompt.

    Args:
        model_folders: of one architecture; the engines start with the first and load the weights of the next in place.
    """
    config = prepared.config
    seed = config.seed if seed is None else seed
    prompts = [
        Prompt(prompt_id=i * per_prompt + j, text=text, token_ids=ids, seed=sampling_seed(seed, i * per_prompt + j))
        for i, (text, ids) in enumerate(encoded)
        for j in range(per_prompt)
    ]
    section = config.generator
    options = engine_options(config, model_folders[0], context_length=prepared.context_length)
    with connected():
        check_resources(
            [Need(section="generator", count=section.count, num_cpus=section.num_cpus, num_gpus=section.num_gpus)]
        )
        return asyncio.run(_sample(config, options, model_folders, prompts, progress))


async def _sample(
    config: RunConfig,
    options: dict[str, object],
    model_folders: Sequence[str],
    prompts: Sequence[Prompt],
    progress: Progress | None,
) -> list[list[Rollout]]:
    # Nothing else computes during this stage: the engines take every core, whatever they leave to others in the loop.
    generators = [
        RayGenerator.start(f"generator-{i}", config, options, threads=0) for i in range(config.generator.count)
    ]
    try:
        await wait_ready({g.name: g.ready() for g in generators})
        rollouts = []
        for version, folder in enumerate(model_folders):
            if version > 0:
                await asyncio.gather(*(g.load_policy(folder, version) for g in generators))
            rollouts.append(await sample(generators, prompts, _counted(progress, version, len(model_folders))))
        return rollouts
    finally:
        await asyncio.gather(*(g.close() for g in generators))


def _counted(progress: Progress | None, before: int, rounds: int) -> Callable[[int, int], None]:
    """Progress over all rounds, told of one of them."""

    def tell(done: int, of: int) -> None:
        if progress is not None:
            progress(before * of + done, rounds * of)

    return tell

"""The generator actor's plain class around an engine that the test scripts."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.actors.generator import GeneratorWorker
from rlhf_ray.errors import ConfigError, PromptError, WorkerDiedError
from rlhf_ray.types import Probe, Prompt, Rollout


class ScriptedEngine:
    """One token a step for every prompt, two tokens each; token ids are the version that sampled them."""

    def __init__(self, *, fail: str = "", nan_for: int | None = None) -> None:
        if fail == "start":
            raise ValueError("no room for the cache")
        self.fail = fail
        self.nan_for = nan_for
        self.version = 0
        self.running: dict[int, tuple[Prompt, list[int]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def submit(self, prompt: Prompt) -> None:
        self.running[prompt.prompt_id] = (prompt, [])

    def step(self) -> list[Rollout]:
        if self.fail == "step" and self.running:
            raise RuntimeError("device lost")
        done = []
        for prompt, tokens in list(self.running.values()):
            tokens.append(self.version)
            if len(tokens) == 2:
                del self.running[prompt.prompt_id]
                done.append(
                    Rollout(
                        prompt=prompt,
                        response_ids=tuple(tokens),
                        rollout_logprobs=(-1.0, math.nan if prompt.prompt_id == self.nan_for else -2.0),
                        policy_versions=tuple(tokens),
                        finish_reason="length",
                        text="",
                    )
                )
        return done

    def load_weights(self, weights: Any, version: int) -> None:
        self.version = version

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return [-0.5] * (len(token_ids) - 1)

    def shutdown(self) -> None:
        self.running.clear()


@pytest.fixture(autouse=True)
def engine_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands where the worker looks for vLLM's role, so that nothing imports vLLM."""
    module = ModuleType("rlhf_ray.roles.vllm_generator")
    module.VLLMGenerator = ScriptedEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlhf_ray.roles.vllm_generator", module)


def a_prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, text="", token_ids=(1,), seed=0)


async def test_concurrent_prompts_each_get_their_own_rollout_and_receipt() -> None:
    worker = GeneratorWorker("generator-0", {})
    answers = await asyncio.gather(*(worker.generate(a_prompt(i)) for i in range(5)))
    assert [rollout.prompt.prompt_id for _, rollout in answers] == list(range(5))
    assert {(r.generator, r.response_tokens, r.truncated) for (r,), _ in answers} == {("generator-0", 2, True)}
    await worker.close()


async def test_a_group_is_sampled_under_ids_and_seeds_of_their_own_and_comes_back_as_the_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submitted: list[Prompt] = []
    submit = ScriptedEngine.submit
    monkeypatch.setattr(ScriptedEngine, "submit", lambda self, prompt: (submitted.append(prompt), submit(self, prompt)))
    worker = GeneratorWorker("generator-0", {})
    group = replace(a_prompt(4), seed=77, completions=3)
    (receipts, *rollouts), _ = await asyncio.gather(
        worker.generate(group), worker.generate(replace(group, prompt_id=5))
    )
    assert sorted(prompt.prompt_id for prompt in submitted) == [12, 13, 14, 15, 16, 17]
    seeds = [prompt.seed for prompt in submitted[:3]]
    assert seeds[0] == 77
    assert len(set(seeds)) == 3
    assert [rollout.prompt for rollout in rollouts] == [group] * 3
    assert [receipt.prompt_id for receipt in receipts] == [4] * 3
    await worker.close()


async def test_new_weights_mark_the_tokens_that_follow_and_the_probe_tells_the_gap() -> None:
    worker = GeneratorWorker("generator-0", {})
    packed = {"arrays": {}, "bfloat16": [], "aliases": {}}
    ack = await worker.update_weights(3, packed, Probe(token_ids=(1, 2, 3), logprobs=(-0.5, -0.25)))
    assert (ack.version, ack.parity_max) == (3, 0.25)
    (receipt,), rollout = await worker.generate(a_prompt(0))
    assert rollout.policy_versions == (3, 3)
    assert (receipt.oldest_version, receipt.newest_version) == (3, 3)
    await worker.close()


async def test_an_engine_that_fails_at_work_counts_as_a_death_for_everyone_who_waits() -> None:
    worker = GeneratorWorker("generator-0", {"fail": "step"})
    waiting = await asyncio.gather(*(worker.generate(a_prompt(i)) for i in range(3)), return_exceptions=True)
    assert [type(error) for error in waiting] == [WorkerDiedError] * 3
    assert "device lost" in str(waiting[0])
    with pytest.raises(WorkerDiedError):
        await worker.generate(a_prompt(9))


async def test_a_response_whose_log_probabilities_are_no_numbers_is_refused_and_the_others_are_handed_out() -> None:
    worker = GeneratorWorker("generator-0", {"nan_for": 7})  # the second of prompt 3's two responses
    pairs = [replace(a_prompt(i), completions=2) for i in range(5)]
    answers = await asyncio.gather(*(worker.generate(prompt) for prompt in pairs), return_exceptions=True)
    assert [isinstance(answer, PromptError) for answer in answers] == [False, False, False, True, False]
    assert "generator-0 gave NaN or infinity as a log-probability for prompt 3" in str(answers[3])
    await worker.close()


async def test_an_engine_that_cannot_start_names_the_knobs() -> None:
    worker = GeneratorWorker("generator-0", {"fail": "start"})
    with pytest.raises(ConfigError, match=r"no room for the cache.*generator\.kv_cache_gb"):
        await worker.ready()


async def test_nobody_waits_for_a_closed_engine() -> None:
    worker = GeneratorWorker("generator-0", {})
    await worker.ready()
    await worker.close()
    with pytest.raises(WorkerDiedError, match="was closed"):
        await worker.ready()

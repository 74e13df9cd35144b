"""The reference's numbers are a frozen model's own, whatever shares its forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.types import Prompt, Rollout

LENGTHS = ((3, 9), (40, 2), (1, 1), (12, 30), (5, 5))


def rollout(prompt_id: int, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, text="", token_ids=tuple(prompt_ids), seed=0),
        response_ids=tuple(response_ids),
        rollout_logprobs=(0.0,) * len(response_ids),
        policy_versions=(0,) * len(response_ids),
        finish_reason="length",
        text="",
    )


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    ids = [[rng.integers(3, 300, length).tolist() for length in lengths] for lengths in LENGTHS]
    return [rollout(i, prompt_ids, response_ids) for i, (prompt_ids, response_ids) in enumerate(ids)]


@pytest.mark.parametrize("max_batch_tokens", [1, 60, 4096])
def test_logprobs_are_those_of_the_full_logits_in_the_order_asked(
    tiny_model_dir: Path, rollouts: list[Rollout], max_batch_tokens: int
) -> None:
    reference = ReferenceModel(
        tiny_model_dir, precision="float32", temperature=1.3, max_batch_tokens=max_batch_tokens, threads=1
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for asked, answered in zip(rollouts, reference.logprobs(rollouts), strict=True):
        ids = torch.tensor([asked.prompt.token_ids + asked.response_ids])
        with torch.inference_mode():
            full = torch.log_softmax(model(input_ids=ids).logits[0] / 1.3, dim=-1)
        expected = full[:-1].gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)[len(asked.prompt.token_ids) - 1 :]
        assert answered.dtype == np.float32
        assert answered == pytest.approx(expected.numpy(), abs=1e-4)


def test_no_rollouts_give_no_answers(tiny_model_dir: Path) -> None:
    assert ReferenceModel(tiny_model_dir, precision="float32", threads=1).logprobs([]) == []

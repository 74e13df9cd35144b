"""The reference actor's plain class around a model that the test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf_ray.actors.reference import ReferenceWorker
from rlhf_ray.errors import PromptError
from rlhf_ray.types import Prompt, Rollout


class ScriptedModel:
    """-0.5 nats for each token; of prompt 2's the last is no number."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        arrays = [np.full(len(rollout.response_ids), -0.5, np.float32) for rollout in rollouts]
        for rollout, array in zip(rollouts, arrays, strict=True):
            if rollout.prompt.prompt_id == 2:
                array[-1] = np.nan
        return arrays


def a_rollout(prompt_id: int) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, text="The train", token_ids=(1,), seed=0),
        response_ids=(5, 6, 7),
        rollout_logprobs=(-1.0, -1.0, -1.0),
        policy_versions=(0, 0, 0),
        finish_reason="length",
        text="",
    )


async def test_a_response_without_log_probabilities_is_refused_and_its_company_is_read() -> None:
    worker = ReferenceWorker({})
    worker._model = ScriptedModel()  # type: ignore[assignment]
    answers = await asyncio.gather(*(worker.logprobs(a_rollout(i)) for i in range(4)), return_exceptions=True)
    for i in (0, 1, 3):
        done, logprobs = answers[i]  # type: ignore[misc]
        assert done
        assert logprobs.tolist() == [-0.5] * 3
    with pytest.raises(PromptError, match=r"for a response to prompt 2 \('The train'\).*reference\.precision"):
        raise answers[2]  # type: ignore[misc]

"""What waits for the learner goes to disk and comes back to the last bit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.checkpoint import TENSORS_FILE
from rlhf_ray.errors import InputError
from rlhf_ray.roles.scored_prompts import read_responses, read_scored, save_scored, without_refs
from rlhf_ray.types import ExperienceRefs, Prompt, Rollout, RolloutReceipt, Score, ScoredPrompt

ROLLOUTS = [
    Rollout(
        prompt=Prompt(prompt_id=7, text="Zug \u2028 ü", token_ids=(504, 5681), seed=2**31 - 1, completions=2),
        response_ids=(3, 1, 2),
        rollout_logprobs=(-0.1, -1 / 3, -math.inf),
        policy_versions=(4, 4, 5),
        finish_reason="stop",
        text="late 🚀",
    ),
    Rollout(
        prompt=Prompt(prompt_id=7, text="", token_ids=(), seed=0, completions=2),
        response_ids=(9,),
        rollout_logprobs=(-1e-300,),
        policy_versions=(4,),
        finish_reason="length",
        text="",
    ),
]
REFERENCES = [np.array([-0.25, 1e-45, np.finfo(np.float32).min], np.float32), None]


def scored_prompt(prompt_id: int, references: list[np.ndarray | None], *, admitted: int) -> ScoredPrompt:
    """A prompt with one experience for each of ``references``."""
    return ScoredPrompt(
        prompt_id=prompt_id,
        admitted=admitted,
        experiences=tuple(
            ExperienceRefs(
                receipt=RolloutReceipt(
                    prompt_id=prompt_id,
                    generator="generator-0",
                    oldest_version=4,
                    newest_version=5,
                    response_tokens=3,
                    truncated=False,
                    seconds=0.1 + 0.2,
                ),
                score=Score(value=1 / 3, raw=0.1, reward_version="reward@12", parts={"length": -0.7}),
                rollout=object(),
                ref_logprobs=None if reference is None else object(),
            )
            for reference in references
        ),
    )


def test_prompts_receipts_scores_and_responses_come_back_exactly(tmp_path: Path) -> None:
    prompts = [scored_prompt(7, REFERENCES, admitted=4)]
    save_scored(tmp_path / "scored", prompts, ROLLOUTS, REFERENCES)
    rollouts, references = read_responses(tmp_path / "scored")
    assert rollouts == ROLLOUTS
    assert references[1] is None
    assert references[0] is not None
    assert references[0].dtype == np.float32
    assert references[0].tobytes() == REFERENCES[0].tobytes()
    (again,) = read_scored(tmp_path / "scored")
    assert without_refs(again) == without_refs(prompts[0])
    assert [e.ref_logprobs is None for e in again.experiences] == [False, True]


def test_nan_is_kept_where_a_sampler_gave_it(tmp_path: Path) -> None:
    nan = Rollout(
        **{name: getattr(ROLLOUTS[1], name) for name in Rollout.__slots__} | {"rollout_logprobs": (math.nan,)}
    )
    save_scored(tmp_path / "scored", [scored_prompt(7, [None], admitted=0)], [nan], [None])
    ((rollout,), _) = read_responses(tmp_path / "scored")
    assert math.isnan(rollout.rollout_logprobs[0])


def test_nothing_is_something_too(tmp_path: Path) -> None:
    save_scored(tmp_path / "scored", [], [], [])
    assert read_scored(tmp_path / "scored") == []
    assert read_responses(tmp_path / "scored") == ([], [])


def test_damage_is_noticed(tmp_path: Path) -> None:
    save_scored(tmp_path / "scored", [scored_prompt(7, REFERENCES, admitted=4)], ROLLOUTS, REFERENCES)
    path = tmp_path / "scored" / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tensors\.safetensors is missing or damaged"):
        read_responses(tmp_path / "scored")

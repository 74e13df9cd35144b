"""Scored prompts on disk: what waits for the learner in a checkpoint, to the last bit.

    scored/     state.json (prompts, receipts, scores), tensors.safetensors (what is said of each token), COMPLETE

The tensors hold the tokens of all responses, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ray.checkpoint import load_checkpoint, load_state, save_checkpoint
from rlhf_ray.types import ExperienceRefs, Prompt, Rollout, RolloutReceipt, Score, ScoredPrompt


def save_scored(
    folder: Path,
    prompts: Sequence[ScoredPrompt],
    rollouts: Sequence[Rollout],
    ref_logprobs: Sequence[np.ndarray | None],
) -> None:
    """Write scored prompts.

    Args:
        prompts: their refs are not looked at.
        rollouts: of all their experiences, in order.
        ref_logprobs: of each of these.

    Raises:
        CheckpointError: the disk is full, or fails.
    """
    rows = [
        {
            "prompt_id": prompt.prompt_id,
            "admitted": prompt.admitted,
            "experiences": [{"receipt": asdict(e.receipt), "score": asdict(e.score)} for e in prompt.experiences],
        }
        for prompt in prompts
    ]
    responses = [
        {
            "prompt": asdict(rollout.prompt),
            "finish_reason": rollout.finish_reason,
            "text": rollout.text,
            "tokens": len(rollout.response_ids),
            "has_ref_logprobs": ref is not None,
        }
        for rollout, ref in zip(rollouts, ref_logprobs, strict=True)
    ]
    tensors = {
        "response_ids": torch.tensor([i for r in rollouts for i in r.response_ids], dtype=torch.int64),
        "rollout_logprobs": torch.tensor([p for r in rollouts for p in r.rollout_logprobs], dtype=torch.float64),
        "policy_versions": torch.tensor([v for r in rollouts for v in r.policy_versions], dtype=torch.int64),
        "ref_logprobs": torch.tensor(
            np.concatenate([np.zeros(0, np.float32), *(r for r in ref_logprobs if r is not None)])
        ),
    }
    save_checkpoint(folder, tensors=tensors, state={"prompts": rows, "responses": responses})


def read_scored(folder: Path) -> list[ScoredPrompt]:
    """The prompts of a checkpoint that has been checked, without their responses: of each ref only that it is there
    (True), or None.
    """
    state = load_state(folder)
    responses = iter(state["responses"])
    return [
        ScoredPrompt(
            prompt_id=row["prompt_id"],
            admitted=row["admitted"],
            experiences=tuple(
                ExperienceRefs(
                    receipt=RolloutReceipt(**e["receipt"]),
                    score=Score(**e["score"]),
                    rollout=True,
                    ref_logprobs=True if next(responses)["has_ref_logprobs"] else None,
                )
                for e in row["experiences"]
            ),
        )
        for row in state["prompts"]
    ]


def read_responses(folder: Path) -> tuple[list[Rollout], list[np.ndarray | None]]:
    """The rollouts and reference log-probabilities that ``save_scored`` was given.

    Raises:
        InputError: a file is missing or damaged.
    """
    tensors, state = load_checkpoint(folder)
    tokens = torch.tensor([response["tokens"] for response in state["responses"]], dtype=torch.int64)
    of_refs = tokens[[response["has_ref_logprobs"] for response in state["responses"]]]
    ids, logprobs, versions = (
        tensors[name].split(tokens.tolist()) for name in ("response_ids", "rollout_logprobs", "policy_versions")
    )
    refs = iter(tensors["ref_logprobs"].split(of_refs.tolist()))
    rollouts = [
        Rollout(
            prompt=_prompt(response["prompt"]),
            response_ids=tuple(ids[i].tolist()),
            rollout_logprobs=tuple(logprobs[i].tolist()),
            policy_versions=tuple(versions[i].tolist()),
            finish_reason=response["finish_reason"],
            text=response["text"],
        )
        for i, response in enumerate(state["responses"])
    ]
    return rollouts, [next(refs).numpy().copy() if r["has_ref_logprobs"] else None for r in state["responses"]]


def without_refs(prompt: ScoredPrompt) -> ScoredPrompt:
    """What ``save_scored`` needs of a prompt beside its responses."""
    return replace(prompt, experiences=tuple(replace(e, rollout=None, ref_logprobs=None) for e in prompt.experiences))


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(**{**row, "token_ids": tuple(row["token_ids"])})

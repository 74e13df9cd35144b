"""Experiences → tensors, and how to cut a batch into pieces that fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.types import Batch, Experience


def collate(experiences: Sequence[Experience], *, version: int, pad_id: int) -> Batch:
    """Stack B experiences, padded on the right to the longest.

    Args:
        experiences: in the order that the rows will have.
        version: the learner's version, which staleness is counted from.
        pad_id: token id that fills ``input_ids``.

    Raises:
        ValueError: no experiences, an empty prompt or response, per-token fields of differing lengths, or a rollout
            sampled by a version that the learner has not reached.
    """
    if not experiences:
        raise ValueError("a batch needs at least one experience")
    for experience in experiences:
        _check(experience, version)
    rollouts = [experience.rollout for experience in experiences]
    prompt_lens = [len(rollout.prompt.token_ids) for rollout in rollouts]
    tokens = [rollout.prompt.token_ids + rollout.response_ids for rollout in rollouts]
    return Batch(
        input_ids=_pad(tokens, pad_id, torch.int64),
        attention_mask=_pad([[1] * len(row) for row in tokens], 0, torch.int64),
        prompt_len=torch.tensor(prompt_lens, dtype=torch.int64),
        response_ids=_pad([rollout.response_ids for rollout in rollouts], 0, torch.int64),
        response_mask=_pad([[True] * len(rollout.response_ids) for rollout in rollouts], False, torch.bool),
        rollout_logprobs=_pad([rollout.rollout_logprobs for rollout in rollouts], 0.0, torch.float32),
        ref_logprobs=_pad(
            [[] if e.ref_logprobs is None else e.ref_logprobs.tolist() for e in experiences],
            0.0,
            torch.float32,
            longest=max(len(rollout.response_ids) for rollout in rollouts),
        ),
        scores=torch.tensor([experience.score for experience in experiences], dtype=torch.float32),
        truncated=torch.tensor([rollout.finish_reason == "length" for rollout in rollouts], dtype=torch.bool),
        staleness=torch.tensor([version - min(rollout.policy_versions) for rollout in rollouts], dtype=torch.int64),
        prompt_ids=tuple(rollout.prompt.prompt_id for rollout in rollouts),
    )


def micro_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group sequences of like length so that each group, padded to its longest, holds at most ``max_tokens`` tokens.

    Longest first, so that memory that will not do shows in the first forward. A sequence longer than ``max_tokens``
    stands alone. Every index appears exactly once; ties keep their order.

    Args:
        lengths: tokens of each sequence, prompt and response together.
        max_tokens: most padded tokens (sequences × longest) in a group.

    Raises:
        ValueError: a length or ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens} leaves no room for a token; set it to 1 or more")
    if any(length < 1 for length in lengths):
        raise ValueError(f"a sequence of {min(lengths)} tokens cannot be trained on")
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def micro_batches_of_ranks(lengths: Sequence[int], *, max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Of each rank, its groups as ``micro_batches`` makes them: every index appears exactly once, over all ranks.

    Ranks get equally many sequences of like lengths, and equally many groups: they compute in step, so one that had
    fewer would wait for another's last.

    Raises:
        ValueError: the sequences do not divide by ``ranks``, or as for ``micro_batches``.
    """
    if len(lengths) % ranks:
        raise ValueError(f"{len(lengths)} sequences cannot be shared evenly by {ranks} ranks")
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # There and back again: 0 1 2, 2 1 0, 0 1 2, …
    rounds = [longest_first[start : start + ranks] for start in range(0, len(lengths), ranks)]
    dealt = list(zip(*(turn[:: 1 if n % 2 == 0 else -1] for n, turn in enumerate(rounds)), strict=True))
    groups = [
        [[rows[i] for i in group] for group in micro_batches([lengths[row] for row in rows], max_tokens=max_tokens)]
        for rows in dealt
    ]
    most = max(map(len, groups))
    for of_rank in groups:
        while len(of_rank) < most:
            largest = max(range(len(of_rank)), key=lambda i: len(of_rank[i]))
            half = len(of_rank[largest]) // 2
            of_rank[largest : largest + 1] = [of_rank[largest][:half], of_rank[largest][half:]]
    return groups


def select(batch: Batch, indices: Sequence[int]) -> Batch:
    """The rows ``indices`` of ``batch``, in that order, trimmed to the longest of them.

    Raises:
        ValueError: no indices.
        IndexError: an index that ``batch`` does not have.
    """
    if not indices:
        raise ValueError("select needs at least one row")
    rows = torch.tensor(indices, dtype=torch.int64, device=batch.input_ids.device)
    length = _last_column(batch.attention_mask[rows].bool())
    response = _last_column(batch.response_mask[rows])
    return Batch(
        input_ids=batch.input_ids[rows, :length],
        attention_mask=batch.attention_mask[rows, :length],
        prompt_len=batch.prompt_len[rows],
        response_ids=batch.response_ids[rows, :response],
        response_mask=batch.response_mask[rows, :response],
        rollout_logprobs=batch.rollout_logprobs[rows, :response],
        ref_logprobs=batch.ref_logprobs[rows, :response],
        scores=batch.scores[rows],
        truncated=batch.truncated[rows],
        staleness=batch.staleness[rows],
        prompt_ids=tuple(batch.prompt_ids[index] for index in indices),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on ``device``."""
    tensors = (field.name for field in fields(batch) if isinstance(getattr(batch, field.name), Tensor))
    moved: dict[str, Any] = {name: getattr(batch, name).to(device) for name in tensors}
    return replace(batch, **moved)


def _check(experience: Experience, version: int) -> None:
    rollout = experience.rollout
    name = f"the rollout of prompt {rollout.prompt.prompt_id}"
    if not rollout.prompt.token_ids:
        raise ValueError(f"{name} has no prompt tokens, so nothing predicts its first response token")
    if not rollout.response_ids:
        raise ValueError(f"{name} has an empty response, which cannot be trained on")
    reference = experience.ref_logprobs
    if reference is not None and reference.ndim != 1:
        raise ValueError(f"ref_logprobs of {name} have shape {reference.shape}; one per token is needed")
    lengths = {
        "response_ids": len(rollout.response_ids),
        "rollout_logprobs": len(rollout.rollout_logprobs),
        "policy_versions": len(rollout.policy_versions),
    } | ({} if reference is None else {"ref_logprobs": len(reference)})
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise ValueError(f"per-token fields of {name} differ in length: {listing}")
    newest = max(rollout.policy_versions)
    if newest > version:
        raise ValueError(f"{name} was sampled by version {newest}, but the learner is only at version {version}")


def _pad(
    rows: Sequence[Sequence[int] | Sequence[float]], fill: float, dtype: torch.dtype, longest: int | None = None
) -> Tensor:
    longest = max(len(row) for row in rows) if longest is None else longest
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=dtype)


def _last_column(mask: Tensor) -> int:
    """Columns up to the last one that any row uses."""
    return int(mask.any(dim=0).nonzero().max()) + 1

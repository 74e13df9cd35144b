"""The nouns. Prompt → Rollout → Experience → Batch.

Shapes: B sequences, L tokens of prompt and response together (padded right), T response tokens, V vocabulary.
All are frozen: a stage hands on a new value and never edits one it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

Ref = Any
"""A handle on a value elsewhere (a Ray ``ObjectRef``; with the fakes, the value itself). The driver never opens it."""

Weights = Mapping[str, torch.Tensor]
"""Hugging Face parameter names → CPU tensors; ``lm_head.weight`` is always present, tied or not."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue.

    Example: ``Turn("user", "Is the train late?")``
    """

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question to the policy.

    Example: ``Prompt(prompt_id=7, text="The train", token_ids=(504, 5681), seed=1234567)``
    """

    prompt_id: int
    """Ordinal in the prompt stream: unique in a run, the same after a resume."""
    text: str
    """As the person wrote it, before a chat template."""
    token_ids: tuple[int, ...]
    """What the generator is given (template applied)."""
    seed: int
    """Sampling seed, derived from the run's seed and ``prompt_id``."""
    completions: int = 1
    """Responses wanted: more than one where an advantage is measured against the others of the group."""

    def named(self) -> str:
        """For messages: its id and how it begins."""
        return f"{self.prompt_id} ({self.text[:60]!r})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response of T tokens, with what the sampler knew of it."""

    prompt: Prompt
    response_ids: tuple[int, ...]
    """T token ids; the EOS token is included when ``finish_reason`` is "stop"."""
    rollout_logprobs: tuple[float, ...]
    """T log-probabilities in nats, at the sampling temperature."""
    policy_versions: tuple[int, ...]
    """T versions: the policy that sampled each token."""
    finish_reason: FinishReason
    text: str
    """The decoded response, special tokens left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutReceipt:
    """What the driver may know of a rollout without opening it."""

    prompt_id: int
    generator: str
    oldest_version: int
    newest_version: int
    response_tokens: int
    truncated: bool
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward model's verdict on one response, or the weighted sum of several scorers'."""

    value: float
    """Normalised: (raw − mean) / std over the reference completions stored with the reward model."""
    raw: float
    reward_version: str
    """Name and content hash of the model that gave it; of a function its name."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of a sum: each named scorer's value, before its weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperienceRefs:
    """An experience as the driver holds it: numbers it needs, handles on the rest."""

    receipt: RolloutReceipt
    score: Score
    rollout: Ref
    ref_logprobs: Ref | None
    """None where the learner is the reference too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPrompt:
    """A prompt whose responses are all scored and wait for the learner."""

    prompt_id: int
    admitted: int
    """Version of the generator when it was given the prompt."""
    experiences: tuple[ExperienceRefs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """A scored rollout with the reference's log-probabilities: what the learner trains on."""

    rollout: Rollout
    score: float
    ref_logprobs: np.ndarray | None
    """[T] float32, nats, at the sampling temperature; None where the learner is to find them out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B experiences as tensors. Row i's response token t is predicted at ``input_ids[i, prompt_len[i] + t - 1]``."""

    input_ids: torch.Tensor
    """[B, L] int64: prompt, response, right padding."""
    attention_mask: torch.Tensor
    """[B, L] int64, 1 on real tokens."""
    prompt_len: torch.Tensor
    """[B] int64"""
    response_ids: torch.Tensor
    """[B, T] int64, 0 where masked."""
    response_mask: torch.Tensor
    """[B, T] bool, True on response tokens."""
    rollout_logprobs: torch.Tensor
    """[B, T] float32, 0 where masked."""
    ref_logprobs: torch.Tensor
    """[B, T] float32, 0 where masked and where nobody has said."""
    scores: torch.Tensor
    """[B] float32"""
    truncated: torch.Tensor
    """[B] bool, True where the response ended without EOS."""
    staleness: torch.Tensor
    """[B] int64: learner version − oldest token's version."""
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A token sequence and the learner's log-probabilities of it: what a generator must reproduce after a sync."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of ``token_ids[1:]``, nats, at the sampling temperature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionedWeights:
    """A published policy."""

    version: int
    weights: Ref
    """Handle on ``Weights``."""
    probe: Probe


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightAck:
    """A generator's word that it serves ``version``."""

    generator: str
    version: int
    seconds: float
    """From the call's arrival in the generator to the last parameter in place."""
    parity_max: float
    """Largest |generator − learner| over the probe's log-probabilities, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one learner step tells the pipeline."""

    version: int
    """The version that the step produced."""
    metrics: Mapping[str, float]
    samples: tuple[Mapping[str, Any], ...] = field(default=())
    """Rows for ``samples.jsonl``, of the first experiences of the batch: prompt_id, prompt, response, score, kl."""

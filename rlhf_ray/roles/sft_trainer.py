"""Supervised fine-tuning of a policy with TRL's SFTTrainer, on token ids that were made beforehand.

TRL is given ``input_ids`` and ``labels``: the prompt's labels say that nothing is learnt from them. The loss is the
mean negative log-probability of the batch's response tokens, EOS among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer

from rlhf_ray.config import SFTConfig
from rlhf_ray.data.demonstrations import TokenDemonstration
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.roles.trl_training import Fitted, InOrder, Progress, Training, merge_lora, policy_lora, quiet_training

_NOT_LEARNT = -100
"""What torch's and TRL's losses pass over."""


class _Trainer(InOrder, SFTTrainer):
    pass


def fit_sft(
    model: Any,
    tokenizer: Any,
    demonstrations: Sequence[TokenDemonstration],
    section: SFTConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
    checkpoints: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Fitted:
    """Train ``model`` in place; LoRA's matrices are merged into it at the end.

    ``Progress``'s accuracy is the share of response tokens that the policy held for the likeliest.

    Args:
        model: a causal language model, float32.
        dtype: bfloat16 turns autocast on; the weights stay float32.
        scratch: an empty folder that is thrown away afterwards, the same one for all workers.
        checkpoints: where checkpoints are written, on the disk of ``scratch``; training goes on from the newest whole
            one that is there.
        identity: written into each of them.

    Raises:
        NumericalError: the loss is no longer a number.
    """
    training = Training(
        section,
        [len(demonstration.token_ids) for demonstration in demonstrations],
        model="the policy",
        accuracy="mean_token_accuracy",
        seed=seed,
        device=device,
        dtype=dtype,
        scratch=scratch,
        checkpoints=checkpoints,
        identity=identity,
        on_progress=on_progress,
    )
    with quiet_training():
        trainer = _Trainer(
            order=training.order,
            model=model,
            args=training.arguments(TRLSFTConfig),
            train_dataset=_dataset(demonstrations),
            processing_class=tokenizer,
            callbacks=training.callbacks,
            peft_config=policy_lora(section),
        )
        fitted = training.run(trainer)
    merge_lora(trainer.model)
    return fitted


def response_loss(model: ReferenceModel, demonstrations: Sequence[TokenDemonstration]) -> float:
    """Mean negative log-probability of all response tokens, EOS among them; nats a token."""
    logprobs = model.response_logprobs(
        [(d.token_ids[: d.prompt_tokens], d.token_ids[d.prompt_tokens :]) for d in demonstrations]
    )
    return -sum(float(row.sum()) for row in logprobs) / sum(len(row) for row in logprobs)


def _dataset(demonstrations: Sequence[TokenDemonstration]) -> Any:
    return datasets.Dataset.from_dict(
        {
            "input_ids": [d.token_ids for d in demonstrations],
            "labels": [[_NOT_LEARNT] * d.prompt_tokens + d.token_ids[d.prompt_tokens :] for d in demonstrations],
        }
    )

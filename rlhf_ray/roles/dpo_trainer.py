"""Direct preference optimisation of a policy with TRL's DPOTrainer, on token ids that were made beforehand.

    start ──► log-probabilities of every pair ──► training ──► policy
                      the reference's                           │
                            └──► implicit rewards ◄─────────────┘

The reference is the model that training starts from. It reads every pair once, before training, so that one model is in
memory at a time. The loss is the reward model's (``algorithms/preference_loss.py``) on implicit rewards: TRL's knows
only certain answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl import DPOConfig as TRLDPOConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.config import DPOConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.roles.trl_training import Fitted, InOrder, Progress, Training, merge_lora, policy_lora, quiet_training

PairLogprobs = tuple[float, float]
"""Of the chosen and the rejected response, EOS included, nats."""

_TARGETS = ("probability", "weight", "margin")
"""Columns of the data set that the loss needs and the model must not see."""

_PAIRS_AT_ONCE = 64
_NOTICE_SECONDS = 10.0


class _Collator(DataCollatorForPreference):
    """Pads as TRL does, and keeps what our loss needs besides."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in _TARGETS:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class _Trainer(InOrder, DPOTrainer):
    """TRL's trainer, with its metrics, under the loss for uncertain and weighted answers."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets = {name: inputs.pop(name) for name in _TARGETS}
        outputs: list[Any] = []

        def overheard(**options: Any) -> Any:
            outputs.append(model(**options))
            return outputs[-1]

        super().compute_loss(overheard, inputs)
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        chosen, rejected = (self.beta * (outputs[0].log_probs.float().sum(dim=1) - reference)).chunk(2)
        return bradley_terry_loss(chosen, rejected, **targets)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """It has its token ids."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """It has the reference's log-probabilities."""
        return dataset


def fit_dpo(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenPair],
    reference: Sequence[PairLogprobs],
    section: DPOConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
    checkpoints: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Fitted:
    """Train ``model`` in place (Rafailov et al. 2023); LoRA's matrices are merged into it at the end.

    A pair's loss is −p log σ(z) − (1 − p) log σ(−z), z = β · (log-ratio of the chosen − log-ratio of the rejected
    response) − margin, and p the probability that the chosen one is preferred, smoothed by ``dpo.label_smoothing``
    (Mitchell 2023, "conservative DPO"). ``Progress``'s accuracy is the share of pairs with z + margin above 0.

    Args:
        model: a causal language model, float32: the one that ``reference`` is of.
        reference: log-probabilities of each pair under it.
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
        [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs],
        model="the policy",
        accuracy="rewards/accuracies",
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
            args=training.arguments(
                TRLDPOConfig,
                beta=section.beta,
                precompute_ref_log_probs=True,
                remove_unused_columns=False,  # the loss needs columns that the model does not
            ),
            train_dataset=_dataset(pairs, reference, label_smoothing=section.label_smoothing),
            processing_class=tokenizer,
            data_collator=_Collator(pad_token_id=tokenizer.pad_token_id),
            callbacks=training.callbacks,
            peft_config=policy_lora(section),
        )
        fitted = training.run(trainer)
    merge_lora(trainer.model)
    return fitted


def pair_logprobs(
    model: ReferenceModel, pairs: Sequence[TokenPair], on_progress: Progress | None = None
) -> list[PairLogprobs]:
    """Log-probabilities of the responses of each pair.

    Args:
        on_progress: called every few seconds with pairs_read and pairs.
    """
    found: list[PairLogprobs] = []
    told = time.monotonic()
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        both = model.response_logprobs(
            [
                (ids[: pair.prompt_tokens], ids[pair.prompt_tokens :])
                for pair in part
                for ids in (pair.chosen_ids, pair.rejected_ids)
            ]
        )
        sums = [float(row.sum(dtype="float64")) for row in both]
        found += zip(sums[::2], sums[1::2], strict=True)
        if on_progress is not None and time.monotonic() - told > _NOTICE_SECONDS:
            told = time.monotonic()
            on_progress({"pairs_read": float(len(found)), "pairs": float(len(pairs))})
    return found


def shared_pair_logprobs(
    model: ReferenceModel, pairs: Sequence[TokenPair], on_progress: Progress | None = None
) -> list[PairLogprobs]:
    """As ``pair_logprobs``; where the process is one of several of a ``torch.distributed`` group, each reads a share
    and all get the whole.
    """
    if not torch.distributed.is_initialized():
        return pair_logprobs(model, pairs, on_progress)
    rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares: list[list[PairLogprobs]] = [[] for _ in range(workers)]
    torch.distributed.all_gather_object(shares, pair_logprobs(model, pairs[rank::workers], on_progress))
    return [shares[i % workers][i // workers] for i in range(len(pairs))]


def implicit_rewards(
    policy: Sequence[PairLogprobs], reference: Sequence[PairLogprobs], *, beta: float
) -> list[tuple[float, float]]:
    """(chosen, rejected) of each pair: β · (log-probability under the policy − under the reference)."""
    return [
        (beta * (chosen - before_chosen), beta * (rejected - before_rejected))
        for (chosen, rejected), (before_chosen, before_rejected) in zip(policy, reference, strict=True)
    ]


def _dataset(pairs: Sequence[TokenPair], reference: Sequence[PairLogprobs], *, label_smoothing: float) -> Any:
    mean_weight = math.fsum(pair.weight for pair in pairs) / len(pairs)
    ref_chosen, ref_rejected = zip(*reference, strict=True)
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": [pair.chosen_ids[: pair.prompt_tokens] for pair in pairs],
            "chosen_ids": [pair.chosen_ids[pair.prompt_tokens :] for pair in pairs],
            "rejected_ids": [pair.rejected_ids[pair.prompt_tokens :] for pair in pairs],
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
            "probability": [_smoothed(pair.probability, label_smoothing) for pair in pairs],
            "weight": [pair.weight / mean_weight for pair in pairs],
            "margin": [float(pair.margin) for pair in pairs],
        }
    )


def _smoothed(probability: float, share: float) -> float:
    """P(the chosen one is preferred) where so large a share of the answers is the wrong way round."""
    return probability * (1 - share) + (1 - probability) * share

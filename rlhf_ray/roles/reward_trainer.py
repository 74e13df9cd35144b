"""Bradley–Terry training of a reward model with TRL's RewardTrainer, on token ids that were made beforehand.

TRL is given ``chosen_ids`` and ``rejected_ids``. The loss is ours (``algorithms/preference_loss.py``): TRL's knows only
certain answers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.config import RewardConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.reward import padding_token
from rlhf_ray.roles.trainer_checkpoints import BEST_FILE, KeepBest, validation_losses
from rlhf_ray.roles.trl_training import Fitted, InOrder, Progress, Training, merge_lora, quiet_training

_TARGETS = ("probability", "weight", "margin")
"""Columns of the data set that the loss needs and the model must not see."""


class _PreferenceCollator(DataCollatorForPreference):
    """Pads as TRL does, and keeps what our loss needs besides."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in _TARGETS:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class _PreferenceTrainer(InOrder, RewardTrainer):
    """TRL's trainer, with its metrics, under the loss for uncertain and weighted answers."""

    def __init__(self, *, center_coef: float, **options: Any) -> None:
        super().__init__(**options)
        self._center_coef = center_coef

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets = {name: inputs.pop(name) for name in _TARGETS}
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        loss = bradley_terry_loss(chosen, rejected, **targets, center_coef=self._center_coef)
        return (loss, outputs) if return_outputs else loss


def new_reward_model(folder: Path, tokenizer: Any, *, freeze_layers: int = 0, trust_remote_code: bool = False) -> Any:
    """A one-label sequence classifier on a pretrained model's backbone, float32, ready to be trained.

    The head starts at zero: final hidden states of Llama-type models are large, and a random head on them drowns the
    learning. The tokenizer gets a padding token that is not EOS: a classifier reads the last token that is not padding,
    which must be the response's EOS.

    Raises:
        ConfigError: ``reward.freeze_layers`` is more than the model has.
        ModelError: the architecture has no sequence classifier with a linear head.
    """
    with quiet_training():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear head named score; set model.path to a decoder model such as a Llama"
        )
    torch.nn.init.zeros_(head.weight)
    tokenizer.pad_token = padding_token(tokenizer)
    tokenizer.padding_side = "right"
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if freeze_layers:
        _freeze(model, freeze_layers)
    return model


def fit_reward_model(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[TokenPair],
    section: RewardConfig,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
    validation: Sequence[TokenPair] = (),
    checkpoints: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Fitted:
    """Train ``model`` in place; LoRA's matrices are merged into it at the end.

    Args:
        dtype: bfloat16 turns autocast on; the weights stay float32.
        scratch: an empty folder that is thrown away afterwards, the same one for all workers.
        validation: pairs that decide, with ``reward.early_stop_patience``, when to end and which weights to keep.
        checkpoints: where checkpoints are written, on the disk of ``scratch``; training goes on from the newest whole
            one that is there.
        identity: written into each of them.

    Raises:
        NumericalError: the loss is no longer a number.
    """
    best = scratch / BEST_FILE
    training = Training(
        section,
        [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs],
        model="the reward model",
        accuracy="accuracy",
        seed=seed,
        device=device,
        dtype=dtype,
        scratch=scratch,
        checkpoints=checkpoints,
        identity=identity,
        best=best,
        on_progress=on_progress,
    )
    keeper = KeepBest(best, patience=section.early_stop_patience)
    trained = _with_lora(model, section, seed=seed) if section.lora_rank else model
    with quiet_training():
        trainer = _PreferenceTrainer(
            order=training.order,
            center_coef=section.center_coef,
            model=trained,
            args=training.arguments(
                TRLRewardConfig,
                remove_unused_columns=False,  # the loss needs columns that the model does not
                eval_strategy="steps" if validation else "no",
                eval_steps=section.eval_steps,
            ),
            train_dataset=_dataset(pairs),
            eval_dataset=_dataset(validation) if validation else None,
            processing_class=tokenizer,
            data_collator=_PreferenceCollator(pad_token_id=tokenizer.pad_token_id),
            callbacks=[*training.callbacks, *([keeper] if validation else [])],
            optimizers=(_optimizer(trained, section), None),
        )
        start = training.start
        if start is not None and (start / BEST_FILE).is_file() and trainer.is_world_process_zero():
            shutil.copyfile(start / BEST_FILE, best)
        fitted = training.run(trainer)
    if validation and trainer.is_world_process_zero():
        keeper.restore(trained)
    merge_lora(trained)
    return replace(fitted, validation_loss=min(validation_losses(trainer.state.log_history).values(), default=None))


def _with_lora(model: Any, section: RewardConfig, *, seed: int) -> PeftModel:
    """The model with LoRA matrices put into its linear layers (in place), a trained head, and nothing else trained."""
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules="all-linear",
        modules_to_save=["score"],
    )
    with quiet_training(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, settings)
    if section.freeze_layers:
        _freeze(model, section.freeze_layers)
    return adapted


def _optimizer(model: Any, section: RewardConfig) -> torch.optim.AdamW:
    """AdamW whose second group is the score head. The trainer's schedule scales both rates alike."""
    head = [p for p in model.score.parameters() if p.requires_grad]
    in_head = {id(p) for p in head}
    backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in in_head]
    groups = [{"params": backbone, "lr": section.lr}, {"params": head, "lr": section.head_lr or section.lr}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _dataset(pairs: Sequence[TokenPair]) -> Any:
    mean_weight = math.fsum(pair.weight for pair in pairs) / len(pairs)
    return datasets.Dataset.from_dict(
        {
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
            "probability": [float(pair.probability) for pair in pairs],
            "weight": [pair.weight / mean_weight for pair in pairs],
            "margin": [float(pair.margin) for pair in pairs],
        }
    )


def _freeze(model: Any, layers: int) -> None:
    """Leave the embeddings and the lowest layers untrained.

    Nothing below the first trained layer needs a gradient, so autograd keeps no activation there and the backward pass
    ends at that layer.
    """
    backbone = model.base_model
    stack = next((m for m in backbone.children() if isinstance(m, torch.nn.ModuleList)), None)
    if stack is None:
        raise ModelError(f"{type(backbone).__name__} has no list of layers to freeze; set reward.freeze_layers to 0")
    if layers > len(stack):
        raise ConfigError(f"reward.freeze_layers = {layers} and the model has {len(stack)} layers; choose at most that")
    embeddings = [module for module in backbone.children() if isinstance(module, torch.nn.Embedding)]
    for module in (*embeddings, *stack[:layers]):
        module.requires_grad_(False)

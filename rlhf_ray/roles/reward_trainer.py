"""Bradley–Terry training of a reward model with TRL's RewardTrainer, on token ids that were made beforehand.

TRL is given ``chosen_ids`` and ``rejected_ids``: it then neither tokenises nor appends an EOS of its own, and what the
model learns from is what it is served. The loss is ours (``algorithms/preference_loss.py``): TRL's knows only certain
answers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForSequenceClassification, PrinterCallback, TrainerCallback
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.config import RewardConfig
from rlhf_ray.errors import ConfigError, ModelError, NumericalError
from rlhf_ray.models.loading import quiet

_PROGRESS_NOTICES = 50
_TARGETS = ("probability", "weight", "margin")
"""Columns of the data set that the loss needs and the model must not see."""

Progress = Callable[[Mapping[str, float]], None]
"""Called with step, steps, loss, accuracy (on the pairs since the last call), pairs_per_second and eta_seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPair:
    """A comparison as token ids: prompt, response and EOS together."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    probability: float = 1.0
    """P(the chosen one is preferred), 0.5 (a tie) to 1."""
    weight: float = 1.0
    """How much it counts, relative to the others."""
    margin: float = 0.0
    """By how much the chosen one is better, in units of the raw score."""


class _PreferenceCollator(DataCollatorForPreference):
    """Pads as TRL does, and keeps what our loss needs besides."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in _TARGETS:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class _PreferenceTrainer(RewardTrainer):
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars, load reports and warnings of the training libraries."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def new_reward_model(folder: Path, tokenizer: Any, *, freeze_layers: int = 0, trust_remote_code: bool = False) -> Any:
    """A one-label sequence classifier on a pretrained model's backbone, float32, ready to be trained.

    The head starts at zero: final hidden states of Llama-type models are large, and a random head on them drowns the
    learning. The tokenizer gets a padding token that is not EOS: a classifier reads the last token that is not padding,
    which must be the response's EOS.

    Raises:
        ConfigError: ``reward.freeze_layers`` is more than the model has.
        ModelError: the architecture has no sequence classifier with a linear head.
    """
    with _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear head named score; set model.path to a decoder model such as a Llama"
        )
    torch.nn.init.zeros_(head.weight)
    tokenizer.pad_token = _pad_token(tokenizer)
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
    on_progress: Progress | None = None,
) -> float:
    """Train ``model`` in place; returns the mean loss over the run, nats per pair.

    Args:
        dtype: bfloat16 turns autocast on; the weights stay float32.
        scratch: an empty folder for the trainer, which writes nothing of worth into it.

    Raises:
        NumericalError: the loss is no longer a number.
    """
    with _quiet():
        trainer = _PreferenceTrainer(
            center_coef=section.center_coef,
            model=model,
            args=_arguments(section, pairs=len(pairs), seed=seed, device=device, dtype=dtype, scratch=scratch),
            train_dataset=_dataset(pairs),
            processing_class=tokenizer,
            data_collator=_PreferenceCollator(pad_token_id=tokenizer.pad_token_id),
            callbacks=[_ProgressCallback(section, pairs=len(pairs), on_progress=on_progress)],
            optimizers=(_optimizer(model, section), None),
        )
        trainer.remove_callback(PrinterCallback)
        result = trainer.train()
    return float(result.training_loss)


def _optimizer(model: Any, section: RewardConfig) -> torch.optim.AdamW:
    """AdamW whose second group is the score head. The trainer's schedule scales both rates alike."""
    head = list(model.score.parameters())
    in_head = {id(p) for p in head}
    backbone = [p for p in model.parameters() if p.requires_grad and id(p) not in in_head]
    groups = [{"params": backbone, "lr": section.lr}, {"params": head, "lr": section.head_lr or section.lr}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def _arguments(
    section: RewardConfig, *, pairs: int, seed: int, device: torch.device, dtype: torch.dtype, scratch: Path
) -> TRLRewardConfig:
    on_cpu = device.type == "cpu"
    arguments = TRLRewardConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=section.batch_size,
        num_train_epochs=section.epochs,
        learning_rate=section.lr,
        warmup_steps=section.warmup_ratio,  # below 1 it is a share of all steps
        seed=seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=False,
        max_length=None,  # TRL would leave longer pairs out in silence; they were refused before
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,  # the column "length" is needed for that
        logging_steps=max(1, _steps(section, pairs) // _PROGRESS_NOTICES),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # TRL refuses the DataParallel that several visible GPUs would bring
    return arguments


def _dataset(pairs: Sequence[TokenPair]) -> Any:
    mean_weight = math.fsum(pair.weight for pair in pairs) / len(pairs)
    return datasets.Dataset.from_dict(
        {
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
            "probability": [float(pair.probability) for pair in pairs],
            "weight": [pair.weight / mean_weight for pair in pairs],
            "margin": [float(pair.margin) for pair in pairs],
            "length": [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs],
        }
    )


def _steps(section: RewardConfig, pairs: int) -> int:
    return math.ceil(math.ceil(pairs / section.batch_size) * section.epochs)


def _pad_token(tokenizer: Any) -> str:
    """A token that is not EOS: what stands in the padding is masked, only where it begins must be seen."""
    named = [tokenizer.pad_token, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens([0, 1])]
    return next(token for token in (tokenizer.unk_token, *named) if token is not None and token != tokenizer.eos_token)


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


class _ProgressCallback(TrainerCallback):
    """Turns the trainer's logs into ``Progress`` calls, and a loss that is no number into an end."""

    def __init__(self, section: RewardConfig, *, pairs: int, on_progress: Progress | None) -> None:
        self._section = section
        self._pairs = pairs
        self._on_progress = on_progress
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise NumericalError(
                f"the reward model's loss became {logs['loss']} at step {state.global_step}; lower reward.lr"
            )
        elapsed = time.monotonic() - self._began
        progress = {
            "step": float(state.global_step),
            "steps": float(state.max_steps),
            "loss": float(logs["loss"]),
            "accuracy": float(logs["accuracy"]),
            "pairs_per_second": min(state.global_step * self._section.batch_size, self._pairs * state.epoch) / elapsed,
            "eta_seconds": elapsed / state.global_step * (state.max_steps - state.global_step),
        }
        if self._on_progress is not None:
            self._on_progress(progress)

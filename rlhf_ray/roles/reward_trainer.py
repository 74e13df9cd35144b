"""Bradley–Terry training of a reward model with TRL's RewardTrainer, on token ids that were made beforehand.

TRL is given ``chosen_ids`` and ``rejected_ids``: it then neither tokenises nor appends an EOS of its own, and what the
model learns from is what it is served. The loss is ours (``algorithms/preference_loss.py``): TRL's knows only certain
answers. Where the process is one of several of a ``torch.distributed`` group, they share each batch.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Sampler
from transformers import AutoModelForSequenceClassification, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf_ray.algorithms.preference_loss import bradley_terry_loss
from rlhf_ray.checkpoint import latest_checkpoint
from rlhf_ray.config import RewardConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.errors import ConfigError, ModelError, NumericalError
from rlhf_ray.models.loading import quiet
from rlhf_ray.models.reward import padding_token
from rlhf_ray.roles.reward_checkpoints import BEST_FILE, KeepBest, KeepCheckpoints, validation_losses

_PROGRESS_NOTICES = 50
_TARGETS = ("probability", "weight", "margin")
"""Columns of the data set that the loss needs and the model must not see."""

Progress = Callable[[Mapping[str, float]], None]
"""Called with step, steps, loss, accuracy (on the pairs since the last call), pairs_per_second and eta_seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What a training came to."""

    loss: float
    """Mean over the steps, nats a pair."""
    steps: int
    """Optimiser steps, those before a resume among them."""
    pairs_per_second: float
    """Since it began or was resumed."""
    validation_loss: float | None
    """Of the weights that were kept, nats a pair; None without validation pairs."""


class _PreferenceCollator(DataCollatorForPreference):
    """Pads as TRL does, and keeps what our loss needs besides."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for name in _TARGETS:
            batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class _Order(Sampler[int], TrainerCallback):
    """The order of the pairs in each epoch, like lengths together.

    It follows from the seed alone: however many workers share a batch, and wherever training is resumed.
    """

    def __init__(self, pairs: Sequence[TokenPair], *, batch_size: int, seed: int) -> None:
        self._lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(self._epoch + 1):
            torch.empty((), dtype=torch.int64).random_(generator=generator)  # as torch's data loader draws before each
            order: list[int] = get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)
        return iter(order)


class _PreferenceTrainer(RewardTrainer):
    """TRL's trainer, with its metrics, under the loss for uncertain and weighted answers."""

    def __init__(self, *, order: _Order, center_coef: float, **options: Any) -> None:
        super().__init__(**options)
        self._order = order
        self._center_coef = center_coef

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        targets = {name: inputs.pop(name) for name in _TARGETS}
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        loss = bradley_terry_loss(chosen, rejected, **targets, center_coef=self._center_coef)
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for a checkpoint; the finished model gets one."""

    def _get_train_sampler(self, train_dataset: Any = None) -> _Order:
        return self._order


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
    start = latest_checkpoint(checkpoints) if checkpoints else None
    order = _Order(pairs, batch_size=section.batch_size, seed=seed)
    progress = _ProgressCallback(section, pairs=len(pairs), on_progress=on_progress)
    keeper = KeepBest(best, patience=section.early_stop_patience)
    callbacks = [order, progress, *([keeper] if validation else [])]
    if checkpoints:
        callbacks.append(KeepCheckpoints(checkpoints, identity or {}, every=section.save_steps, best=best))
    trained = _with_lora(model, section, seed=seed) if section.lora_rank else model
    with _quiet():
        trainer = _PreferenceTrainer(
            order=order,
            center_coef=section.center_coef,
            model=trained,
            args=_arguments(
                section,
                pairs=len(pairs),
                looks=bool(validation),
                seed=seed,
                device=device,
                dtype=dtype,
                scratch=scratch,
            ),
            train_dataset=_dataset(pairs),
            eval_dataset=_dataset(validation) if validation else None,
            processing_class=tokenizer,
            data_collator=_PreferenceCollator(pad_token_id=tokenizer.pad_token_id),
            callbacks=callbacks,
            optimizers=(_optimizer(trained, section), None),
        )
        trainer.remove_callback(PrinterCallback)
        if start is not None and (start / BEST_FILE).is_file() and trainer.is_world_process_zero():
            shutil.copyfile(start / BEST_FILE, best)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if validation and trainer.is_world_process_zero():
        keeper.restore(trained)
    if isinstance(trained, PeftModel):
        trained.merge_and_unload()  # in place: ``model`` has the merged weights
    return Fitted(
        loss=_mean_loss(trainer.state.log_history),
        steps=trainer.state.global_step,
        pairs_per_second=progress.pairs_per_second,
        validation_loss=min(validation_losses(trainer.state.log_history).values(), default=None),
    )


def _mean_loss(log_history: Sequence[Mapping[str, Any]]) -> float:
    """Over all steps, from means over the steps since the row before."""
    total, before = 0.0, 0
    for row in log_history:
        if "loss" in row:
            total += row["loss"] * (row["step"] - before)
            before = row["step"]
    return total / before


def _with_lora(model: Any, section: RewardConfig, *, seed: int) -> PeftModel:
    """The model with LoRA matrices put into its linear layers (in place), a trained head, and nothing else trained."""
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules="all-linear",
        modules_to_save=["score"],
    )
    with _quiet(), torch.random.fork_rng(devices=[]):
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


def _arguments(
    section: RewardConfig,
    *,
    pairs: int,
    looks: bool,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    scratch: Path,
) -> TRLRewardConfig:
    on_cpu = device.type == "cpu"
    share = section.batch_size // (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    arguments = TRLRewardConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=share,
        per_device_eval_batch_size=share,
        num_train_epochs=section.epochs,
        learning_rate=section.lr,
        warmup_steps=section.warmup_ratio,  # below 1 it is a share of all steps
        seed=seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        max_length=None,  # TRL would leave longer pairs out in silence; they were refused before
        remove_unused_columns=False,  # the loss needs columns that the model does not
        logging_steps=max(1, _steps(section, pairs) // _PROGRESS_NOTICES),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if looks else "no",
        eval_steps=section.eval_steps,
        save_strategy="no",  # KeepCheckpoints says when
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
        }
    )


def _steps(section: RewardConfig, pairs: int) -> int:
    return math.ceil(math.ceil(pairs / section.batch_size) * section.epochs)


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
        self._first_step = 0
        self._first_pair = 0.0
        self.pairs_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()
        self._first_step, self._first_pair = state.global_step, self._pairs_seen(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True  # each may be the last step

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
        self.pairs_per_second = (self._pairs_seen(state) - self._first_pair) / elapsed
        progress = {
            "step": float(state.global_step),
            "steps": float(state.max_steps),
            "loss": float(logs["loss"]),
            "accuracy": float(logs["accuracy"]),
            "pairs_per_second": self.pairs_per_second,
            "eta_seconds": elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step),
        }
        if self._on_progress is not None:
            self._on_progress(progress)

    def _pairs_seen(self, state: Any) -> float:
        return min(state.global_step * self._section.batch_size, self._pairs * (state.epoch or 0.0))

"""What the trainings by TRL's trainers share: the order of the rows, the arguments, checkpoints, progress, LoRA.

TRL is given token ids that were made beforehand: it then neither tokenises nor cuts nor appends an EOS of its own, and
what a model learns from is what it is asked later. Where the process is one of several of a ``torch.distributed``
group, they share each batch.
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
from peft import LoraConfig, PeftModel
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from rlhf_ray.checkpoint import latest_checkpoint
from rlhf_ray.config import TrainerConfig
from rlhf_ray.errors import NumericalError
from rlhf_ray.models.loading import quiet
from rlhf_ray.roles.trainer_checkpoints import KeepCheckpoints

_PROGRESS_NOTICES = 50
_PROGRESS_SECONDS = 30.0
"""Without a notice for so long, one comes at the end of the step."""

Progress = Callable[[Mapping[str, float]], None]
"""Called with step, steps, loss and accuracy (on the rows since the last call), per_second (rows) and eta_seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What a training came to."""

    loss: float
    """Mean over the steps, nats: a pair, or of SFT a token."""
    steps: int
    """Optimiser steps, those before a resume among them."""
    per_second: float
    """Pairs, or of SFT responses, since it began or was resumed."""
    validation_loss: float | None = None
    """Of the weights that were kept, nats a pair; None without validation pairs."""


class Training:
    """One training: made first, since the trainer is told of it; then run."""

    def __init__(
        self,
        section: TrainerConfig,
        lengths: Sequence[int],
        *,
        model: str,
        accuracy: str,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
        checkpoints: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        best: Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """
        Args:
            lengths: tokens of each row.
            model: what is trained, as messages call it: "the reward model".
            accuracy: the trainer's name for what ``Progress`` calls accuracy.
            dtype: bfloat16 turns autocast on; the weights stay float32.
            scratch: an empty folder that is thrown away afterwards, the same one for all workers.
            checkpoints: where checkpoints are written, on the disk of ``scratch``; training goes on from the newest
                whole one that is there.
            identity: written into each of them.
            best: of ``KeepBest``.
        """
        self._section = section
        self._rows = len(lengths)
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._scratch = scratch
        self.start = latest_checkpoint(checkpoints) if checkpoints else None
        self.order = LengthOrder(lengths, batch_size=section.batch_size, seed=seed)
        self._progress = ProgressCallback(
            section, rows=len(lengths), model=model, accuracy=accuracy, on_progress=on_progress
        )
        self.callbacks: list[TrainerCallback] = [self.order, self._progress]
        if checkpoints:
            keep = KeepCheckpoints(checkpoints, identity or {}, every=section.save_steps, best=best)
            self.callbacks.append(keep)

    def arguments(self, kind: Any, **own: Any) -> Any:
        """TRL's arguments of this training.

        Args:
            kind: TRL's class of them.
            own: further ones.
        """
        section, on_cpu = self._section, self._device.type == "cpu"
        workers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        arguments = kind(
            output_dir=str(self._scratch),
            per_device_train_batch_size=section.batch_size // workers,
            per_device_eval_batch_size=section.batch_size // workers,
            num_train_epochs=section.epochs,
            learning_rate=section.lr,
            warmup_steps=section.warmup_ratio,  # below 1 it is a share of all steps
            seed=self._seed,
            bf16=self._dtype == torch.bfloat16,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            gradient_checkpointing=False,
            ddp_find_unused_parameters=False,
            max_length=None,  # TRL would cut longer rows, or leave them out, in silence; they were refused before
            logging_steps=max(1, self._steps() // _PROGRESS_NOTICES),
            logging_nan_inf_filter=False,
            save_strategy="no",  # KeepCheckpoints says when
            report_to="none",
            disable_tqdm=True,
            **own,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # TRL refuses the DataParallel that several visible GPUs would bring
        return arguments

    def run(self, trainer: Any) -> Fitted:
        """Train, from the newest checkpoint if there is one.

        Raises:
            NumericalError: the loss is no longer a number.
        """
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(self.start) if self.start else None)
        return Fitted(
            loss=_mean_loss(trainer.state.log_history),
            steps=trainer.state.global_step,
            per_second=self._progress.per_second,
        )

    def _steps(self) -> int:
        return math.ceil(math.ceil(self._rows / self._section.batch_size) * self._section.epochs)


class InOrder:
    """Mixed into a trainer: rows come in the order that is given, and a checkpoint gets no card."""

    def __init__(self, *, order: LengthOrder, **options: Any) -> None:
        super().__init__(**options)
        self._order = order

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for a checkpoint; a finished model may get one."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthOrder:
        return self._order


class LengthOrder(Sampler[int], TrainerCallback):
    """The order of the rows in each epoch, like lengths together.

    It follows from the seed alone: however many workers share a batch, and wherever training is resumed.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
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


def _as_the_first_worker(mine: bool, device: torch.device) -> bool:
    """What the first worker says: the mean loss of a notice is gathered from all, so all must give one or none."""
    if not torch.distributed.is_initialized():
        return mine
    said = torch.tensor([int(mine)], device=device)
    torch.distributed.broadcast(said, src=0)
    return bool(said.item())


class ProgressCallback(TrainerCallback):
    """Turns the trainer's logs into ``Progress`` calls, and a loss that is no number into an end."""

    def __init__(
        self, section: TrainerConfig, *, rows: int, model: str, accuracy: str, on_progress: Progress | None
    ) -> None:
        self._section = section
        self._rows = rows
        self._model = model
        self._accuracy = accuracy
        self._on_progress = on_progress
        self._began = self._told = 0.0
        self._first_step = 0
        self._first_row = 0.0
        self.per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = self._told = time.monotonic()
        self._first_step, self._first_row = state.global_step, self._rows_seen(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        silent = _as_the_first_worker(time.monotonic() - self._told >= _PROGRESS_SECONDS, args.device)
        if silent or control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True  # a look or the end: each may be the last step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise NumericalError(
                f"{self._model}'s loss became {logs['loss']} at step {state.global_step}; "
                f"lower {self._section.section}.lr"
            )
        self._told = time.monotonic()
        elapsed = self._told - self._began
        self.per_second = (self._rows_seen(state) - self._first_row) / elapsed
        progress = {
            "step": float(state.global_step),
            "steps": float(state.max_steps),
            "loss": float(logs["loss"]),
            "accuracy": float(logs[self._accuracy]),
            "per_second": self.per_second,
            "eta_seconds": elapsed / (state.global_step - self._first_step) * (state.max_steps - state.global_step),
        }
        if self._on_progress is not None:
            self._on_progress(progress)

    def _rows_seen(self, state: Any) -> float:
        return min(state.global_step * self._section.batch_size, self._rows * (state.epoch or 0.0))


@contextlib.contextmanager
def quiet_training() -> Iterator[None]:
    """Without the progress bars, load reports and warnings of the training libraries."""
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


def policy_lora(section: TrainerConfig) -> LoraConfig | None:
    """LoRA on every linear layer of a language model but its head; None where it is trained whole."""
    if not section.lora_rank:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM", r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules="all-linear"
    )


def merge_lora(model: Any) -> None:
    """Add LoRA's matrices, if there are any, to the layers of the model that it was put into, in place."""
    if isinstance(model, PeftModel):
        model.merge_and_unload()


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder in float32, with tokenizer and generation defaults, as PPO exports it."""
    with quiet():
        model.cpu().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _mean_loss(log_history: Sequence[Mapping[str, Any]]) -> float:
    """Over all steps, from means over the steps since the row before."""
    total, before = 0.0, 0
    for row in log_history:
        if "loss" in row:
            total += row["loss"] * (row["step"] - before)
            before = row["step"]
    return total / before

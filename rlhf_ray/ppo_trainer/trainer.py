"""``PPOTrainer`` by TRL's names (before 0.12): the script holds the loop, this holds the models and takes the steps.

for batch in trainer.dataloader:                            prompts, by dataset and data_collator
    responses = trainer.generate(queries, ...)              sampled here, by transformers
    stats = trainer.step(queries, responses, scores)        the learner's PPO update
    trainer.log_stats(stats, batch, scores)
trainer.save_pretrained(folder)
"""

from __future__ import annotations

import inspect
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed

from rlhf_ray.algorithms.kl import kl_controller
from rlhf_ray.data.batching import collate, to_device
from rlhf_ray.errors import ConfigError, InputError, NumericalError, ResourceError
from rlhf_ray.models.loading import quiet, return_freed_memory
from rlhf_ray.ppo_trainer.checks import checked_config, checked_model, checked_tokenizer, finite_number, token_ids
from rlhf_ray.ppo_trainer.config import PPOConfig
from rlhf_ray.ppo_trainer.generation import evaluating, filters, generate_batches
from rlhf_ray.ppo_trainer.model import AutoModelForCausalLMWithValueHead, create_reference_model
from rlhf_ray.ppo_trainer.stats import spread, step_stats
from rlhf_ray.roles.ppo_update import NonFiniteError, PPOUpdate
from rlhf_ray.types import Batch, Experience, Prompt, Rollout

log = logging.getLogger("rlhf_ray.ppo_trainer")

_TEXT_COLUMNS = ("label", "query", "response")
_SAMPLES_LOGGED = 4


class PPOTrainer:
    """PPO on responses that a script has sampled and scored. One process, one device.

    Example::

        trainer = PPOTrainer(config=config, model=model, tokenizer=tokenizer, dataset=dataset, data_collator=collator)
        stats = trainer.step(query_tensors, response_tensors, rewards)
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: AutoModelForCausalLMWithValueHead | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Any = None,
    ) -> None:
        """
        Args:
            ref_model: what the KL is measured against; default: a frozen copy of ``model`` as it is now.
            dataset: rows for ``dataloader``: a torch data set, a ``datasets.Dataset`` or a list.
            optimizer: over ``model.parameters()``; default: Adam at ``config.learning_rate``.
            data_collator: rows of a batch → the batch.
            lr_scheduler: goes one step further after each ``step``.

        Raises:
            InputError: an argument that cannot be right, or asks for what is not done here.
        """
        self.config = checked_config(config)
        self.model = checked_model("model", model)
        if num_shared_layers is not None or training_data_collator is not None:
            raise ConfigError(
                "PPOTrainer: num_shared_layers and training_data_collator are not supported: the reference shares no "
                "layers, and batches of responses are padded here; leave them out"
            )
        if ref_model is not None and checked_model("ref_model", ref_model) is model:
            raise ConfigError(
                "PPOTrainer: ref_model is model itself, so their KL would stay 0; give create_reference_model(model), "
                "or leave ref_model out"
            )
        self.tokenizer = checked_tokenizer(tokenizer)
        set_seed(self.config.seed)
        self.accelerator = Accelerator(**self.config.accelerator_kwargs)
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"PPOTrainer trains in one process, and accelerate has started {self.accelerator.num_processes}; "
                "start the script with python"
            )
        if self.accelerator.mixed_precision not in ("no", "bf16"):
            raise ConfigError(
                f"PPOTrainer computes in float32 or bfloat16, and accelerate is set to "
                f"{self.accelerator.mixed_precision}; set PPOConfig.accelerator_kwargs={{'mixed_precision': 'bf16'}}"
            )
        self.current_device: torch.device = self.accelerator.device
        self.ref_model = (create_reference_model(self.model) if ref_model is None else ref_model).eval()
        self.ref_model.to(self.current_device).requires_grad_(False)
        self.model.to(self.current_device).train()
        if self.config.gradient_checkpointing:
            self.model.pretrained_model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # Without weight decay AdamW is Adam.
        self.optimizer = optimizer or torch.optim.AdamW(trained, lr=self.config.learning_rate, weight_decay=0.0)
        self.lr_scheduler = lr_scheduler
        self.dataset = dataset
        self.dataloader: Any = None if dataset is None else self._new_dataloader(dataset, data_collator)
        self._kl = kl_controller(
            "adaptive" if self.config.adap_kl_ctrl else "fixed",
            coef=self.config.init_kl_coef,
            target=self.config.target,
            horizon=int(self.config.horizon),
        )
        self._rng = torch.Generator().manual_seed(self.config.seed)
        self._writer = self._new_writer()
        self._logged = 0
        self._warned = False

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query.

        Args:
            query_tensor: 1-D token ids, or a list of such.
            length_sampler: draws ``max_new_tokens`` for each forward.
            batch_size: queries in one forward.
            return_prompt: give query and response in one.
            generate_ref_response: let the reference answer too.
            generation_kwargs: of transformers' ``generate``. Options that change the distribution, such as top_k, make
                the samples differ from what ``step`` takes them for, and are warned of; its own default is top_k=50.

        Returns:
            of a list, a list of 1-D token ids without padding, each to its EOS; of one query [1, L]. With
            ``generate_ref_response`` a pair: the model's and the reference's.

        Raises:
            InputError: a query that is none.
        """
        self._warn_of_filters(generation_kwargs)
        options = {"pad_token_id": self.tokenizer.pad_token_id, **generation_kwargs}
        models = [self.model, self.ref_model] if generate_ref_response else [self.model]
        answers: list[Any] = []
        for model in models:
            with evaluating(model):
                if isinstance(query_tensor, Tensor):
                    answers.append(self._generate_one(model, query_tensor, length_sampler, return_prompt, options))
                    continue
                pairs = generate_batches(
                    model.pretrained_model,
                    [self._token_ids("query", row, query) for row, query in enumerate(query_tensor)],
                    pad_id=self.tokenizer.pad_token_id,
                    eos_id=self.tokenizer.eos_token_id,
                    batch_size=batch_size,
                    length_sampler=length_sampler,
                    options=options,
                )
                answers.append(
                    [torch.cat([query, response]) if return_prompt else response for query, response in pairs]
                )
        return tuple(answers) if generate_ref_response else answers[0]

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO update: ``ppo_epochs`` passes over ``batch_size`` scored responses.

        Args:
            queries: 1-D token ids each, without padding.
            responses: 1-D token ids each, without the query; the EOS included where there is one.
            scores: one number each.

        Returns:
            statistics by TRL's names: see ``stats``.

        Raises:
            InputError: what was given is no batch; nothing has changed.
            NumericalError: NaN or infinity came up in the update. Minibatches before it have been applied.
            ResourceError: memory ran out, also with half of ``mini_batch_size``.
        """
        began = time.perf_counter()
        if response_masks is not None:
            raise InputError("step: response_masks are not supported: every token of a response counts; leave them out")
        experiences = self._experiences(queries, responses, scores)
        batch = to_device(collate(experiences, version=0, pad_id=self.tokenizer.pad_token_id), self.current_device)
        update = self._new_update(batch)
        batch = replace(batch, ref_logprobs=self._reference_logprobs(batch, update))
        referred = time.perf_counter()
        metrics, old_logprobs = self._run(update, batch)
        updated = time.perf_counter()
        kl_coef = self._kl.coef
        stats = step_stats(batch, metrics, old_logprobs, kl_coef=kl_coef, vf_coef=self.config.vf_coef)
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self._kl.update(metrics["kl"], len(experiences))
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.config.optimize_device_cache or self.config.optimize_cuda_cache:
            return_freed_memory()
            torch.cuda.empty_cache()
        stats["time/ppo/forward_pass"] = referred - began
        stats["time/ppo/optimize_step"] = updated - referred
        stats["time/ppo/total"] = time.perf_counter() - began
        return stats

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor | float],
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Write a step's numbers, and a few samples, to where ``config.log_with`` says.

        Args:
            stats: what ``step`` returned.
            batch: name → column; those of ``columns_to_log`` that it has are shown with the reward.
            rewards: the step's scores.
        """
        self._logged += 1
        given = torch.tensor([finite_number("reward", row, reward) for row, reward in enumerate(rewards)])
        numbers = {name: float(value) for name, value in stats.items() if isinstance(value, int | float)}
        numbers |= {"env/reward_mean": float(given.mean()), "env/reward_std": spread(given)}
        log.info(
            "step %d: reward %.4f, KL %.4f",
            self._logged,
            numbers["env/reward_mean"],
            numbers.get("objective/kl", math.nan),
        )
        if self._writer is None:
            return
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, self._logged)
        columns = [name for name in columns_to_log if name in batch]
        for row in range(min(_SAMPLES_LOGGED, len(given))):
            text = "\n\n".join([*(f"{name}: {batch[name][row]}" for name in columns), f"reward: {given[row]:.4f}"])
            self._writer.add_text(f"sample/{row}", text, self._logged)
        self._writer.flush()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """The policy as a plain Hugging Face folder, with its tokenizer, and its value head in ``value_head/``."""
        self.model.save_pretrained(save_directory)
        with quiet():
            self.tokenizer.save_pretrained(save_directory)

    def _generate_one(
        self,
        model: AutoModelForCausalLMWithValueHead,
        query: Tensor,
        length_sampler: Callable[[], int] | None,
        return_prompt: bool,
        options: Mapping[str, Any],
    ) -> Tensor:
        """[1, L], exactly as transformers gives it: scripts count its tokens from the end."""
        input_ids = self._token_ids("query", 0, query).unsqueeze(0)
        length = {} if length_sampler is None else {"max_new_tokens": length_sampler()}
        generated: Tensor = model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **{**options, **length}
        )
        return generated if return_prompt else generated[:, input_ids.shape[1] :]

    def _experiences(
        self, queries: Sequence[Tensor], responses: Sequence[Tensor], scores: Sequence[Tensor | float]
    ) -> list[Experience]:
        size = self.config.batch_size
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if len(given) != size:
                raise InputError(
                    f"step was given {len(given)} {name}, and PPOConfig.batch_size = {size}; give as many, or set "
                    "batch_size (a data loader of your own needs drop_last=True)"
                )
        experiences = []
        for row, (query, response, score) in enumerate(zip(queries, responses, scores, strict=True)):
            prompt_ids = tuple(self._token_ids("query", row, query).tolist())
            response_ids = tuple(self._token_ids("response", row, response).tolist())
            ended = response_ids[-1] == self.tokenizer.eos_token_id
            # Nobody knows what the sampler's log-probabilities were. At staleness 0 the update does not read them.
            unknown = np.zeros(len(response_ids), np.float32)
            rollout = Rollout(
                prompt=Prompt(prompt_id=row, text="", token_ids=prompt_ids, seed=0),
                response_ids=response_ids,
                rollout_logprobs=tuple(unknown.tolist()),
                policy_versions=(0,) * len(response_ids),
                finish_reason="stop" if ended else "length",
                text="",
            )
            experiences.append(
                Experience(rollout=rollout, score=finite_number("score", row, score), ref_logprobs=unknown)
            )
        return experiences

    def _token_ids(self, name: str, row: int, given: Any) -> Tensor:
        models = (self.model, self.ref_model)
        vocabulary = min(model.pretrained_model.get_input_embeddings().num_embeddings for model in models)
        return token_ids(name, row, given, vocabulary=vocabulary).to(self.current_device)

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch, update: PPOUpdate) -> Tensor:
        """[B, T], nats, in the update's precision."""
        parts = []
        for start in range(0, len(batch.prompt_ids), self.config.mini_batch_size):
            rows = slice(start, start + self.config.mini_batch_size)
            with update.autocast():
                output = self.ref_model.policy(
                    batch.input_ids[rows],
                    batch.prompt_len[rows],
                    batch.response_ids[rows],
                    batch.response_mask[rows],
                    temperature=1.0,
                )
            parts.append(output.logprobs)
        return torch.cat(parts)

    def _run(self, update: PPOUpdate, batch: Batch) -> tuple[dict[str, float], Tensor]:
        try:
            return update.run(batch, kl_coef=self._kl.coef)
        except NonFiniteError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericalError(
                f"step: {error.cause}; row {error.prompt_id} of the batch is the likeliest reason. Minibatches before "
                f"it have been applied: go on from a model that you saved, with a lower learning_rate than "
                f"{self.config.learning_rate:g} or with max_grad_norm set"
            ) from error
        except ResourceError as error:
            raise ResourceError(
                f"step: memory ran out with mini_batch_size = {self.config.mini_batch_size}; lower it and raise "
                "gradient_accumulation_steps as much, which changes nothing else, or set gradient_checkpointing=True"
            ) from error

    def _new_update(self, batch: Batch) -> PPOUpdate:
        """The learner's update, cut so that no forward holds more than ``mini_batch_size`` of this batch's rows."""
        longest = int(batch.attention_mask.sum(dim=1).max())
        return PPOUpdate(
            self.model.policy,
            self.optimizer,
            self.config.run_config(micro_batch_tokens=self.config.mini_batch_size * longest),
            dtype=torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32,
            rng=self._rng,
        )

    def _new_dataloader(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None) -> DataLoader[Any]:
        size = self.config.batch_size
        if not hasattr(dataset, "__len__") or len(dataset) < size:
            held = len(dataset) if hasattr(dataset, "__len__") else "an unknown number of"
            raise ConfigError(
                f"the dataset holds {held} rows, and PPOConfig.batch_size = {size} are needed for one batch; lower "
                "batch_size, or give more rows"
            )
        if self.config.remove_unused_columns and hasattr(dataset, "column_names"):
            read = {*inspect.signature(self.model.forward).parameters, *_TEXT_COLUMNS}
            unread = [name for name in dataset.column_names if name not in read]
            if len(unread) == len(dataset.column_names):
                raise ConfigError(
                    f"the dataset has the columns {', '.join(unread)}, none of which PPOTrainer keeps; tokenise the "
                    "prompts into input_ids, or set PPOConfig.remove_unused_columns=False"
                )
            dataset = dataset.remove_columns(unread)
        return DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)

    def _new_writer(self) -> Any:
        if self.config.log_with is None:
            return None
        # The import costs a second or two: only who logs pays for it.
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.config.project_kwargs["logging_dir"]))
        weakref.finalize(self, writer.close)
        return writer

    def _warn_of_filters(self, options: Mapping[str, Any]) -> None:
        found = [] if self._warned else filters(self.model.pretrained_model, options)
        if found:
            self._warned = True
            log.warning(
                "generate samples with %s, and step takes its samples for the model's own at temperature 1: the KL and "
                "the ratios will be off; pass top_k=0, top_p=1.0, temperature=1.0 for responses to train on",
                ", ".join(found),
            )

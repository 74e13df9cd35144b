"""The learner: experiences in, a better policy out. Plain and synchronous; Ray is somebody else's edge.

It owns what lasts from step to step: float32 master weights, optimiser, version. The arithmetic of a step is in
``ppo_update``. With several ranks each process has one of these, and all are given the same calls in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algorithms.kl import k1
from rlhf_ray.checkpoint import replaced_folder
from rlhf_ray.config import RunConfig
from rlhf_ray.data.batching import collate, to_device
from rlhf_ray.errors import NumericalError, StalenessError
from rlhf_ray.models.loading import (
    load_policy_model,
    load_tokenizer,
    load_trunk,
    quiet,
    resolve_device,
    resolve_precision,
    set_threads,
)
from rlhf_ray.models.lora import add_lora, merged_state
from rlhf_ray.models.policy import PolicyModel
from rlhf_ray.models.sharding import own_slice, whole
from rlhf_ray.roles.learner_state import LearnerCopy, SavedLearner
from rlhf_ray.roles.ppo_update import NonFiniteError, PPOUpdate
from rlhf_ray.roles.ranks import Ranks
from rlhf_ray.types import Batch, Experience, Probe, StepReport, Weights

PROBE_TOKENS = 160
"""More than one block of vLLM's KV cache on a CPU (128): what goes wrong between blocks shows too."""

BAD_SAMPLE_FILE = "bad_sample.json"


class PPOLearner:
    """Takes PPO steps.

    A step whose inputs, loss or gradient norm are not finite is skipped and counted, and the version goes on. With
    several minibatches that means from the one that is not finite on: those before it have been applied. More than
    ``learner.max_skipped_steps`` in a row end the run.
    """

    def __init__(
        self,
        config: RunConfig,
        model_folder: str,
        device: str = "auto",
        precision: str = "auto",
        critic_folder: str | None = None,
        ranks: Ranks | None = None,
        on_forward: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            model_folder: Hugging Face folder or hub id of the policy to start from.
            critic_folder: of the model whose trunk the critic starts from; None: it is a head on the policy's.
            device: "cpu", "cuda", or "auto": cuda where ``learner.num_gpus`` asks for one.
            precision: of forward and backward (autocast).
            ranks: those that share the weights and each batch's rows; by default it is alone.
            on_forward: is called after the forward of each micro-batch.

        Raises:
            ModelError: the model cannot be used.
            ResourceError: no GPU where one is asked for.
        """
        self._ranks = ranks or Ranks()
        self._threads = config.learner.threads or max(1, len(os.sched_getaffinity(0)) // self._ranks.on_this_node)
        set_threads(self._threads)
        self._config = config
        self._device = resolve_device(device, config.learner.num_gpus)
        trust = config.model.trust_remote_code
        self._tokenizer = load_tokenizer(model_folder, need_chat_template=False, trust_remote_code=trust)
        language_model = load_policy_model(model_folder, trust_remote_code=trust)
        section = config.learner
        if section.lora_rank:
            add_lora(
                language_model,
                rank=section.lora_rank,
                alpha=section.lora_alpha,
                targets=section.lora_targets,
                seed=config.seed,
            )
        critic = load_trunk(critic_folder, trust_remote_code=trust) if critic_folder else None
        if section.gradient_checkpointing:
            for model in (language_model, critic) if critic else (language_model,):
                model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = PolicyModel(language_model, critic=critic, packed=self._device.type == "cpu")
        self._model = policy.to(self._device).train()
        self._ranks.shard(self._model, self._device)
        if on_forward is not None:
            self._model.register_forward_hook(lambda *_: on_forward())
        self._optimizer = _new_optimizer(self._model, config)
        self._rng = torch.Generator().manual_seed(config.seed)
        self._ppo = PPOUpdate(
            self._model,
            self._optimizer,
            config,
            dtype=resolve_precision(precision, self._device),
            rng=self._rng,
            ranks=self._ranks,
        )
        self._version = 0
        self._skipped_in_a_row = 0
        self._copy: LearnerCopy | None = None
        self._probe_ids = _draw_probe(language_model.config, self._tokenizer, config.seed).to(self._device)

    @property
    def version(self) -> int:
        """Steps taken: the version of the current weights."""
        return self._version

    def train_step(self, experiences: Sequence[Experience], *, kl_coef: float) -> StepReport:
        """One PPO update over the batch.

        A skipped step's metrics lack what was not computed: kl, the losses and their kin.

        Args:
            experiences: with the reference's log-probabilities; or all without, where the learner has LoRA and so the
                reference in itself.
            kl_coef: weight of the per-token k1 penalty in the reward.

        Raises:
            StalenessError: an experience lags more than ``ppo.max_staleness`` versions behind.
            NumericalError: one non-finite step too many; the sample is in the message and in ``bad_sample.json``.
        """
        set_threads(self._threads)
        batch = collate(experiences, version=self._version, pad_id=self._tokenizer.pad_token_id)
        self._refuse_stale(batch)
        batch = to_device(batch, self._device)
        if experiences[0].ref_logprobs is None:
            batch = replace(batch, ref_logprobs=self._ppo.logprobs_without_lora(batch))
        metrics = _describe(batch) | {"kl_coef": kl_coef, "lr": self._set_learning_rate(), "skipped": 0.0}
        kl: list[float] | None = None
        try:
            update, old_logprobs = self._ppo.run(
                batch, kl_coef=kl_coef, critic_only=self._version < self._config.learner.critic_warmup_steps
            )
            metrics |= update | _sampler_gap(experiences, batch, old_logprobs, self._version)
            kl = k1(old_logprobs, batch.ref_logprobs).sum(dim=1).tolist()
            self._skipped_in_a_row = 0
        except NonFiniteError as error:
            self._optimizer.zero_grad(set_to_none=True)
            metrics["skipped"] = 1.0
            self._count_skip(error, experiences)
        self._version += 1
        shown = range(min(self._config.ppo.samples_per_step, len(experiences)))
        samples = tuple(_sample_row(experiences[i], kl[i] if kl else None, int(batch.staleness[i])) for i in shown)
        return StepReport(version=self._version, metrics=metrics, samples=samples)

    def weights(self, dtype: torch.dtype = torch.float32) -> Weights:
        """A copy of the policy on the CPU, ``lm_head.weight`` included and LoRA merged; parameters that are tied share
        one copy. On ranks other than the first nothing is kept.
        """
        copies: dict[tuple[int, torch.Size], Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, tensor in merged_state(self._model.language_model).items():
            key = (own_slice(tensor).data_ptr(), tensor.shape)
            if key not in copies:
                all_of_it = whole(tensor.detach())
                kept = all_of_it if self._ranks.first else all_of_it.new_empty(0)
                copies[key] = kept.to("cpu", dtype, copy=True).contiguous()
            weights[name] = copies[key]
        return weights if self._ranks.first else {}

    @torch.no_grad()
    def probe(self) -> Probe:
        """The run's fixed token sequence and its log-probabilities under the current weights."""
        set_threads(self._threads)
        ids = self._probe_ids.unsqueeze(0)
        with self._ppo.autocast():
            output = self._model(
                ids,
                torch.ones(1, dtype=torch.int64, device=self._device),
                ids[:, 1:],
                torch.ones_like(ids[:, 1:], dtype=torch.bool),
                temperature=self._config.sampling.temperature,
            )
        return Probe(token_ids=tuple(self._probe_ids.tolist()), logprobs=tuple(output.logprobs[0].tolist()))

    def copy(self) -> LearnerCopy:
        """Everything that the next step depends on: weights, value head, optimiser, version, RNG; of this rank its
        part. The learning rate follows from the version. The copy before must be written: its memory is used again.
        """
        state = {"version": self._version, "skipped_in_a_row": self._skipped_in_a_row}
        self._copy = LearnerCopy(self._lasting(), state, self._ranks, before=self._copy)
        return self._copy

    def save(self, folder: Path) -> None:
        """Write that.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        self.copy().write(folder)

    def load(self, folder: Path) -> int:
        """Restore what ``save`` wrote, on whatever number of ranks; returns the version. The next step is then what it
        would have been.

        Raises:
            InputError: the checkpoint is not whole, or is of another model.
        """
        saved = SavedLearner(folder)
        stepped = {name.split(".", 2)[2] for name in saved.names() if name.startswith("optimizer.step.")}
        self._optimizer.state.clear()
        for name, parameter in self._model.named_parameters():
            if name in stepped:
                self._optimizer.state[parameter] = {
                    "step": torch.zeros((), device=self._device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        rng = self._rng.get_state()
        saved.read({**self._lasting(), "rng": rng})
        self._rng.set_state(rng)
        self._version = int(saved.state["version"])
        self._skipped_in_a_row = int(saved.state["skipped_in_a_row"])
        return self._version

    def _lasting(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the very tensors, by name, but for the RNG's state, which is a copy."""
        tensors = {"rng": self._rng.get_state()}
        for name, parameter in self._model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def export(self, folder: Path) -> None:
        """The policy as a Hugging Face folder in float32, with tokenizer and generation defaults; it appears whole."""
        state = {name: whole(tensor.detach()) for name, tensor in merged_state(self._model.language_model).items()}
        if not self._ranks.first:
            return
        with replaced_folder(folder) as temporary, quiet():
            self._model.language_model.save_pretrained(temporary, state_dict=state)
            self._tokenizer.save_pretrained(temporary)

    def _set_learning_rate(self) -> float:
        """Linear warm-up over ``learner.warmup_steps`` steps; returns the policy's rate."""
        factor = min(1.0, (self._version + 1) / max(self._config.learner.warmup_steps, 1))
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        return self._config.learner.lr * factor

    def _refuse_stale(self, batch: Batch) -> None:
        staleness, allowed = int(batch.staleness.max()), self._config.ppo.max_staleness
        if staleness > allowed:
            prompt_id = batch.prompt_ids[int(batch.staleness.argmax())]
            raise StalenessError(
                f"the response to prompt {prompt_id} lags {staleness} versions behind version {self._version}, and "
                f"ppo.max_staleness = {allowed}; the pipeline must not let it through"
            )

    def _count_skip(self, error: NonFiniteError, experiences: Sequence[Experience]) -> None:
        """Write the sample out; too many skipped steps in a row end the run.

        Raises:
            NumericalError: this was one too many.
        """
        self._skipped_in_a_row += 1
        bad = next(e for e in experiences if e.rollout.prompt.prompt_id == error.prompt_id)
        sample = _bad_sample(bad, error.cause)
        path = self._config.run_dir / BAD_SAMPLE_FILE
        if self._ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(sample, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        allowed = self._config.learner.max_skipped_steps
        if self._skipped_in_a_row > allowed:
            raise NumericalError(
                f"{self._skipped_in_a_row} steps in a row were not finite, and learner.max_skipped_steps = {allowed}; "
                f"lower learner.lr or learner.max_grad_norm, or look at the sample, which {path} holds: "
                f"{json.dumps(sample, ensure_ascii=False)}"
            )


def _new_optimizer(model: PolicyModel, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with the critic's own rate; only matrices of the policy decay, never norms and biases."""
    section = config.learner
    policy = [p for p in model.language_model.parameters() if p.requires_grad]
    critic = [*model.value_head.parameters(), *(model.critic.parameters() if model.critic is not None else ())]
    groups = [
        {"params": [p for p in policy if p.ndim >= 2], "full_lr": section.lr, "weight_decay": section.weight_decay},
        {"params": [p for p in policy if p.ndim < 2], "full_lr": section.lr, "weight_decay": 0.0},
        {"params": critic, "full_lr": section.value_lr or section.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
    )


def _draw_probe(model_config: Any, tokenizer: Any, seed: int) -> Tensor:
    """[160] ordinary tokens (fewer for a shorter context), the same for one seed."""
    text_config = model_config.get_text_config()
    reserved = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ordinary = [token for token in range(min(len(tokenizer), text_config.vocab_size)) if token not in reserved]
    length = min(PROBE_TOKENS, getattr(text_config, "max_position_embeddings", PROBE_TOKENS) - 1)
    drawn = torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(ordinary)[drawn]


def _describe(batch: Batch) -> dict[str, float]:
    """What a batch says before any model has seen it; score figures are over the scores that are numbers."""
    scores = batch.scores[torch.isfinite(batch.scores)]
    seen = {"score_mean": float(scores.mean()), "score_std": float(scores.std(correction=0))} if len(scores) else {}
    return seen | {
        "staleness_mean": float(batch.staleness.float().mean()),
        "staleness_max": float(batch.staleness.max()),
        "response_length": float(batch.response_mask.sum(dim=1).float().mean()),
        "truncated_share": float(batch.truncated.float().mean()),
    }


def _sampler_gap(
    experiences: Sequence[Experience], batch: Batch, old_logprobs: Tensor, version: int
) -> dict[str, float]:
    """Mean |learner − sampler| over the responses that these very weights sampled; nothing where there are none.

    A response that went on under newer weights is left out: its later tokens read keys that the older ones made.
    """
    fresh = [row for row, e in enumerate(experiences) if set(e.rollout.policy_versions) == {version}]
    if not fresh:
        return {}
    gaps = (old_logprobs - batch.rollout_logprobs)[fresh].abs()
    return {"sampler_gap": float(gaps[batch.response_mask[fresh]].mean())}


def _sample_row(experience: Experience, kl: float | None, staleness: int) -> Mapping[str, Any]:
    rollout = experience.rollout
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "score": experience.score,
        "kl": kl,
        "staleness": staleness,
    }


def _bad_sample(experience: Experience, cause: str) -> dict[str, Any]:
    """JSON-ready; numbers that are none are written as text."""

    def numbers(values: Sequence[float]) -> list[str]:
        return [f"{value:.6g}" for value in values]

    rollout = experience.rollout
    return {
        "cause": cause,
        "prompt_id": rollout.prompt.prompt_id,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "response_ids": list(rollout.response_ids),
        "score": f"{experience.score:.6g}",
        "rollout_logprobs": numbers(rollout.rollout_logprobs),
        "ref_logprobs": numbers([] if experience.ref_logprobs is None else experience.ref_logprobs.tolist()),
        "policy_versions": list(rollout.policy_versions),
    }

"""One PPO update of a policy: the arithmetic of a learner's step.

    old log-probs, values ─► token rewards ─► advantages ─► clipped losses ─► gradient ─► AdamW

The value head takes part where the advantage estimator reads values; with the others there is no critic.

Losses are sums over micro-batches divided by the tokens of the whole minibatch, so how a batch is cut, and how many
ranks share it, changes nothing but memory and time. With several ranks each computes its own rows and is told of the
others'; what follows from all rows, such as advantages, each works out for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_ray.algorithms.advantages import NEED_VALUES, estimate
from rlhf_ray.algorithms.kl import k1, k2, k3
from rlhf_ray.algorithms.losses import explained_variance, policy_loss, value_loss
from rlhf_ray.algorithms.masking import masked_mean
from rlhf_ray.algorithms.offpolicy import importance_weights
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.config import RunConfig
from rlhf_ray.data.batching import micro_batches_of_ranks, select
from rlhf_ray.errors import ResourceError
from rlhf_ray.models.lora import without_lora
from rlhf_ray.models.policy import PolicyModel, PolicyOutput
from rlhf_ray.models.sharding import whole
from rlhf_ray.roles.ranks import Ranks
from rlhf_ray.types import Batch

log = logging.getLogger("rlhf_ray.learner")

T = TypeVar("T")


class NonFiniteError(Exception):
    """A number of the update is not one; the step is to be skipped. Caught by the learner."""

    def __init__(self, cause: str, prompt_id: int) -> None:
        super().__init__(cause, prompt_id)
        self.cause = cause
        self.prompt_id = prompt_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The policy's view of a batch: [B, T], 0 where masked."""

    logprobs: Tensor
    values: Tensor | None
    """None without a critic."""
    entropy: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the losses pull towards: [B, T], without gradient, the same in every pass over a batch."""

    old_logprobs: Tensor
    old_values: Tensor | None
    """None without a critic."""
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None
    """Behaviour → proximal importance weights; None where every sample is on-policy."""

    def select(self, rows: Sequence[int], length: int) -> Targets:
        """Those rows, cut to ``length`` response tokens."""
        names = (field.name for field in fields(self) if getattr(self, field.name) is not None)
        trimmed: dict[str, Any] = {name: getattr(self, name)[list(rows), :length] for name in names}
        return replace(self, **trimmed)


Computed = tuple[Sequence[int], Batch, Evaluation]
"""Rows of a batch, those rows alone, and the policy's view of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backward:
    """What one rank saw on its way to the gradient."""

    metrics: dict[str, float]
    """Its share of each sum."""
    suspect: tuple[float, int]
    """Nats and prompt id of the row that moved furthest."""
    problem: NonFiniteError | None
    """The first number that is none."""


class PPOUpdate:
    """Clipped policy and value losses (Schulman et al. 2017), decoupled when samples are stale (Fu et al. 2025)."""

    def __init__(
        self,
        model: PolicyModel,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        *,
        dtype: torch.dtype,
        rng: torch.Generator,
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            dtype: of forward and backward; bfloat16 turns autocast on.
            rng: draws the minibatches; in the same state on all ranks.
            ranks: those that share the work; by default there is one.
        """
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._dtype = dtype
        self._rng = rng
        self._ranks = ranks or Ranks()
        self._critic = config.ppo.estimator in NEED_VALUES
        self._critic_only = False
        self._budget = config.learner.micro_batch_tokens

    def run(self, batch: Batch, *, kl_coef: float, critic_only: bool = False) -> tuple[dict[str, float], Tensor]:
        """Update the model in place; returns the metrics and the [B, T] log-probabilities before the update.

        Args:
            critic_only: the policy stays as it is.

        Raises:
            NonFiniteError: an input, log-probability, loss or gradient norm is not finite; from then on no weight
                changes.
            ResourceError: memory runs out, and half of the micro-batch budget did not help.
        """
        given = {"rollout_logprobs": batch.rollout_logprobs, "ref_logprobs": batch.ref_logprobs}
        if (problem := non_finite(batch, **given, score=batch.scores.unsqueeze(1))) is not None:
            raise problem
        self._critic_only = critic_only
        before, computed = self._within_memory(lambda: self._before(batch))
        if (problem := _non_finite_view(batch, before)) is not None:
            raise problem
        targets, metrics = self._targets(batch, before, kl_coef)
        stats = self._epochs(batch, targets) if computed is None else self._step(batch, targets, computed)
        return metrics | stats, targets.old_logprobs

    @torch.no_grad()
    def logprobs_without_lora(self, batch: Batch) -> Tensor:
        """[B, T] log-probabilities under the model that LoRA was added to, nats, 0 where masked: the reference's."""

        def read() -> Tensor:
            with without_lora(self._model.language_model):
                parts = [(rows, select(batch, rows)) for rows in self._pieces(batch)]
                return self._of_all_ranks(batch, [(rows, self._read(part).logprobs) for rows, part in parts])

        return self._within_memory(read)

    def autocast(self) -> AbstractContextManager[None]:
        """bfloat16 arithmetic over float32 weights, where the learner's precision says so."""
        context: AbstractContextManager[None] = torch.autocast(
            next(self._model.parameters()).device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16
        )
        return context

    def _pieces(self, batch: Batch) -> list[list[int]]:
        """This rank's micro-batches, as rows of the batch; every rank has equally many."""
        lengths = batch.attention_mask.sum(dim=1).tolist()
        return micro_batches_of_ranks(lengths, max_tokens=self._budget, ranks=self._ranks.size)[self._ranks.rank]

    def _before(self, batch: Batch) -> tuple[Evaluation, list[Computed] | None]:
        """The batch under the weights before the update; and this rank's part of it, differentiable, where that saves
        a second forward.
        """
        single_pass = self._single_pass(len(self._pieces(batch)))
        with torch.set_grad_enabled(single_pass):
            computed = list(self._computed(batch))
        return self._joined(batch, computed), computed if single_pass else None

    def _single_pass(self, pieces: int) -> bool:
        """One optimiser step over a batch that fits in memory: the proximal policy is then the current one, so the
        forward that gives the old log-probabilities and values is also the one that is differentiated.
        """
        return self._config.ppo.epochs == self._config.ppo.minibatches == pieces == 1

    def _joined(self, batch: Batch, computed: Sequence[Computed]) -> Evaluation:
        """All ranks' rows in the batch's order and width, without gradient."""

        def joined(name: str) -> Any:
            of_parts = [(rows, getattr(seen, name)) for rows, _, seen in computed]
            return None if of_parts[0][1] is None else self._of_all_ranks(batch, of_parts)

        return Evaluation(logprobs=joined("logprobs"), values=joined("values"), entropy=joined("entropy"))

    def _of_all_ranks(self, batch: Batch, of_parts: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
        """[B, T], without gradient: what each rank has found out of its rows, cut to their longest response."""
        everything = batch.rollout_logprobs.new_zeros(batch.response_mask.shape)
        for rows, values in of_parts:
            everything[rows, : values.shape[1]] = values.detach()
        return self._ranks.sum(everything)

    def _within_memory(self, work: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """``work()``; where memory runs out, once in a run, with half the micro-batch budget: ``again()``, or the same.

        Not where there are other ranks: they wait in the middle of what this one would begin anew.

        Raises:
            ResourceError: it ran out before, or runs out again.
        """
        halved = self._ranks.size > 1 or self._budget < self._config.learner.micro_batch_tokens
        try:
            return work()
        except torch.OutOfMemoryError as error:
            if halved or self._budget == 1:
                raise ResourceError(
                    f"the learner ran out of memory with micro-batches of {self._budget} tokens; set "
                    "learner.micro_batch_tokens lower, or learner.gradient_checkpointing = true"
                ) from error
        # Not in the handler: the error's frames hold the tensors that did not fit.
        self._budget //= 2
        log.warning(
            "the learner ran out of memory; it repeats the step with micro-batches of %d tokens and stays with that; "
            "set learner.micro_batch_tokens to it",
            self._budget,
        )
        self._optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._within_memory(again or work)

    def _forward(self, batch: Batch) -> Evaluation:
        output = self._read(
            batch,
            with_values=self._critic,
            values_apart=self._critic_only,
            with_entropy=True,
            entropy_gradient=self._config.ppo.entropy_coef > 0,
        )
        assert output.entropy is not None
        return Evaluation(logprobs=output.logprobs, values=output.values, entropy=output.entropy)

    def _read(self, batch: Batch, **wanted: bool) -> PolicyOutput:
        with self.autocast():
            output: PolicyOutput = self._model(
                batch.input_ids,
                batch.prompt_len,
                batch.response_ids,
                batch.response_mask,
                temperature=self._config.sampling.temperature,
                **wanted,
            )
        return output

    @torch.no_grad()
    def _targets(self, batch: Batch, before: Evaluation, kl_coef: float) -> tuple[Targets, dict[str, float]]:
        ppo, mask = self._config.ppo, batch.response_mask
        old_logprobs, old_values = before.logprobs.detach(), None if before.values is None else before.values.detach()
        rewards = token_rewards(
            batch.scores,
            old_logprobs,
            batch.ref_logprobs,
            mask,
            kl_coef=kl_coef,
            truncated=batch.truncated,
            missing_eos_penalty=ppo.missing_eos_penalty,
            score_clip=ppo.score_clip,
        )
        advantages, returns = estimate(
            ppo.estimator,
            rewards,
            mask,
            values=old_values,
            groups=torch.tensor(batch.prompt_ids, device=mask.device),
            gamma=ppo.gamma,
            lam=ppo.lam,
        )
        weights, importance = None, {"importance_mean": 1.0, "importance_clipped": 0.0}
        if batch.staleness.any():
            weights, clipped = importance_weights(old_logprobs, batch.rollout_logprobs, mask, cap=ppo.importance_cap)
            importance = {"importance_mean": float(masked_mean(weights, mask)), "importance_clipped": float(clipped)}
        targets = Targets(
            old_logprobs=old_logprobs,
            old_values=old_values,
            advantages=advantages,
            returns=returns,
            weights=weights,
        )
        metrics = {
            "kl": float(k1(old_logprobs, batch.ref_logprobs).sum(dim=1).mean()),
            "kl_k3": float(k3(old_logprobs, batch.ref_logprobs).sum(dim=1).mean()),
            "return_mean": float(masked_mean(returns, mask)),
        }
        if old_values is not None:
            metrics["explained_variance"] = explained_variance(old_values, returns, mask)
            metrics["value_mean"] = float(masked_mean(old_values, mask))
        return targets, metrics | importance

    def _epochs(self, batch: Batch, targets: Targets) -> dict[str, float]:
        """``ppo.epochs`` passes of ``ppo.minibatches`` optimiser steps each; the mean of their metrics."""
        ppo, rows = self._config.ppo, len(batch.prompt_ids)
        size = rows // ppo.minibatches
        steps = []
        for _ in range(ppo.epochs):
            order = torch.randperm(rows, generator=self._rng).tolist()
            for start in range(0, rows, size):
                chosen = order[start : start + size]
                minibatch = select(batch, chosen)
                steps.append(self._step(minibatch, targets.select(chosen, minibatch.response_ids.shape[1])))
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def _computed(self, batch: Batch) -> Iterator[Computed]:
        """This rank's micro-batches, each computed when it is asked for."""
        for rows in self._pieces(batch):
            part = select(batch, rows)
            yield rows, part, self._forward(part)

    def _step(self, batch: Batch, targets: Targets, computed: Sequence[Computed] | None = None) -> dict[str, float]:
        """One optimiser step.

        Args:
            computed: this rank's part of the batch, where that has been done already.
        """
        count = batch.response_mask.sum()

        def anew() -> Backward:
            return self._backward(self._computed(batch), targets, count)

        own = self._within_memory(
            anew if computed is None else lambda: self._backward(computed, targets, count), again=anew
        )
        of_ranks = self._ranks.gather(own)
        for one in of_ranks:
            if one.problem is not None:
                raise one.problem
        norm = whole(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.learner.max_grad_norm))
        if not torch.isfinite(norm):
            raise NonFiniteError("the gradient norm is not finite", max(one.suspect for one in of_ranks)[1])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        totals = {name: sum(one.metrics[name] for one in of_ranks) for name in own.metrics}
        return totals | {"grad_norm": float(norm)}

    def _backward(self, computed: Iterable[Computed], targets: Targets, count: Tensor) -> Backward:
        """This rank's share of the gradient over ``count`` response tokens, which backward adds up over the ranks; a
        part's backward comes before the next one's forward.

        It goes on to the end where a number is not finite: the other ranks' backward waits for this one's.
        """
        metrics: dict[str, float] = {}
        suspect, problem = (-1.0, -1), None
        for rows, batch, current in computed:
            target = targets.select(rows, batch.response_ids.shape[1])
            loss, stats = self._loss(batch, current, target, count)
            suspect = max(suspect, _furthest(batch, current, target))
            problem = problem or _non_finite_view(batch, current)
            if problem is None and not torch.isfinite(loss):
                problem = NonFiniteError("the loss is not finite", suspect[1])
            loss.backward()
            metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in stats.items()}
        return Backward(metrics=metrics, suspect=suspect, problem=problem)

    def _loss(
        self, batch: Batch, current: Evaluation, targets: Targets, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ppo, mask = self._config.ppo, batch.response_mask
        policy, stats = policy_loss(
            current.logprobs,
            targets.old_logprobs,
            targets.advantages,
            mask,
            clip=ppo.clip,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip,
            weights=targets.weights,
            count=count,
        )
        entropy = masked_mean(current.entropy, mask, count=count)
        loss = policy - ppo.entropy_coef * entropy
        if ppo.kl.loss != "none":
            estimate = {"k2": k2, "k3": k3}[ppo.kl.loss](current.logprobs, batch.ref_logprobs)
            loss = loss + ppo.kl.loss_coef * masked_mean(estimate, mask, count=count)
        metrics = {
            "loss_policy": policy.detach(),
            "entropy": entropy.detach(),
            "approx_kl": stats.approx_kl,
            "clipfrac": stats.clipfrac,
        }
        if ppo.dual_clip is not None:
            metrics["dual_clipfrac"] = stats.dual_clipfrac
        if current.values is None or targets.old_values is None:
            return loss, metrics
        value = value_loss(current.values, targets.old_values, targets.returns, mask, clip=ppo.value_clip, count=count)
        of_critic = ppo.value_coef * value
        return of_critic if self._critic_only else loss + of_critic, metrics | {"loss_value": value.detach()}


def non_finite(batch: Batch, **per_row: Tensor) -> NonFiniteError | None:
    """Names the first row of a [B, ...] tensor that holds NaN or infinity; None where all is finite."""
    for name, tensor in per_row.items():
        bad = (~torch.isfinite(tensor)).any(dim=1)
        if bad.any():
            return NonFiniteError(f"{name} holds NaN or infinity", batch.prompt_ids[int(bad.int().argmax())])
    return None


def _non_finite_view(batch: Batch, view: Evaluation) -> NonFiniteError | None:
    values = {} if view.values is None else {"values": view.values}
    return non_finite(batch, logprobs=view.logprobs, **values)


@torch.no_grad()
def _furthest(batch: Batch, current: Evaluation, targets: Targets) -> tuple[float, int]:
    """Nats and prompt id of the row that moved furthest: whom to suspect where no single number is to blame."""
    gaps = (current.logprobs - targets.old_logprobs).abs().amax(dim=1)
    row = int(gaps.argmax())
    return float(gaps[row]), batch.prompt_ids[row]

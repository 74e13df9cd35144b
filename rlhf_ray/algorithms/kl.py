"""Estimators of KL(policy ‖ reference) from the policy's own samples, and controllers of its coefficient.

Estimators after John Schulman, "Approximating KL Divergence" (2020). With d = ref_logprob - logprob of a sampled token:

    k1 = -d              unbiased, negative on some tokens: for the reward
    k2 = d² / 2          small bias, low variance
    k3 = exp(d) - 1 - d  unbiased, never negative: for the log

As a *loss* they rank otherwise, since the gradient goes through ``logprobs`` and not through the sampling (Tang &
Munos 2025): the expected gradient of k1 is zero, so it penalises nothing; that of k2 is the gradient of
KL(policy ‖ reference); that of k3 is the gradient of KL(reference ‖ policy).

All are per token, in nats, with the shape of their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.errors import ConfigError

_EXP_LIMIT = 20.0
_ERROR_LIMIT = 0.2


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``logprobs - ref_logprobs``. For the reward and the log only: as a loss its expected gradient is zero."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``(logprobs - ref_logprobs)² / 2``. As a loss its expected gradient is that of KL(policy ‖ reference)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``exp(d) - 1 - d`` with ``d = ref_logprobs - logprobs``; never negative.

    Above d = 20 the exponential goes on along its tangent, so the value stays finite. Clamping d there instead would
    leave only the gradient of ``-d``, which pushes the policy further away from the reference.
    """
    d = ref_logprobs - logprobs
    bounded = d.clamp(max=_EXP_LIMIT)
    return torch.expm1(bounded) + torch.exp(bounded) * (d - bounded) - d


class FixedKL:
    """A coefficient that stays as configured. Same surface as ``AdaptiveKL``."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, samples: int) -> None:
        """Does nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the checkpoint's coefficient: a resumed run goes on as it was."""
        self.coef = state["coef"]


class AdaptiveKL:
    """A coefficient that follows a target (Ziegler et al. 2019, sec. 2.2, with the horizon of their published code).

        error = clip(kl / target - 1, -0.2, 0.2)
        coef ← coef · (1 + error · samples / horizon)

    Args:
        coef: coefficient to start from; above 0, since every change is a factor.
        target: wanted KL per response, nats.
        horizon: samples over which the coefficient reacts.

    Raises:
        ConfigError: ``coef`` is not above 0.
    """

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        if coef <= 0:
            raise ConfigError(
                f"ppo.kl.coef = {coef:g} can never grow under ppo.kl.controller = adaptive, which multiplies it; "
                "start from a value above 0 or choose the fixed controller"
            )
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Move the coefficient after a step of ``samples`` responses whose mean KL was ``kl`` nats.

        A non-finite ``kl`` leaves the coefficient alone: it comes from a step that the learner skipped and counted, and
        one such value would spoil the coefficient for good.

        Raises:
            ConfigError: the horizon is so short that one step could make the coefficient zero or negative.
        """
        if samples * _ERROR_LIMIT >= self.horizon:
            raise ConfigError(
                f"ppo.kl.horizon = {self.horizon} is too short for steps of {samples} samples: one step could make the "
                f"coefficient negative; set it above {samples * _ERROR_LIMIT:g}"
            )
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -_ERROR_LIMIT), _ERROR_LIMIT)
        self.coef *= 1.0 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint: the coefficient; target and horizon come from the configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the checkpoint's coefficient: a resumed run goes on as it was."""
        self.coef = state["coef"]


def kl_controller(
    kind: Literal["fixed", "adaptive"], *, coef: float, target: float, horizon: int
) -> FixedKL | AdaptiveKL:
    """The controller that ``ppo.kl.controller`` names. ``target`` and ``horizon`` matter to the adaptive one only.

    Raises:
        ConfigError: the adaptive controller is asked to start from 0.
    """
    if kind == "fixed":
        return FixedKL(coef)
    return AdaptiveKL(coef, target, horizon)

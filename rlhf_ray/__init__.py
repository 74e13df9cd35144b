"""RLHF as a service on Ray: preferences, a served reward model, and asynchronous PPO.

The names below are the public ones; each is imported when it is first used, so that ``import rlhf_ray`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.config import RunConfig, load_config
    from rlhf_ray.errors import RlhfRayError
    from rlhf_ray.ppo_trainer.config import PPOConfig
    from rlhf_ray.ppo_trainer.generation import LengthSampler
    from rlhf_ray.ppo_trainer.model import AutoModelForCausalLMWithValueHead, create_reference_model
    from rlhf_ray.ppo_trainer.trainer import PPOTrainer
    from rlhf_ray.stages.live import scale, status
    from rlhf_ray.stages.ppo import run_ppo

_HOME = {
    "AutoModelForCausalLMWithValueHead": "rlhf_ray.ppo_trainer.model",
    "LengthSampler": "rlhf_ray.ppo_trainer.generation",
    "PPOConfig": "rlhf_ray.ppo_trainer.config",
    "PPOTrainer": "rlhf_ray.ppo_trainer.trainer",
    "RlhfRayError": "rlhf_ray.errors",
    "RunConfig": "rlhf_ray.config",
    "create_reference_model": "rlhf_ray.ppo_trainer.model",
    "load_config": "rlhf_ray.config",
    "run_ppo": "rlhf_ray.stages.ppo",
    "scale": "rlhf_ray.stages.live",
    "status": "rlhf_ray.stages.live",
}

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "RlhfRayError",
    "RunConfig",
    "create_reference_model",
    "load_config",
    "run_ppo",
    "scale",
    "status",
]


def __getattr__(name: str) -> Any:
    if name == "AutoModelForSeq2SeqLMWithValueHead":
        # An AttributeError would reach `from rlhf_ray import ...` without its words.
        raise ImportError(
            "rlhf_ray trains decoders only, so there is no AutoModelForSeq2SeqLMWithValueHead; import "
            "AutoModelForCausalLMWithValueHead and choose a causal language model"
        )
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

"""What a script hands to ``PPOTrainer``: taken, or refused in a sentence that says what to hand over instead."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rlhf_ray.errors import ConfigError, InputError, ModelError
from rlhf_ray.ppo_trainer.config import PPOConfig
from rlhf_ray.ppo_trainer.model import AutoModelForCausalLMWithValueHead


def checked_config(config: Any) -> PPOConfig:
    """Checked once more: a script may have changed it.

    Raises:
        ConfigError: it is another class's, or cannot be.
    """
    if not isinstance(config, PPOConfig):
        raise ConfigError(
            f"PPOTrainer: config is {_kind(config)}; give the PPOConfig that `from rlhf_ray import PPOConfig` brings"
        )
    config.check()
    return config


def checked_model(name: str, model: Any) -> AutoModelForCausalLMWithValueHead:
    """
    Raises:
        ConfigError: it has no value head.
    """
    if not isinstance(model, AutoModelForCausalLMWithValueHead):
        raise ConfigError(
            f"PPOTrainer: {name} is {_kind(model)}; give AutoModelForCausalLMWithValueHead.from_pretrained(...), which "
            "takes a name, a folder or a model"
        )
    return model


def checked_tokenizer(tokenizer: Any) -> Any:
    """
    Raises:
        ConfigError: it is none.
        ModelError: it has no padding token.
    """
    if not hasattr(tokenizer, "pad_token_id"):
        raise ConfigError(f"PPOTrainer: tokenizer is {_kind(tokenizer)}; give the model's own, from AutoTokenizer")
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "PPOTrainer: the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token"
        )
    return tokenizer


def token_ids(name: str, row: int, given: Any, *, vocabulary: int) -> Tensor:
    """A 1-D tensor of at least one token id.

    Raises:
        InputError: it is none, or holds an id that the model has no embedding for.
    """
    if not isinstance(given, Tensor) or given.ndim != 1 or given.is_floating_point():
        form = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else _kind(given)
        raise InputError(
            f"{name} {row} is {form}, and a 1-D tensor of token ids is needed; look for a squeeze() too many or too few"
        )
    if not len(given):
        raise InputError(f"{name} {row} has no token; leave it out of the batch, or ask for min_new_tokens=1")
    if int(given.min()) < 0 or int(given.max()) >= vocabulary:
        raise InputError(
            f"{name} {row} has a token id that is not between 0 and {vocabulary - 1}; use the model's own tokenizer, "
            "and leave label padding such as -100 out"
        )
    return given


def finite_number(name: str, row: int, given: Any) -> float:
    """A number, or a tensor of one.

    Raises:
        InputError: it is neither, or NaN or infinite.
    """
    if isinstance(given, Tensor) and given.numel() != 1:
        raise InputError(
            f"{name} {row} is a tensor of shape {tuple(given.shape)}, and one number for each response is needed; sum "
            "it up, or choose one of its entries"
        )
    try:
        number = float(given.detach() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} {row} is {_kind(given)}, and a number is needed") from error
    if not math.isfinite(number):
        raise InputError(f"{name} {row} is {number}, which is no number to train on; look at what gave it")
    return number


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__module__}.{type(value).__name__}"

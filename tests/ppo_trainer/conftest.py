"""A tiny trainer, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_ray import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

MakeTrainer = Callable[..., PPOTrainer]


@pytest.fixture
def make_trainer(tiny_model_dir: Path) -> MakeTrainer:
    """Batches of four in two minibatches unless told otherwise; arguments of ``PPOTrainer`` by their names."""

    def make(arguments: dict[str, Any] | None = None, **settings: Any) -> PPOTrainer:
        settings = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, **settings}
        given = {
            "config": PPOConfig(**settings),
            "model": AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model_dir),
            "tokenizer": AutoTokenizer.from_pretrained(tiny_model_dir),
        }
        return PPOTrainer(**{**given, **(arguments or {})})

    return make

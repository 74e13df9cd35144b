"""TRL's configuration by its names and defaults; what is not carried out is refused by name, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import HfArgumentParser

from rlhf_ray import PPOConfig
from rlhf_ray.errors import ConfigError

# As trl 0.11.4 has them.
DEFAULTS = {
    "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True,
    "init_kl_coef": 0.2,
    "kl_penalty": "kl",
    "target": 6.0,
    "horizon": 10_000.0,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "batch_size": 128,
    "mini_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "ppo_epochs": 4,
    "max_grad_norm": None,
    "seed": 0,
    "model_name": "gpt2",
    "steps": 20_000,
}


def test_the_defaults_are_those_of_the_old_class() -> None:
    config = PPOConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_each_setting_arrives_where_the_learner_reads_it() -> None:
    config = PPOConfig(
        seed=7,
        learning_rate=1e-4,
        max_grad_norm=0.5,
        batch_size=24,
        mini_batch_size=3,
        gradient_accumulation_steps=2,
        ppo_epochs=5,
        gamma=0.9,
        lam=0.8,
        cliprange=0.1,
        cliprange_value=0.3,
        vf_coef=0.7,
        score_clip=2.5,
        init_kl_coef=0.4,
        target=3,
        horizon=500,
    )
    run = config.run_config(micro_batch_tokens=99)
    assert (run.seed, run.learner.lr, run.learner.max_grad_norm, run.learner.micro_batch_tokens) == (7, 1e-4, 0.5, 99)
    ppo = run.ppo
    assert (ppo.batch_size, ppo.minibatches, ppo.epochs) == (24, 4, 5)
    assert (ppo.gamma, ppo.lam, ppo.clip, ppo.value_clip, ppo.value_coef) == (0.9, 0.8, 0.1, 0.3, 0.7)
    assert (ppo.score_clip, ppo.kl.coef, ppo.kl.target, ppo.kl.horizon) == (2.5, 0.4, 3.0, 500)


def test_what_the_old_trainer_did_not_do_is_off() -> None:
    run = PPOConfig().run_config(micro_batch_tokens=1)
    assert run.ppo.missing_eos_penalty == 0
    assert run.ppo.entropy_coef == 0
    assert run.ppo.kl.loss == "none"
    assert run.sampling.temperature == 1
    assert run.learner.max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kl_penalty": "full"}, r"kl_penalty = 'full' is not supported, only 'kl'"),
        ({"early_stopping": True}, r"early_stopping = True is not supported.*lower ppo_epochs"),
        ({"ratio_threshold": 3.0}, r"ratio_threshold = 3\.0 is not supported"),
        ({"use_score_scaling": True}, r"use_score_scaling = True.*scale the scores before"),
        ({"use_score_norm": True}, r"use_score_norm = True.*normalise the scores before"),
        ({"whiten_rewards": True}, r"whiten_rewards = True is not supported"),
        ({"forward_batch_size": 4}, r"forward_batch_size = 4.*mini_batch_size"),
        ({"push_to_hub_if_best_kwargs": {"repo_id": "a/b"}}, r"push_to_hub_if_best_kwargs.*save_pretrained"),
        ({"tracker_kwargs": {"wandb": {}}}, r"tracker_kwargs.*only tensorboard"),
        ({"log_with": "wandb"}, r"log_with = 'wandb' is not supported: use tensorboard"),
        ({"log_with": "tensorboard"}, r'needs project_kwargs=\{"logging_dir": FOLDER\}'),
        ({"project_kwargs": {"total_limit": 1}}, r"project_kwargs takes only 'logging_dir' here, not 'total_limit'"),
        ({"accelerator_kwargs": {"cpu": True}}, r"accelerator_kwargs takes only 'mixed_precision' here, not 'cpu'"),
        ({"accelerator_kwargs": {"mixed_precision": "fp16"}}, r"mixed_precision = 'fp16'.*use 'no' or 'bf16'"),
        ({"mini_batch_size": 0}, r"mini_batch_size = 0 must be 1 or more"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps = 0 must be 1 or more"),
        (
            {"batch_size": 10, "mini_batch_size": 4},
            r"batch_size = 10 is no multiple of .* = 4 · 1; set mini_batch_size",
        ),
        ({"batch_size": 16}, r"batch_size = 16 is no multiple of"),
        ({"batch_size": 0}, r"PPOConfig\.batch_size = 0: it should be greater than or equal to 1"),
        ({"learning_rate": 0.0}, r"PPOConfig\.learning_rate = 0\.0: it should be greater than 0"),
        ({"cliprange": -1.0}, r"PPOConfig\.cliprange = -1\.0: it should be greater than 0"),
        ({"gamma": 1.5}, r"PPOConfig\.gamma = 1\.5: it should be less than or equal to 1"),
        ({"target": "six"}, r"PPOConfig\.target = 'six': it should be a valid number"),
        ({"init_kl_coef": 0.0}, r"init_kl_coef = 0 can never grow under adap_kl_ctrl.*adap_kl_ctrl=False"),
        ({"horizon": 20}, r"horizon = 20 is too short for batch_size = 128.*above 25\.6"),
    ],
)
def test_what_is_not_done_is_refused_with_the_remedy(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        PPOConfig(**settings)


def test_without_the_adaptive_controller_the_coefficient_may_be_zero() -> None:
    assert PPOConfig(adap_kl_ctrl=False, init_kl_coef=0.0).run_config(micro_batch_tokens=1).ppo.kl.coef == 0


def test_the_argument_parser_of_transformers_fills_it_in() -> None:
    """As the example scripts of TRL made theirs."""
    arguments = ["--learning_rate", "2e-5", "--batch_size", "8", "--mini_batch_size", "4", "--adap_kl_ctrl", "false"]
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(arguments)
    assert (config.learning_rate, config.batch_size, config.mini_batch_size) == (2e-5, 8, 4)
    assert config.adap_kl_ctrl is False

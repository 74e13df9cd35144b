"""What every stage does first: resolve the model, the precisions and the prompts, and refuse what cannot work."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import RunConfig
from rlhf_ray.data.prompts import check_prompts, encode_prompt, read_prompts
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.loading import context_length, load_tokenizer, resolve_model, resolve_precision
from rlhf_ray.models.reward import QUALITY_FILE
from rlhf_ray.roles.function_scorer import load_function

log = logging.getLogger("rlhf_ray.prepare")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A configuration that is known to be usable on this machine."""

    config: RunConfig
    """With every "auto" resolved."""
    model_folder: str
    tokenizer: Any
    context_length: int

    def encode(self, path: str) -> list[tuple[str, tuple[int, ...]]]:
        """(text, token ids) of each prompt of a file, checked against the context.

        Raises:
            DataError: a bad line, or a prompt that is too long.
        """
        texts = read_prompts(path)
        section = self.config.prompts
        encoded = [tuple(encode_prompt(text, self.tokenizer, format=section.format)) for text in texts]
        check_prompts(
            path,
            encoded,
            max_tokens=section.max_tokens,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context_length=self.context_length,
        )
        return list(zip(texts, encoded, strict=True))


def prepare(config: RunConfig, *prompt_files: str) -> Prepared:
    """Resolve and check; nothing heavy has started yet.

    Args:
        prompt_files: looked through first, since to import a model may take half a minute.

    Raises:
        DataError: a prompt file has a bad line.
        ModelError: the model or its tokenizer cannot be used.
    """
    for path in prompt_files:
        read_prompts(path)
    folder = resolve_model(
        config.model.path, cache_dir=config.model.cache_dir, trust_remote_code=config.model.trust_remote_code
    )
    tokenizer = load_tokenizer(
        folder, need_chat_template=config.prompts.format == "chat", trust_remote_code=config.model.trust_remote_code
    )
    return Prepared(
        # Absolute: workers have another working directory.
        config=_resolve_precisions(config.model_copy(update={"output_dir": config.output_dir.expanduser().resolve()})),
        model_folder=folder,
        tokenizer=tokenizer,
        context_length=context_length(folder, trust_remote_code=config.model.trust_remote_code),
    )


def _resolve_precisions(config: RunConfig) -> RunConfig:
    """Replace each "auto" by what the section's device does quickly, so that the written configuration says it."""

    def resolved(precision: str, num_gpus: float) -> str:
        if precision == "auto" and config.device_of(num_gpus) == "cuda":
            return "bfloat16"  # the driver cannot ask the worker's GPU; every one that vLLM runs on has it
        return str(resolve_precision(precision, torch.device("cpu"))).removeprefix("torch.")

    updates: dict[str, Any] = {
        name: section.model_copy(update={field: resolved(getattr(section, field), gpus)})
        for name, section, field, gpus in (
            ("generator", config.generator, "dtype", config.generator.num_gpus),
            ("reference", config.reference, "precision", config.reference.num_gpus),
            ("learner", config.learner, "precision", config.learner.num_gpus),
            ("serve", config.serve, "precision", config.serve.num_gpus),
            ("reward", config.reward, "precision", config.reward.num_gpus),
            ("sft", config.sft, "precision", config.sft.num_gpus),
            ("dpo", config.dpo, "precision", config.dpo.num_gpus),
        )
    }
    return config.model_copy(update=updates)


def check_reward_model_reads(prepared: Prepared, reward_folder: Path, prompts: Sequence[Sequence[int]]) -> None:
    """The reward model must read the very token ids that the policy writes, and all of them.

    Args:
        prompts: token ids of every prompt.

    Raises:
        ModelError: the two vocabularies differ, or the reward model's context is too short for a whole response.
    """
    policy_tokenizer = prepared.tokenizer
    longest = max(map(len, prompts)) + prepared.config.sampling.max_new_tokens + 1
    if (context := context_length(reward_folder)) < longest:
        raise ModelError(
            f"the reward model at {reward_folder} reads {context} tokens, and the longest prompt, "
            f"sampling.max_new_tokens = {prepared.config.sampling.max_new_tokens} and EOS are {longest}; lower "
            "sampling.max_new_tokens, shorten the prompts, or name another with serve.model"
        )
    theirs = load_tokenizer(str(reward_folder), need_chat_template=False)
    if theirs.get_vocab() != policy_tokenizer.get_vocab() or theirs.eos_token_id != policy_tokenizer.eos_token_id:
        raise ModelError(
            f"the reward model at {reward_folder} has another tokenizer than the policy; the loop scores token ids, so "
            "train the reward model from the same base model (rlhf-ray reward) or name one that was, with serve.model"
        )


def critic_folder(prepared: Prepared) -> str | None:
    """Folder of the model that the critic's own trunk starts from; None where the critic is a head on the policy.

    Raises:
        ModelError: it reads other token ids than the policy writes.
    """
    config = prepared.config
    if config.learner.critic == "head":
        return None
    path, trust = config.learner.critic_path, config.model.trust_remote_code
    if path is None:
        return prepared.model_folder
    folder = resolve_model(path, cache_dir=config.model.cache_dir, trust_remote_code=trust, key="learner.critic_path")
    theirs = load_tokenizer(folder, need_chat_template=False, trust_remote_code=trust)
    if theirs.get_vocab() != prepared.tokenizer.get_vocab():
        raise ModelError(
            f"learner.critic_path = {path} has another tokenizer than the policy, whose token ids the critic reads; "
            "name a model of the same family, such as the run's reward model"
        )
    return folder


def check_reward_quality(folder: Path, *, min_accuracy: float) -> None:
    """Refuse a reward model that its own report says cannot be trusted; one without a report passes with a warning.

    Raises:
        ModelError: its accuracy on held-out pairs is below the floor.
    """
    path = folder / QUALITY_FILE
    if not path.is_file():
        log.warning("%s has no %s, so nobody knows how accurate the reward model is", folder, QUALITY_FILE)
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["accuracy"] < min_accuracy:
        raise ModelError(
            f"the reward model in {folder} is right on {report['accuracy']:.2f} of {report['pairs']} held-out pairs "
            f"(95 % interval {report['accuracy_low']:.2f} to {report['accuracy_high']:.2f}), and reward.min_accuracy = "
            f"{min_accuracy:g}; train it on more or clearer comparisons, or lower reward.min_accuracy to use it anyway"
        )


def check_scorers(config: RunConfig) -> None:
    """Refuse a scorer whose function or API key is not there.

    Raises:
        ConfigError: naming the key.
    """
    for place, scorer in enumerate(config.scorers):
        if scorer.kind == "function":
            try:
                load_function(scorer.function, folder=os.getcwd())
            except ConfigError as error:
                raise ConfigError(f"scorers.{place}.function = {error}") from error
        if scorer.kind == "remote" and scorer.api_key_env is not None:
            key = os.environ.get(scorer.api_key_env, "")
            if not (key.isascii() and key.isprintable() and key.strip()):  # what a header can carry
                raise ConfigError(
                    f"scorers.{place}.api_key_env = {scorer.api_key_env}, and that environment variable holds no API "
                    "key; set it to one line of ASCII characters before this command"
                )

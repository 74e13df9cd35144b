"""What an evaluation is given: two policies that can be compared, a judge, a place for the result; or a refusal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlhf_ray.config import RunConfig
from rlhf_ray.data.prompts import encode_prompt, read_prompts
from rlhf_ray.errors import ConfigError, ModelError, ScorerError
from rlhf_ray.models.loading import context_length, load_tokenizer, resolve_model
from rlhf_ray.roles.function_scorer import FunctionScorer
from rlhf_ray.roles.judge import VaderJudge
from rlhf_ray.stages.evaluate import Contender, Evaluation, Gold, Pairing, pairing, read_evaluation
from rlhf_ray.stages.prepare import Prepared, prepare
from rlhf_ray.types import Rollout, Score

Encoded = list[tuple[str, tuple[int, ...]]]
"""(text, token ids) of each prompt."""


def prepare_pair(config: RunConfig) -> tuple[Prepared, Mapping[str, str], Encoded]:
    """What the engines need: the run's tokenizer and the shortest context, path → folder of each policy, the prompts.

    Raises:
        InputError: a policy that is not there or reads and writes other token ids than the reference, prompts that
            cannot be used, or a file in the way.
    """
    pair = pairing(config)
    check_place(pair)
    read_prompts(pair.prompts)
    folders = {contender.path: _folder(config, contender) for contender in (pair.trained, pair.base)}
    if len(set(folders.values())) == 1:
        raise ConfigError(
            f"{pair.trained.key} = {pair.trained.path} and {pair.base.key} = {pair.base.path} are one model; name two"
        )
    prepared = prepare(config, pair.prompts)
    trust = config.model.trust_remote_code
    contexts = [context_length(folder, trust_remote_code=trust) for folder in folders.values()]
    prepared = replace(prepared, context_length=min(prepared.context_length, *contexts))
    encoded = prepared.encode(pair.prompts)[: config.evaluate.max_prompts]
    for contender in (pair.base, pair.trained):
        if folders[contender.path] != prepared.model_folder:
            check_tokenizer(prepared, contender, folders[contender.path], encoded)
    return prepared, folders, encoded


def _folder(config: RunConfig, contender: Contender) -> str:
    return resolve_model(
        contender.path,
        cache_dir=config.model.cache_dir,
        trust_remote_code=config.model.trust_remote_code,
        key=contender.key,
    )


def check_tokenizer(prepared: Prepared, contender: Contender, folder: str, encoded: Encoded) -> None:
    """Both policies are given the same token ids, which the reference and the scorers read too.

    Raises:
        ModelError: the policy has another vocabulary or EOS than the reference, or would put a prompt another way.
    """
    config = prepared.config
    chat, reference = config.prompts.format == "chat", prepared.tokenizer
    theirs = load_tokenizer(folder, need_chat_template=chat, trust_remote_code=config.model.trust_remote_code)
    remedy = (
        f"the KL to model.path = {config.model.path} and the scorers read token ids, so name policies of one family, "
        "with model.path the model that both come from"
    )
    if theirs.get_vocab() != reference.get_vocab() or theirs.eos_token_id != reference.eos_token_id:
        raise ModelError(f"{contender.key} = {contender.path} has another tokenizer than model.path; {remedy}")
    for text, ids in encoded:
        if tuple(encode_prompt(text, theirs, format=config.prompts.format)) != ids:
            how = "chat template" if chat else "way to begin a text"
            raise ModelError(f"{contender.key} = {contender.path} has another {how} than model.path; {remedy}")


def check_place(pair: Pairing) -> None:
    """Nothing but an earlier result of the same comparison is written over.

    Raises:
        ConfigError: something else is there, or no file can be.
    """
    path, remedy = pair.output, "name another file with evaluate.output (--output)"
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"the comparison cannot be written into {path}; {remedy}")
    if not path.exists() or path.name == "evaluation.json":
        return
    try:
        was = read_evaluation(path)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is there and holds no comparison; {remedy}") from error
    if _identity(was) != (pair.base.path, pair.trained.path, pair.prompts, pair.judge):
        raise ConfigError(
            f"{path} holds the comparison of {was.trained_path} with {was.base_path} on {was.prompts_path}, judged by "
            f"{was.judge}; {remedy}"
        )


def _identity(evaluation: Evaluation) -> tuple[str | None, str | None, str | None, str]:
    return evaluation.base_path, evaluation.trained_path, evaluation.prompts_path, evaluation.judge


def make_judge(config: RunConfig) -> Gold:
    """Who decides: ``evaluate.judge``.

    Raises:
        ConfigError: VADER is not installed, or there is no such function.
    """
    judge = config.evaluate.judge
    if judge == "vader":
        vader = VaderJudge()
        return lambda rollouts, scores: [vader.score(rollout.text) for rollout in rollouts]
    if ":" in judge:
        return _function_judge(judge)
    return _scorer_judge(config, judge)


def _function_judge(path: str) -> Gold:
    try:
        function = FunctionScorer(path, folder=os.getcwd())
    except ConfigError as error:
        raise ConfigError(f"evaluate.judge = {error}") from error

    async def ask(rollouts: Sequence[Rollout]) -> list[Score]:
        return list(await asyncio.gather(*(function.score(rollout) for rollout in rollouts)))

    def judge(rollouts: Sequence[Rollout], scores: Sequence[Score] | None) -> list[float]:
        try:
            return [score.value for score in asyncio.run(ask(rollouts))]
        except ScorerError as error:
            raise ScorerError(f"evaluate.judge: {error}") from error

    return judge


def _scorer_judge(config: RunConfig, name: str) -> Gold:
    """What the scorer adds to the loop's score: its weight says whether more of it is better."""
    weight = next(scorer.weight for scorer in config.scorers if scorer.name == name)

    def judge(rollouts: Sequence[Rollout], scores: Sequence[Score] | None) -> list[float]:
        assert scores is not None, "whoever evaluates starts the scorers when one of them judges"
        return [weight * score.parts[name] if score.parts else score.value for score in scores]

    return judge

"""What reward, SFT and DPO are trained and tested on, as token ids: comparisons, or for SFT demonstrations.

SECTION.data ──► split by prompt ──► train, holdout        (bad rows refused, or written to SECTION.rejects.jsonl)
or: preferences.jsonl, preferences.holdout.jsonl of the run

Texts are put to the tokenizer as PPO and the reward model put them: the prompt by ``prompts.format``, the response
apart, one EOS.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rlhf_ray.config import RunConfig, SFTConfig, TrainerConfig
from rlhf_ray.data.demonstrations import (
    Demonstration,
    Demonstrations,
    TokenDemonstration,
    load_demonstrations,
    preferred_responses,
)
from rlhf_ray.data.preference_files import Reject, load_preferences, read_preferences, write_rejects
from rlhf_ray.data.preferences import Preference, TokenPair, split_by_prompt
from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.errors import DataError
from rlhf_ray.roles.scorer import text_input
from rlhf_ray.stages.data_check import bad_rows
from rlhf_ray.types import Turn

log = logging.getLogger("rlhf_ray.train")

RUN_FILES = ("preferences.jsonl", "preferences.holdout.jsonl")
"""What ``judge`` leaves in the run's folder, to train and to test on."""


def rejects_file(section: str) -> str:
    """Where bad rows of a section's data go, in the run's folder."""
    return f"{section}.rejects.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A preference and what the model reads of it."""

    preference: Preference
    tokens: TokenPair

    @property
    def input_text(self) -> str:
        return self.preference.input_text


@dataclass(frozen=True, kw_only=True, slots=True)
class SFTData:
    """What SFT is trained and tested on."""

    train: list[TokenDemonstration]
    holdout: list[TokenDemonstration]
    ties: int
    """Comparisons that prefer neither response, which are left out."""
    repeats: int
    """Comparisons whose preferred response stands there already, which are left out too."""
    annotators: tuple[str, ...]
    """Who preferred what is trained on."""


def load_comparisons(
    config: RunConfig, section: TrainerConfig, tokenizer: Any
) -> tuple[list[Comparison], list[Comparison]]:
    """(train, holdout) of a run.

    Raises:
        DataError: a file is missing, has a bad row that is not to be skipped, or a pair that is too long.
    """
    train: list[Preference]
    holdout: list[Preference]
    if section.data is not None:
        loaded = load_preferences(section.data)
        _settle_bad_rows(config, section, loaded.rejects, total=len(loaded.rejects) + len(loaded.preferences))
        train, holdout = split_by_prompt(loaded.preferences, section.holdout, seed=config.seed)
        places = (section.data, section.data)
    else:
        train, holdout = _of_run(config, section)
        places = (str(config.run_dir / RUN_FILES[0]), str(config.run_dir / RUN_FILES[1]))
    if all(preference.human_preference == 0.5 for preference in holdout):
        raise DataError(f"every held-out comparison of {places[1]} is a tie: there is nothing to be accurate about")
    return (
        [_comparison(preference, tokenizer, config, section, places[0]) for preference in train],
        [_comparison(preference, tokenizer, config, section, places[1]) for preference in holdout],
    )


def load_sft_data(config: RunConfig, section: SFTConfig, tokenizer: Any) -> SFTData:
    """The responses that a run's SFT imitates, and those that it is tested on.

    Raises:
        DataError: a file is missing, has a bad row that is not to be skipped, or a response that is too long.
    """
    if section.data is not None:
        loaded = load_demonstrations(section.data)
        left_out = loaded.ties + loaded.repeats
        total = len(loaded.rejects) + len(loaded.rows) + left_out
        _settle_bad_rows(config, section, loaded.rejects, total=total, noun="demonstration")
        sides = split_by_prompt(loaded.rows, section.holdout, seed=config.seed)
        found: tuple[Demonstrations, ...] = (loaded,)
        place = section.data
    else:
        found = tuple(preferred_responses(preferences) for preferences in _of_run(config, section))
        sides = found[0].rows, found[1].rows
        place = str(config.run_dir / RUN_FILES[0])
    if not all(sides):
        raise DataError(f"{place} and its held-out part must each prefer some response; here there are only ties")
    train, holdout = ([_demonstration(d, tokenizer, config, section, place) for d in side] for side in sides)
    return SFTData(
        train=train,
        holdout=holdout,
        ties=sum(one.ties for one in found),
        repeats=sum(one.repeats for one in found),
        annotators=tuple(sorted({d.annotator for d in sides[0] if d.annotator})),
    )


def _settle_bad_rows(
    config: RunConfig, section: TrainerConfig, rejects: Sequence[Reject], *, total: int, noun: str = "comparison"
) -> None:
    """Refuse them, or write them out and say so."""
    if not rejects:
        return
    name, path = section.section, config.run_dir / rejects_file(section.section)
    if section.on_bad_row == "fail":
        remedy = f"{name}.on_bad_row=skip to write them to {path} and go on"
        raise DataError(bad_rows(str(section.data), rejects, total=total, remedy=remedy, noun=noun))
    write_rejects(path, rejects)
    log.warning("%d rows of %s are no %s: %s says why", len(rejects), section.data, noun, path)


def _of_run(config: RunConfig, section: TrainerConfig) -> tuple[list[Preference], list[Preference]]:
    for path in (config.run_dir / name for name in RUN_FILES):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; run `rlhf-ray judge` with the same configuration, or name your own data in "
                f"{section.section}.data"
            )
    train, holdout = (read_preferences(config.run_dir / name) for name in RUN_FILES)
    return train, holdout


def _comparison(
    preference: Preference, tokenizer: Any, config: RunConfig, section: TrainerConfig, source: str
) -> Comparison:
    (chosen, prompt_tokens), (rejected, _) = (
        _encoded(preference.input_text, response, preference.turns, tokenizer, config, section, source)
        for response in (preference.chosen, preference.rejected)
    )
    tokens = TokenPair(
        chosen_ids=chosen,
        rejected_ids=rejected,
        prompt_tokens=prompt_tokens,
        probability=max(preference.human_preference, 1.0 - preference.human_preference),
        weight=preference.weight,
        margin=preference.margin,
    )
    return Comparison(preference=preference, tokens=tokens)


def _demonstration(
    row: Demonstration, tokenizer: Any, config: RunConfig, section: TrainerConfig, source: str
) -> TokenDemonstration:
    ids, prompt_tokens = _encoded(row.input_text, row.response, row.turns, tokenizer, config, section, source)
    return TokenDemonstration(token_ids=ids, prompt_tokens=prompt_tokens)


def _encoded(
    prompt: str,
    response: str,
    turns: Sequence[Turn],
    tokenizer: Any,
    config: RunConfig,
    section: TrainerConfig,
    source: str,
) -> tuple[list[int], int]:
    """Prompt, response and EOS, and how many of the tokens are the prompt's.

    Raises:
        DataError: they are too long, or no prompt at all, or the chat template refuses them.
    """
    prompt_format = config.prompts.format
    try:
        prompt_tokens = len(encode_prompt(prompt, tokenizer, format=prompt_format, turns=turns))
        ids = text_input(prompt, response, tokenizer, prompt_format=prompt_format, turns=turns)
    except TemplateError as error:
        raise DataError(
            f"{source}: the model's chat template refuses the prompt {prompt[:60]!r}: {error}; mend it, or set "
            "prompts.format to text"
        ) from error
    if not prompt_tokens:
        raise DataError(f"{source}: the tokenizer makes no token of the prompt {prompt[:60]!r}; remove it")
    if len(ids) > section.max_length:
        raise DataError(
            f"{source}: the prompt {prompt[:60]!r} and a response are {len(ids)} tokens together; "
            f"raise {section.section}.max_length ({section.max_length}) or remove the row"
        )
    return ids, prompt_tokens

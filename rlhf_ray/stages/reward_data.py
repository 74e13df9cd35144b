"""The comparisons a reward model is trained and tested on, as token ids.

reward.data ──► split by prompt ──► train, holdout        (bad rows refused, or written to reward.rejects.jsonl)
or: preferences.jsonl, preferences.holdout.jsonl of the run
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import RunConfig
from rlhf_ray.data.preference_files import load_preferences, read_preferences, write_rejects
from rlhf_ray.data.preferences import Preference, TokenPair, split_by_prompt
from rlhf_ray.errors import DataError
from rlhf_ray.roles.scorer import text_input
from rlhf_ray.stages.data_check import bad_rows

log = logging.getLogger("rlhf_ray.reward")

REJECTS_FILE = "reward.rejects.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A preference and what the model reads of it."""

    preference: Preference
    tokens: TokenPair


def load_comparisons(config: RunConfig, tokenizer: Any) -> tuple[list[Comparison], list[Comparison]]:
    """(train, holdout) of a run.

    Raises:
        DataError: a file is missing, has a bad row that is not to be skipped, or a pair that is too long.
    """
    if config.reward.data is not None:
        train, holdout = _from_file(config, config.reward.data)
        places = (config.reward.data, config.reward.data)
    else:
        train, holdout = (_of_run(config, name) for name in ("preferences.jsonl", "preferences.holdout.jsonl"))
        places = (str(config.run_dir / "preferences.jsonl"), str(config.run_dir / "preferences.holdout.jsonl"))
    if all(preference.human_preference == 0.5 for preference in holdout):
        raise DataError(f"every held-out comparison of {places[1]} is a tie: there is nothing to be accurate about")
    return _encoded(train, tokenizer, config, places[0]), _encoded(holdout, tokenizer, config, places[1])


def hold_out(
    comparisons: Sequence[Comparison], share: float, *, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """(kept, held out): all comparisons of one prompt stand on one side.

    Raises:
        DataError: there are fewer than two prompts.
    """
    _, held = split_by_prompt([comparison.preference for comparison in comparisons], share, seed=seed)
    prompts = {preference.input_text for preference in held}
    kept = [comparison for comparison in comparisons if comparison.preference.input_text not in prompts]
    return kept, [comparison for comparison in comparisons if comparison.preference.input_text in prompts]


def _from_file(config: RunConfig, path: str) -> tuple[list[Preference], list[Preference]]:
    loaded = load_preferences(path)
    if loaded.rejects:
        rejects = config.run_dir / REJECTS_FILE
        if config.reward.on_bad_row == "fail":
            raise DataError(bad_rows(path, loaded, f"reward.on_bad_row=skip to write them to {rejects} and go on"))
        write_rejects(rejects, loaded.rejects)
        log.warning("%d rows of %s are no comparison: %s says why", len(loaded.rejects), path, rejects)
    return split_by_prompt(loaded.preferences, config.reward.holdout, seed=config.seed)


def _of_run(config: RunConfig, name: str) -> list[Preference]:
    path = config.run_dir / name
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; run `rlhf-ray judge` with the same configuration, or name your own comparisons in "
            "reward.data"
        )
    return read_preferences(path)


def _encoded(preferences: Sequence[Preference], tokenizer: Any, config: RunConfig, source: str) -> list[Comparison]:
    return [
        Comparison(preference=preference, tokens=_token_pair(preference, tokenizer, config, source))
        for preference in preferences
    ]


def _token_pair(preference: Preference, tokenizer: Any, config: RunConfig, source: str) -> TokenPair:
    chosen, rejected = (
        text_input(
            preference.input_text,
            candidate,
            tokenizer,
            prompt_format=config.prompts.format,
            turns=preference.turns,
        )
        for candidate in (preference.chosen, preference.rejected)
    )
    longest = max(len(chosen), len(rejected))
    if longest > config.reward.max_length:
        raise DataError(
            f"{source}: the prompt {preference.input_text[:60]!r} and a candidate are {longest} tokens together; "
            f"raise reward.max_length ({config.reward.max_length}) or remove the pair"
        )
    return TokenPair(
        chosen_ids=chosen,
        rejected_ids=rejected,
        probability=max(preference.human_preference, 1.0 - preference.human_preference),
        weight=preference.weight,
        margin=preference.margin,
    )

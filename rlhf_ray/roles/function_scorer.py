"""A Python function as a scorer, with the signature of TRL's reward functions."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from rlhf_ray.errors import ConfigError, NoScoreError, ScorerError
from rlhf_ray.pipeline.shared_calls import SharedCalls
from rlhf_ray.types import Rollout, Score


def load_function(path: str, *, folder: str) -> Callable[..., Any]:
    """The function ``module:name``, looked for in ``folder`` and on ``sys.path``.

    As with ``python -m``, the folder stays on ``sys.path``: the function may import more when it is called.

    Raises:
        ConfigError: it cannot be imported, or not be called as TRL calls it.
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, name = path.partition(":")
    try:
        function = attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # a person's module may raise anything
        raise ConfigError(
            f"{path} cannot be imported ({type(error).__name__}: {error}); write module:name of a module in {folder} "
            "or on PYTHONPATH"
        ) from error
    try:
        inspect.signature(function).bind(prompts=[], completions=[], completion_ids=[])
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be called with prompts, completions and completion_ids ({error}); name a function that "
            "takes these keywords, or **kwargs"
        ) from error
    return function


class FunctionScorer:
    """Scores with one function, which must return a finite number for each response.

    It is called as TRL's trainers call a reward function on plain (not conversational) data: with keyword lists
    ``prompts`` and ``completions`` (texts) and ``completion_ids`` (token ids). A coroutine function is awaited, any
    other runs in a thread; there is one call at a time, and rollouts that come in meanwhile share the next.
    """

    def __init__(self, path: str, *, folder: str) -> None:
        """
        Args:
            path: ``module:name``.
            folder: where the module may lie besides ``sys.path``.

        Raises:
            ConfigError: there is no such function.
        """
        self._path = path
        self._function = load_function(path, folder=folder)
        self._calls = SharedCalls(self._score_all)

    async def score(self, rollout: Rollout) -> Score:
        """
        Raises:
            NoScoreError: the function gave something for this response that is no score.
            ScorerError: it raised an error, or gave too few or too many.
        """
        return self._score(await self._calls(rollout), rollout)

    async def _score_all(self, rollouts: Sequence[Rollout]) -> list[Any]:
        try:
            given = await asyncio.to_thread(
                self._function,
                prompts=[rollout.prompt.text for rollout in rollouts],
                completions=[rollout.text for rollout in rollouts],
                completion_ids=[list(rollout.response_ids) for rollout in rollouts],
            )
            values = list(await given if inspect.isawaitable(given) else given)
        except Exception as error:  # a person's function may raise anything
            raise ScorerError(f"{self._path} raised {type(error).__name__}: {error}") from error
        if len(values) != len(rollouts):
            raise ScorerError(f"{self._path} gave {len(values)} rewards for {len(rollouts)} completions")
        return values

    def _score(self, value: Any, rollout: Rollout) -> Score:
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise NoScoreError(
                f"{self._path} gave {value!r} for prompt {rollout.prompt.prompt_id}, which is no score; "
                "return a finite number for every completion"
            )
        return Score(value=number, raw=number, reward_version=self._path)

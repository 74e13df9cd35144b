"""A Python function as a scorer: called as TRL calls it, and believed only when it gives numbers."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import ConfigError, NoScoreError, ScorerError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.roles.function_scorer import FunctionScorer, load_function
from rlhf_ray.types import Prompt, Rollout, Score

Write = Callable[..., str]
COUNT = itertools.count()


def rollout(text: str, prompt_id: int = 0) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, text=f"prompt {prompt_id}", token_ids=(1,), seed=0),
        response_ids=(5, 6),
        rollout_logprobs=(0.0, 0.0),
        policy_versions=(0, 0),
        finish_reason="stop",
        text=text,
    )


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into ``tmp_path`` and returns its name."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def module(source: str) -> str:
        name = f"rewards_{next(COUNT)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    return module


@pytest.fixture
def make(write: Write, tmp_path: Path) -> Callable[[str], FunctionScorer]:
    """A scorer of the function ``reward`` in a module of that source."""
    return lambda source: FunctionScorer(f"{write(source)}:reward", folder=str(tmp_path))


async def test_the_function_is_given_trls_keywords_and_its_numbers_are_the_scores(write: Write, tmp_path: Path) -> None:
    name = write("seen = []\ndef reward(prompts, **kwargs):\n    seen.append((prompts, kwargs))\n    return [0.5]\n")
    scorer: Scorer = FunctionScorer(f"{name}:reward", folder=str(tmp_path))
    expected = Score(value=0.5, raw=0.5, reward_version=f"{name}:reward")
    assert await scorer.score(rollout("good", 3)) == expected
    seen = sys.modules[name].seen
    assert seen == [(["prompt 3"], {"completions": ["good"], "completion_ids": [[5, 6]]})]


async def test_a_coroutine_function_is_awaited(make: Any) -> None:
    scorer = make(
        "import asyncio\n"
        "async def reward(completions, **kwargs):\n"
        "    await asyncio.sleep(0)\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    assert [(await scorer.score(rollout(text))).value for text in ("a", "abc")] == [1.0, 3.0]


@pytest.mark.parametrize("given", ["[2]", "(2.0,)", "np.array([2.0])", "torch.tensor([2.0])", "(x for x in [2.0])"])
async def test_any_list_of_numbers_will_do(make: Any, given: str) -> None:
    scorer = make(f"import numpy as np, torch\ndef reward(**kwargs):\n    return {given}\n")
    assert (await scorer.score(rollout("x"))).value == 2.0


async def test_rollouts_that_come_in_during_a_call_share_the_next(write: Write, tmp_path: Path) -> None:
    name = write(
        "import threading\n"
        "sizes, go, called = [], threading.Event(), threading.Event()\n"
        "def reward(completions, **kwargs):\n"
        "    sizes.append(len(completions))\n"
        "    called.set()\n"
        "    go.wait(20)\n"
        "    return [float(c) for c in completions]\n"
    )
    scorer = FunctionScorer(f"{name}:reward", folder=str(tmp_path))
    module = sys.modules[name]
    first = asyncio.create_task(scorer.score(rollout("0")))
    await asyncio.to_thread(module.called.wait, 20)
    others = [asyncio.create_task(scorer.score(rollout(str(i)))) for i in range(1, 6)]
    await asyncio.sleep(0)
    module.go.set()
    scores = await asyncio.gather(first, *others)
    assert [score.value for score in scores] == [0, 1, 2, 3, 4, 5]
    assert module.sizes == [1, 5]


@pytest.mark.parametrize("given", ["None", "float('nan')", "float('inf')", "'1.0'", "[1.0]", "10 ** 400"])
async def test_what_is_no_number_is_no_score(make: Any, given: str) -> None:
    scorer = make(f"def reward(**kwargs):\n    return [{given}]\n")
    with pytest.raises(
        NoScoreError, match=r"rewards_\d+:reward gave .* for prompt 9, which is no score; return a finite"
    ):
        await scorer.score(rollout("x", 9))


async def test_one_response_without_a_score_does_not_cost_those_that_shared_its_call_theirs(make: Any) -> None:
    scorer = make("def reward(completions, **kwargs):\n    return [float(c) for c in completions]\n")
    good, bad, also_good = await asyncio.gather(
        *(scorer.score(rollout(t)) for t in ("1", "nan", "2")), return_exceptions=True
    )
    assert (good.value, also_good.value) == (1, 2)
    assert isinstance(bad, NoScoreError)


async def test_too_few_rewards_are_refused(make: Any) -> None:
    scorer = make("def reward(**kwargs):\n    return []\n")
    with pytest.raises(ScorerError, match=r":reward gave 0 rewards for 1 completions"):
        await scorer.score(rollout("x"))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise KeyError('a')", "raised KeyError: 'a'"),
        ("return 3.0", "raised TypeError: 'float' object is not iterable"),
    ],
)
async def test_an_error_of_the_function_is_told_with_its_name(make: Any, body: str, told: str) -> None:
    scorer = make(f"def reward(**kwargs):\n    {body}\n")
    with pytest.raises(ScorerError, match=rf"rewards_\d+:reward {told}") as caught:
        await scorer.score(rollout("x"))
    assert isinstance(caught.value.__cause__, KeyError | TypeError)


def test_a_module_is_found_in_the_folder_and_may_import_its_neighbours(write: Write, tmp_path: Path) -> None:
    neighbour = write("def reward(**kwargs):\n    return []\n\nclass Judge:\n    reward = staticmethod(reward)\n")
    name = write(f"from {neighbour} import reward, Judge\n")
    assert load_function(f"{name}:reward", folder=str(tmp_path)) is sys.modules[neighbour].reward
    assert load_function(f"{name}:Judge.reward", folder=str(tmp_path)) is sys.modules[neighbour].reward


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "",
            r"cannot be imported \(AttributeError: module 'rewards_\d+' has no attribute 'reward'\); write module:name",
        ),
        ("def reward(:", r"cannot be imported \(SyntaxError: "),
        ("import not_installed", r"cannot be imported \(ModuleNotFoundError: No module named 'not_installed'\)"),
        ("reward = 3", r"cannot be called with prompts, completions and completion_ids \(3 is not a callable object\)"),
        ("def reward(prompts, completions): ...", r"\(got an unexpected keyword argument 'completion_ids'\); name"),
        ("def reward(texts, **kwargs): ...", r"\(missing a required argument: 'texts'\)"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(write: Write, tmp_path: Path, source: str, told: str) -> None:
    name = write(source)
    with pytest.raises(ConfigError, match=rf"^{name}:reward .*{told}"):
        load_function(f"{name}:reward", folder=str(tmp_path))


def test_a_module_that_is_not_there_is_refused_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=rf"No module named 'nowhere'\); write module:name of a module in {tmp_path}"):
        load_function("nowhere:reward", folder=str(tmp_path))

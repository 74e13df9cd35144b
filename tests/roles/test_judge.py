"""The simulated labeller prefers what sounds happier."""

from __future__ import annotations

import sys

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.judge import VaderJudge


def test_a_happy_text_scores_above_a_plain_one_and_that_above_a_sad_one() -> None:
    judge = VaderJudge()
    assert (
        judge.score("I love this wonderful day!")
        > judge.score("This is a day.")
        > judge.score("I hate this horrid day.")
    )


def test_scores_lie_between_minus_one_and_one_and_text_without_sentiment_is_zero() -> None:
    judge = VaderJudge()
    assert judge.score("") == 0.0
    assert judge.score("The table has four legs.") == 0.0
    assert -1 <= judge.score("horrible awful terrible " * 50) < -0.9
    assert 0.9 < judge.score("great lovely wonderful " * 50) <= 1


def test_a_missing_lexicon_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"judge.judge = vader needs the package vaderSentiment; install it"):
        VaderJudge()

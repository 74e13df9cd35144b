"""A labeller that is a program: VADER's sentiment, which stands in for people and never sees PPO."""

from __future__ import annotations

from rlhf_ray.errors import ConfigError

SIMULATED_ANNOTATOR = "simulated:vader"
"""What every comparison made by this judge carries in its annotator field."""


class VaderJudge:
    """Sentiment of a text by the VADER lexicon (Hutto and Gilbert 2014): the mock labeller of Ziegler et al. 2019.

    Raises:
        ConfigError: the package vaderSentiment is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ConfigError(
                "judge.judge = vader needs the package vaderSentiment; install it with `pip install rlhf-ray[demo]`"
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, text: str) -> float:
        """The compound sentiment, −1 (negative) to 1 (positive); 0 for text without a word in the lexicon."""
        return float(self._analyzer.polarity_scores(text)["compound"])

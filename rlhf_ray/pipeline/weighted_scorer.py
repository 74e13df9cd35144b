"""Several scorers as one: the weighted sum of what each of them gives."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.errors import ScorerError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.pipeline.groups import task_group
from rlhf_ray.types import Ref, Score


class WeightedScorer:
    """Asks every scorer at once; satisfies ``interfaces.Scorer``.

    Args:
        scorers: name → (weight, scorer), at least one. A single one's score has no parts.
    """

    def __init__(self, scorers: Mapping[str, tuple[float, Scorer]]) -> None:
        self._scorers = dict(scorers)

    async def score(self, rollout: Ref) -> Score:
        """Σ weight × score, normalised and raw; the parts are the normalised scores before their weights.

        Raises:
            ScorerError: one of them has no score, and which; the others are not waited for.
        """
        async with task_group() as tasks:
            asked = {name: tasks.create_task(self._score_by(name, rollout)) for name in self._scorers}
        scores = {name: task.result() for name, task in asked.items()}
        weights = {name: weight for name, (weight, _) in self._scorers.items()}
        return Score(
            value=sum(weights[name] * score.value for name, score in scores.items()),
            raw=sum(weights[name] * score.raw for name, score in scores.items()),
            reward_version=" + ".join(score.reward_version for score in scores.values()),
            parts={name: score.value for name, score in scores.items()} if len(scores) > 1 else {},
        )

    async def _score_by(self, name: str, rollout: Ref) -> Score:
        try:
            return await self._scorers[name][1].score(rollout)
        except ScorerError as error:
            raise type(error)(f"scorer {name}: {error}") from error

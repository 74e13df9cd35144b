"""Fixtures of the service's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.roles.scorer import RewardScorer


@pytest.fixture(scope="module")
def scorer(tiny_reward_dir: Path) -> RewardScorer:
    """What the service should give, from the model itself."""
    return RewardScorer(tiny_reward_dir, precision="float32")

"""Connecting to Ray: what one block leaves behind for the next."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import ray

from rlhf_ray.cluster import connected
from rlhf_ray.config import RunConfig
from rlhf_ray.stages.serve import served_reward


@pytest.mark.ray
@pytest.mark.serve
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own pipes, which its shutdown leaves to the collector
def test_a_second_local_cluster_in_one_process_serves_as_the_first_did(
    tiny_reward_dir: Path, ray_temp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(ray_temp_dir))
    config = RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "serve": {"port": 0, "num_cpus": 0.5, "precision": "float32", "threads": 1},
        }
    )
    for _ in range(2):
        assert not ray.is_initialized()
        with connected(), served_reward(config, tiny_reward_dir) as served:
            request = {"prompt": "The train", "responses": [" was late."]}
            assert len(httpx.post(f"{served.url}/v1/score", json=request, timeout=60).json()["scores"]) == 1

"""Scorers that run in an actor, on a real cluster: the rollout is opened there, and errors come back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.actors.scorer import RayScorers
from rlhf_ray.cluster import wait_ready
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import NoScoreError, WorkerDiedError
from rlhf_ray.types import Prompt, Rollout

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = "s3cret-of-this-test"


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


@pytest.fixture
def start(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RayScorers]]:
    """Starts scorers from a folder that the cluster's workers were not started in, with a module of functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAR_KEY", KEY)
    (tmp_path / "rewards_in_an_actor.py").write_text(
        "import os\n"
        "def length(completions, **kwargs):\n"
        "    return [float(len(c)) for c in completions]\n"
        "def nothing(completions, **kwargs):\n"
        "    return [None] * len(completions)\n"
        "def ends(completions, **kwargs):\n"
        "    os._exit(3)\n"
    )
    started: list[RayScorers] = []

    def start(*sections: dict[str, Any]) -> RayScorers:
        base = {"model": {"path": "unused"}, "prompts": {"path": "unused", "eval_path": "unused"}}
        started.append(RayScorers.start(RunConfig.model_validate({**base, "scorers": sections}), handle=None))
        return started[-1]

    yield start
    for scorers in started:
        scorers.close()


def function(name: str) -> dict[str, Any]:
    return {"kind": "function", "name": name, "function": f"rewards_in_an_actor:{name}"}


def a_rollout() -> Any:
    return ray.put(
        Rollout(
            prompt=Prompt(prompt_id=4, text="a prompt", token_ids=(1, 2), seed=0),
            response_ids=(7, 8, 9),
            rollout_logprobs=(0.0,) * 3,
            policy_versions=(0,) * 3,
            finish_reason="stop",
            text="four",
        )
    )


def files_that_hold(text: str, ray_folder: Path) -> list[Path]:
    logs = [file for file in ray_folder.rglob("logs/**/*") if file.is_file()]
    assert logs
    return [file for file in logs if text.encode() in file.read_bytes()]


async def test_a_function_and_a_remote_service_score_one_rollout_together(
    start: Any, score_services: Any, ray_temp_dir: Path
) -> None:
    service = score_services()
    remote = {"kind": "remote", "name": "far", "urls": [service.url], "api_key_env": "FAR_KEY", "weight": 10}
    scorers = start(function("length"), remote)
    await wait_ready(scorers.ready_refs())
    score = await scorers.score(a_rollout())
    assert score.parts == {"length": 4.0, "far": pytest.approx(0.3)}
    assert score.value == pytest.approx(4 + 10 * 0.3)
    assert score.reward_version == "rewards_in_an_actor:length + length@1"
    assert service.asked[0]["items"] == [{"prompt_ids": [1, 2], "response_ids": [7, 8, 9]}]
    assert service.asked[0]["key"] == f"Bearer {KEY}"
    assert files_that_hold(KEY, ray_temp_dir) == []


async def test_a_missing_score_comes_back_as_one_plain_error(start: Any) -> None:
    scorers = start(function("nothing"))
    await wait_ready(scorers.ready_refs())
    with pytest.raises(NoScoreError) as caught:
        await scorers.score(a_rollout())
    assert type(caught.value) is NoScoreError
    assert str(caught.value) == (
        "scorer nothing: rewards_in_an_actor:nothing gave None for prompt 4, which is no score; return a finite number "
        "for every completion"
    )


async def test_a_function_that_ends_its_process_is_a_dead_worker(start: Any) -> None:
    scorers = start(function("ends"))
    await wait_ready(scorers.ready_refs())
    with pytest.raises(WorkerDiedError, match="the process of scorer ends died"):
        await scorers.score(a_rollout())

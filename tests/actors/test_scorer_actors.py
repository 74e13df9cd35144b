"""Scorers that run in an actor, on a real cluster: the rollout is opened there, errors come back as they were, and the
process is replaced when it dies or hangs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_ray.actors.scorer import RayScorers
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import NoScoreError, PromptError, WorkerDiedError
from rlhf_ray.types import Prompt, Rollout

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(120)]

KEY = "s3cret-of-this-test"


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


@pytest.fixture
def start(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RayScorers]:
    """Starts scorers from a folder that the cluster's workers were not started in, with a module of functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAR_KEY", KEY)
    (tmp_path / "rewards_in_an_actor.py").write_text(
        "import os, pathlib, time\n"
        "folder = pathlib.Path(__file__).parent\n"
        "def length(completions, **kwargs):\n"
        "    return [float(len(c)) for c in completions]\n"
        "def nothing(completions, **kwargs):\n"
        "    return [None] * len(completions)\n"
        "def poisoned(completions, **kwargs):\n"
        "    if 'poison' in completions:\n"
        "        os._exit(3)\n"
        "    return length(completions)\n"
        "def held_up(completions, **kwargs):\n"
        "    (folder / f'process-{os.getpid()}').touch()\n"
        "    while not (folder / 'go').exists():\n"
        "        time.sleep(0.02)\n"
        "    return length(completions)\n"
        "def stuck_once(completions, **kwargs):\n"
        "    if not (folder / 'stuck').exists():\n"
        "        (folder / 'stuck').touch()\n"
        "        time.sleep(600)\n"
        "    return length(completions)\n"
    )

    def start(*sections: dict[str, Any], **more: Any) -> RayScorers:
        base = {"model": {"path": "unused"}, "prompts": {"path": "unused", "eval_path": "unused"}}
        return RayScorers.start(RunConfig.model_validate({**base, **more, "scorers": sections}), handle=None)

    return start


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "function", "name": name, "function": f"rewards_in_an_actor:{name}", **more}


def a_rollout(text: str = "four") -> Any:
    return ray.put(
        Rollout(
            prompt=Prompt(prompt_id=4, text="a prompt", token_ids=(1, 2), seed=0),
            response_ids=(7, 8, 9),
            rollout_logprobs=(0.0,) * 3,
            policy_versions=(0,) * 3,
            finish_reason="stop",
            text=text,
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
    async with scorers.running():
        score = await scorers.score(a_rollout())
    assert score.parts == {"length": 4.0, "far": pytest.approx(0.3)}
    assert score.value == pytest.approx(4 + 10 * 0.3)
    assert score.reward_version == "rewards_in_an_actor:length + length@1"
    assert service.asked[0]["items"] == [{"prompt_ids": [1, 2], "response_ids": [7, 8, 9]}]
    assert service.asked[0]["key"] == f"Bearer {KEY}"
    assert files_that_hold(KEY, ray_temp_dir) == []


async def test_a_missing_score_comes_back_as_one_plain_error(start: Any) -> None:
    scorers = start(function("nothing"))
    with pytest.raises(NoScoreError) as caught:
        async with scorers.running():
            await scorers.score(a_rollout())
    assert type(caught.value) is NoScoreError
    assert str(caught.value) == (
        "scorer nothing: rewards_in_an_actor:nothing gave None for prompt 4, which is no score; return a finite number "
        "for every completion"
    )


def process_at_work(folder: Path) -> int:
    """Waits for ``held_up`` to be called; the process that does."""
    while not (seen := list(folder.glob("process-*"))):
        time.sleep(0.05)
    return int(seen[0].name.removeprefix("process-"))


async def test_a_killed_scorer_is_replaced_and_its_calls_are_made_again(start: Any, tmp_path: Path) -> None:
    scorers = start(function("held_up"), function("length"))
    (held_up, length) = scorers.pools
    async with scorers.running():
        calls = [asyncio.create_task(scorers.score(a_rollout("x" * n))) for n in range(1, 6)]
        os.kill(await asyncio.to_thread(process_at_work, tmp_path), signal.SIGKILL)
        (tmp_path / "go").touch()
        assert [(await call).parts for call in calls] == [{"held_up": n, "length": n} for n in range(1, 6)]
        assert [(w["name"], w["restarts"]) for w in held_up.status()["workers"]] == [("scorer held_up-1", 1)]
        assert [(w["name"], w["restarts"]) for w in length.status()["workers"]] == [("scorer length-0", 0)]


async def test_a_response_that_ends_its_scorers_process_is_given_up_and_the_others_get_their_scores(start: Any) -> None:
    scorers = start(function("poisoned"), ppo={"max_prompt_tries": 2})
    async with scorers.running():
        texts = ["four", "poison", "three", "1"]
        given = await asyncio.gather(*(scorers.score(a_rollout(text)) for text in texts), return_exceptions=True)
        error = given.pop(1)
        assert isinstance(error, PromptError)
        assert str(error).startswith(
            "a response was given to 2 processes of scorer poisoned and each died; mend the scorer, or raise "
            "ppo.max_prompt_tries if the deaths have another cause: scorer poisoned-1 died"
        )
        assert [score.value for score in given] == [4.0, 5.0, 1.0]
        assert scorers.pools[0].status()["restarts"] == 0  # deaths of what was given up do not count


async def test_a_scorer_that_dies_too_often_is_named_with_the_knob_to_turn(start: Any) -> None:
    scorers = start(function("length"), function("poisoned", max_restarts=0))
    with pytest.raises(WorkerDiedError, match=r"^scorer poisoned-0 died and scorers\.1\.max_restarts = 0 .* used up"):
        async with scorers.running():
            await scorers.score(a_rollout("poison"))


async def test_a_function_that_never_returns_is_named_and_its_process_replaced(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    scorers = start(function("stuck_once"), hang_timeout_s=10)
    with caplog.at_level(logging.WARNING):
        async with scorers.running():
            scores = await asyncio.gather(*(scorers.score(a_rollout("x" * n)) for n in range(1, 6)))
    assert [score.value for score in scores] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert "scorer stuck_once-0 hung while scoring" in caplog.text
    assert "in stuck_once" in caplog.text


async def test_a_remote_scorer_that_is_within_its_own_limits_does_not_hang(start: Any, score_services: Any) -> None:
    service = score_services()
    service.replies = [14.0]
    remote = {"kind": "remote", "name": "far", "urls": [service.url], "timeout_s": 30.0, "max_restarts": 0}
    scorers = start(remote, hang_timeout_s=7)
    async with scorers.running():
        assert (await scorers.score(a_rollout())).value == pytest.approx(0.3)

"""What someone outside sees of a run, and how a wish for more or fewer workers reaches it: files alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rlhf_ray
from rlhf_ray.cli import app
from rlhf_ray.errors import ConfigError, RlhfRayError
from rlhf_ray.metrics import read_json, status_kept, write_json, write_summary
from rlhf_ray.stages.live import RESTART_SECONDS, SCALE_FILE, SILENCE_SECONDS, note_restart

WORKER = {"state": "ready", "version": 7, "in_hand": 3, "done": 41, "restarts": 1, "node": "192.0.2.7/3fa9c1d2"}
POOL = {"min": 1, "max": None, "asked": 2, "unplaced": 0, "wanted": 2, "up": 1, "restarts": 1, "max_restarts": 3}
GENERATORS = POOL | {
    "workers": [
        {"name": "generator-2", **WORKER},
        {"name": "generator-3", **WORKER, "state": "starting", "version": None, "node": None},
    ]
}
REFERENCES = POOL | {"wanted": 1, "asked": 4, "max": 4, "unplaced": 1, "workers": [{"name": "reference-0", **WORKER}]}
SCORER = {"wanted": 1, "up": 1, "restarts": 2, "max_restarts": 3} | {
    "workers": [{"name": "scorer brevity-2", **WORKER, "version": None}]
}
PICTURE = {
    "ended": False,
    "step": 7,
    "steps": 40,
    "version": 7,
    "staleness": {"mean": 0.5, "max": 1, "bound": 1},
    "queue": {
        "slots_in_use": 15,
        "slots": 16,
        "waiting_for_a_generator": 2,
        "being_generated": 6,
        "being_scored": 3,
        "finished": 4,
    },
    "quarantined": {"prompts": 0, "bound": 10},
    "occupancy": {"generate": 1.0, "score": 0.25, "reference": 0.5, "train": 0.75, "publish": 0.01},
    "generators": GENERATORS,
    "references": REFERENCES,
    "scorers": {"scorer brevity": SCORER},
    "replicas": {"RUNNING": 2, "STARTING": 1},
    "scale": None,
}


def picture(folder: Path, **changes: Any) -> None:
    """The run has just said how it stands."""
    write_json(folder / "status.json", {"at": time.time(), **PICTURE, **changes})


@pytest.fixture
def running(tmp_path: Path) -> Path:
    write_summary(tmp_path, {"status": "running", "cause": None})
    picture(tmp_path)
    return tmp_path


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_table_shows_the_pools_the_queue_and_where_the_time_goes(running: Path) -> None:
    assert command("status", running).output.splitlines() == [
        f"{running}: running",
        "step 7 of 40, version 7",
        "staleness: mean 0.50, largest 1, bound 1",
        "queue: 15 of 16 slots; prompts: 2 waiting for a generator, 6 being generated, 3 being scored, 4 finished",
        "busy in the last minute: generate 100%, score 25%, reference 50%, train 75%, publish 1%",
        "reward model: 2 running, 1 starting",
        "generators: 1 up of 2 wanted; 1 of 3 restarts used",
        "references: 1 up of 1 wanted (follows the cluster up to 4), 1 waiting for a place; 1 of 3 restarts used",
        "scorer brevity: 1 up; 2 of 3 restarts used",
        "",
        "worker            state     version  in hand  done  restarts  node",
        "generator-2       ready     7        3        41    1         192.0.2.7/3fa9c1d2",
        "generator-3       starting  -        3        41    1         -",
        "reference-0       ready     7        3        41    1         192.0.2.7/3fa9c1d2",
        "scorer brevity-2  ready     -        3        41    1         192.0.2.7/3fa9c1d2",
    ]
    printed = json.loads(command("status", running, "--json").output)
    assert printed["running"] is True
    assert printed["generators"] == GENERATORS


def test_a_run_whose_learner_is_the_reference_has_none_to_show_or_to_scale(running: Path) -> None:
    picture(running, references=None)
    assert "reference-0" not in command("status", running).output
    with pytest.raises(ConfigError, match="this run has no references: its learner is the reference too"):
        rlhf_ray.scale(running, references=1)


def test_a_run_that_is_not_running_is_said_to_be_so(tmp_path: Path, running: Path) -> None:
    def said() -> str:
        first: str = command("status", running).output.splitlines()[0]
        return first.removeprefix(f"{running}: ")

    picture(running, at=time.time() - SILENCE_SECONDS - 5)
    assert said().startswith("no word since 20")
    assert said().endswith("s ago; its process is gone, or hangs")
    assert not rlhf_ray.status(running)["running"]
    picture(running, ended=True)
    assert said() == "its loop is over and the policy is being written"
    note_restart(running)
    assert said() == "its workers begin again from the newest checkpoint"
    assert rlhf_ray.status(running)["step"] == 7
    picture(running, restarting=True, at=time.time() - RESTART_SECONDS - 5)
    assert said().startswith("no word since 20")
    picture(running, ended=True)
    with status_kept(running):
        assert said() == "starting; its loop has not begun", "an earlier run's word is no word of this one"
        with pytest.raises(ConfigError, match=r"cannot be scaled: starting"):
            rlhf_ray.scale(running, generators=2)
    write_summary(running, {"status": "failed", "cause": "ParityError: they differ"})
    assert said() == "failed: ParityError: they differ"
    write_summary(running, {"status": "interrupted"})
    assert said() == "interrupted; `rlhf-ray ppo --resume` goes on"
    refused = command("scale", running, "--generators", 2)
    assert refused.exit_code == 2
    assert "cannot be scaled: interrupted" in refused.stderr
    nowhere = command("status", tmp_path / "nowhere")
    assert nowhere.exit_code == 2
    assert "holds no run (summary.json is missing)" in nowhere.stderr


def test_a_run_is_found_by_its_name_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_summary(tmp_path / "runs" / "mine", {"status": "running"})
    assert rlhf_ray.status("mine")["status"] == "starting"


@pytest.mark.parametrize(
    ("wish", "refusal"),
    [
        ({}, "scale needs a number: name generators"),
        ({"generators": 0}, "generators = 0 is below 1, the least that generator.min allows"),
        ({"references": 5}, "references = 5 is above reference.max = 4; ask for fewer"),
        ({"generators": 3, "references": 0}, "references = 0 is below 1"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_and_does_not_reach_the_run(
    running: Path, wish: dict[str, int], refusal: str
) -> None:
    with pytest.raises(ConfigError, match=refusal):
        rlhf_ray.scale(running, **wish)
    assert not (running / SCALE_FILE).exists()


def test_a_wish_that_the_run_does_not_take_is_said_to_be_waiting(running: Path) -> None:
    with pytest.raises(RlhfRayError, match=r"has not taken the wish within 0\.3 s; it is taken as soon as"):
        rlhf_ray.scale(running, generators=5, wait_seconds=0.3)
    assert read_json(running / SCALE_FILE)["generators"] == 5


@pytest.fixture
def answering(running: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Does something with the next wish, as the run would."""

    def answer(act: Callable[[dict[str, Any]], None]) -> None:
        def wait() -> None:
            while not (wish := read_json(running / SCALE_FILE)):
                time.sleep(0.01)
            act(wish)

        threading.Thread(target=wait, daemon=True).start()

    return answer


def test_scale_returns_when_the_run_says_that_it_has_taken_the_wish(running: Path, answering: Any) -> None:
    def take(wish: dict[str, Any]) -> None:
        picture(running, scale=wish | {"refused": None}, generators=GENERATORS | {"wanted": wish["generators"]})

    answering(take)
    result = command("scale", running, "--generators", 5)
    assert result.exit_code == 0, result.output
    assert "generators: 1 up of 5 wanted" in result.output


def test_the_run_has_the_last_word_and_another_wish_may_take_a_wish_s_place(running: Path, answering: Any) -> None:
    answering(lambda wish: picture(running, scale=wish | {"refused": "generators = 5 is too many"}))
    with pytest.raises(ConfigError, match="is too many"):
        rlhf_ray.scale(running, generators=5)
    (running / SCALE_FILE).unlink()
    answering(lambda wish: write_json(running / SCALE_FILE, wish | {"id": "another"}))
    with pytest.raises(RlhfRayError, match="another scale took the place of this one"):
        rlhf_ray.scale(running, generators=5)

"""How a run steers its pools, on stand-ins for the pools and for what Ray says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from rlhf_ray.config import RunConfig
from rlhf_ray.pipeline.workers import WorkerState
from rlhf_ray.stages import steering
from rlhf_ray.stages.serve import FAILED_START, Replicas
from rlhf_ray.stages.steering import STARVED_TICKS, ElasticPool, Steering


class Pool:
    """What steering sees of a pool and of what starts its workers."""

    def __init__(self, *, up: int, wanted: int, unplaced: int = 0) -> None:
        self.wanted = wanted
        self.up = up
        self.unplaced = set(range(unplaced))
        self.draining = False

    def size(self) -> int:
        return self.up

    def want(self, count: int) -> None:
        self.wanted = count
        if self.up > count:
            self.up, self.draining = count, True

    def states(self) -> dict[str, WorkerState]:
        return {"generator-0": WorkerState.DRAINING if self.draining else WorkerState.READY}

    def status(self) -> dict[str, Any]:
        return {"wanted": self.wanted, "up": self.up}


class Loop:
    def __init__(self) -> None:
        self.waits: list[bool] = []

    def status(self) -> dict[str, Any]:
        return {"generators": {}, "references": {}}

    def may_stand_still(self, may: bool) -> None:
        self.waits.append(may)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    sections: dict[str, Any] = {"output_dir": str(tmp_path), "model": {"path": "m"}, "prompts": {"path": "a.jsonl"}}
    sections["prompts"]["eval_path"] = "b.jsonl"
    sections["generator"] = {"count": 3, "min": 1}
    made = RunConfig.model_validate(sections)
    made.run_dir.mkdir()
    return made


def steered(config: RunConfig, *, service: str | None = None, **pools: Pool) -> Steering:
    elastic = {
        name: ElasticPool(getattr(config, name.removesuffix("s")), pool, pool)  # type: ignore[arg-type]
        for name, pool in pools.items()
    }
    return Steering(config, Loop(), elastic, service=service)  # type: ignore[arg-type]


def test_a_generator_beyond_the_least_gives_its_place_to_the_last_reference_for_as_long_as_it_must(
    config: RunConfig,
) -> None:
    generators, references = Pool(up=3, wanted=4, unplaced=1), Pool(up=0, wanted=1, unplaced=1)
    steers = steered(config, generators=generators, references=references)
    for _ in range(STARVED_TICKS - 1):
        steers._make_room()
    assert generators.wanted == 4, "it may find a place yet"
    steers._make_room()
    assert generators.wanted == 2, "and nobody queues up for the place"
    assert steers._pools["generators"].status()["asked"] == 4
    for _ in range(3 * STARVED_TICKS):
        steers._make_room()
    assert generators.wanted == 2, "it has not left yet"
    generators.draining = False
    for _ in range(STARVED_TICKS):
        steers._make_room()
    assert generators.wanted == 1
    generators.draining = False
    for _ in range(3 * STARVED_TICKS):
        steers._make_room()
    assert generators.wanted == 1, "the least is kept"
    references.up, references.unplaced = 1, set()
    steers._make_room()
    assert generators.wanted == 4


def test_a_loan_is_forgotten_where_somebody_says_how_many_there_are_to_be(config: RunConfig) -> None:
    generators, references = Pool(up=3, wanted=3), Pool(up=0, wanted=1, unplaced=1)
    steers = steered(config, generators=generators, references=references)
    for _ in range(STARVED_TICKS):
        steers._make_room()
    assert generators.wanted == 2
    steers._pools["generators"].scale(1)
    references.up, references.unplaced = 1, set()
    steers._make_room()
    assert generators.wanted == 1


def test_a_pool_that_waits_while_it_has_somebody_takes_nothing(config: RunConfig) -> None:
    generators, references = Pool(up=2, wanted=3, unplaced=1), Pool(up=1, wanted=2, unplaced=1)
    steers = steered(config, generators=generators, references=references)
    for _ in range(3 * STARVED_TICKS):
        steers._make_room()
    assert (generators.wanted, references.wanted) == (3, 2)


FAILED = f"{FAILED_START}. Retrying. Error: no room for the model"


@pytest.mark.parametrize(
    ("replicas", "waits", "word"),
    [
        (Replicas(states={"RUNNING": 1}), False, ""),
        (Replicas(states={"RUNNING": 1, "STARTING": 1}), False, ""),
        (Replicas(states={"STARTING": 1}), True, "no replica that is up; Ray Serve says: nothing"),
        (Replicas(states={"STARTING": 1}, message=FAILED), False, "Error: no room for the model"),
        (Replicas(), False, ". Ray Serve says nothing of the reward model"),
        (RayServeException("no controller"), False, ". Ray Serve says nothing of the reward model"),
    ],
    ids=["up", "one is up", "starting", "fails to start", "unknown", "no controller"],
)
async def test_a_run_may_stand_still_while_its_replicas_start_and_else_serve_is_quoted(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, replicas: Replicas | Exception, waits: bool, word: str
) -> None:
    def replicas_of(service: str) -> Replicas:
        if isinstance(replicas, Exception):
            raise replicas
        return replicas

    monkeypatch.setattr(steering, "replicas_of", replicas_of)
    steers = steered(config, service="scores", generators=Pool(up=1, wanted=1))
    with contextlib.suppress(RayServeException):
        await steers._see_replicas("scores")
    assert steers._pipeline.waits == [waits]  # type: ignore[attr-defined]
    assert steers.word_of_serve().endswith(word)
    assert bool(steers.word_of_serve()) == bool(word)
    assert steered(config).word_of_serve() == ""


async def test_while_serve_does_not_answer_the_status_is_kept_without_the_replicas(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = [], threading.Event()

    def replicas_of(service: str) -> Replicas:
        asked.append(service)
        if len(asked) == 2:
            answer.wait()
        return Replicas(states={"RUNNING": len(asked)})

    monkeypatch.setattr(steering, "replicas_of", replicas_of)
    monkeypatch.setattr(steering, "SERVE_SECONDS", 0.05)
    monkeypatch.setattr(steering, "TICK_SECONDS", 0.01)
    steers = steered(config, service="scores", generators=Pool(up=1, wanted=1))

    async def until(replicas: dict[str, int], at: float = 0.0) -> float:
        while True:
            await asyncio.sleep(0.01)
            file = config.run_dir / "status.json"
            if file.exists() and (now := json.loads(file.read_text()))["replicas"] == replicas and now["at"] > at:
                return float(now["at"])

    async with asyncio.timeout(60), steers.kept():
        try:
            await until({"RUNNING": 1})
            await until({}, at=await until({}))
            assert asked == ["scores"] * 2, "no second question while one is open"
        finally:
            answer.set()
        await until({"RUNNING": 3})

"""The checkpoints of a PPO run as folders: what is in them, when they count, and what a full disk leaves."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from rlhf_ray.actors.learner import LearnerRank, LearnerWorker, RayLearner
from rlhf_ray.actors.scored_prompts import load_scored_refs
from rlhf_ray.checkpoint import latest_checkpoint, load_checkpoint, marked_checkpoints, save_checkpoint
from rlhf_ray.cluster import start_actor
from rlhf_ray.errors import CheckpointError, ConfigError
from rlhf_ray.stages.ppo_checkpoints import RunCheckpoints
from rlhf_ray.testing import FakeGenerator, FakeLearner, FakePrompts
from rlhf_ray.types import ExperienceRefs, Score, ScoredPrompt

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Three nodes, which Ray may choose from for what has no wish."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


class Writer(LearnerWorker):
    """A rank whose copy is so many numbers; it writes when it may, and no file larger than it may."""

    def __init__(self, numbers: int, largest_file: int | None = None, held_back: bool = False) -> None:
        super().__init__({}, "float32", 0, 1)
        self._learner: Any = self
        self._numbers = numbers
        self._largest_file = largest_file
        self._copies = 0
        self._may_write = threading.Event()
        if not held_back:
            self._may_write.set()

    def copy(self) -> Writer:
        self._copies += 1
        return self

    async def copies(self) -> int:
        return self._copies

    async def let_write(self) -> None:
        self._may_write.set()

    def write(self, folder: Path) -> None:
        self._may_write.wait()
        if self._largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self._largest_file, resource.RLIM_INFINITY))
        save_checkpoint(folder / "rank-000", tensors={"weights": torch.ones(self._numbers)}, state={})


def writer(*args: Any, **kwargs: Any) -> RayLearner:
    actor = start_actor(Writer, *args, num_cpus=0, num_gpus=0, concurrency=8, **kwargs)
    return RayLearner([LearnerRank("rank 0 of the learner", actor, hang_timeout_s=60)])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoints_of(root: Path, learner: Any, keep: int = 2) -> RunCheckpoints:
    return RunCheckpoints(root, learner, identity={"seed": 0}, keep=keep)


async def the_process_that_writes(descendants: Callable[..., list[tuple[psutil.Process, str]]]) -> psutil.Process:
    """Once those that wrote before have ended."""
    async with asyncio.timeout(20):
        while len(there := [p for p, title in descendants() if title.startswith("ray::_Writer")]) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return there[0]


def node_of(actor: Any) -> str:
    return ray.get_runtime_context().get_node_id()


async def scored_prompts(number: int) -> tuple[list[ScoredPrompt], list[Any]]:
    """Scored prompts whose refs are Ray's, and the rollouts behind them."""
    generator = FakeGenerator()
    generator.version = 3
    prompts, rollouts = [], []
    for prompt_id in range(number):
        ((receipt, rollout),) = await generator.generate(FakePrompts().prompt(prompt_id))
        experience = ExperienceRefs(
            receipt=receipt,
            score=Score(value=0.5, raw=1.0, reward_version="r"),
            rollout=ray.put(rollout),
            ref_logprobs=ray.put(np.full(len(rollout.response_ids), -0.5, np.float32)),
        )
        prompts.append(ScoredPrompt(prompt_id=prompt_id, admitted=3, experiences=(experience,)))
        rollouts.append(rollout)
    return prompts, rollouts


async def test_what_waits_for_the_learner_comes_back_as_refs_of_the_same_values(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, FakeLearner())
    prompts, rollouts = await scored_prompts(3)
    await checkpoints.begin(10, {"step": 10}, prompts)
    assert await checkpoints.end(wait=True)
    folder = latest_checkpoint(tmp_path)
    assert folder == tmp_path / "step-000010"
    assert load_checkpoint(folder / "pipeline")[1] == {"step": 10, "identity": {"seed": 0}}
    again = load_scored_refs(folder / "scored")
    assert [(p.prompt_id, p.admitted) for p in again] == [(p.prompt_id, p.admitted) for p in prompts]
    for before, after, rollout in zip(prompts, again, rollouts, strict=True):
        assert after.experiences[0].receipt == before.experiences[0].receipt
        assert after.experiences[0].score == before.experiences[0].score
        assert await after.experiences[0].rollout == rollout
        assert (await after.experiences[0].ref_logprobs == await before.experiences[0].ref_logprobs).all()
    await checkpoints.close()


async def test_the_process_that_writes_what_waits_may_die_and_the_next_checkpoint_is_whole(
    tmp_path: Path, descendants: Callable[..., list[tuple[psutil.Process, str]]]
) -> None:
    checkpoints = checkpoints_of(tmp_path, FakeLearner())
    prompts, _ = await scored_prompts(3)
    written_by = []
    for step in (1, 2):
        await checkpoints.begin(step, {"step": step}, prompts)
        assert await checkpoints.end(wait=True)
        process = await the_process_that_writes(descendants)
        written_by.append(process.pid)
        process.kill()
    assert written_by[0] != written_by[1]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    await checkpoints.close()


async def test_the_process_that_writes_what_waits_may_die_while_it_writes(
    tmp_path: Path, descendants: Callable[..., list[tuple[psutil.Process, str]]]
) -> None:
    checkpoints = checkpoints_of(tmp_path, FakeLearner())
    prompts, _ = await scored_prompts(3)
    await checkpoints.begin(1, {"step": 1}, prompts)
    assert await checkpoints.end(wait=True)
    process = await the_process_that_writes(descendants)
    process.suspend()
    await checkpoints.begin(2, {"step": 2}, prompts)
    await asyncio.sleep(0.5)
    process.kill()
    assert await checkpoints.end(wait=True)
    assert len(load_scored_refs(tmp_path / "step-000002" / "scored")) == 3
    await checkpoints.close()


async def test_a_writer_that_ray_does_not_start_again_is_replaced(tmp_path: Path) -> None:
    checkpoints = checkpoints_of(tmp_path, FakeLearner())
    prompts, _ = await scored_prompts(3)
    for step in (1, 2):
        await checkpoints.begin(step, {"step": step}, prompts)
        assert await checkpoints.end(wait=True)
        ray.kill(checkpoints._writer._actor)
    assert len(load_scored_refs(tmp_path / "step-000002" / "scored")) == 3
    await checkpoints.close()


async def test_what_waits_is_written_on_the_node_whose_disk_it_is(tmp_path: Path) -> None:
    here = ray.get_runtime_context().get_node_id()
    prompts, _ = await scored_prompts(1)
    for attempt in range(4):
        checkpoints = checkpoints_of(tmp_path / str(attempt), FakeLearner())
        await checkpoints.begin(1, {"step": 1}, prompts)
        assert await checkpoints.end(wait=True)
        assert await checkpoints._writer._actor.__ray_call__.remote(node_of) == here
        await checkpoints.close()


async def test_a_checkpoint_counts_only_once_the_learner_has_written_its_own(tmp_path: Path) -> None:
    learner = writer(8, held_back=True)
    checkpoints = checkpoints_of(tmp_path, learner)
    assert await checkpoints.end(wait=False), "nothing is under way"
    await checkpoints.begin(1, {"step": 1}, [])
    assert not await checkpoints.end(wait=False)
    ending = asyncio.create_task(checkpoints.end(wait=False))
    assert not await ending
    assert latest_checkpoint(tmp_path) is None
    await learner._ranks[0].call("let_write")
    assert await checkpoints.end(wait=True)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"


@pytest.mark.parametrize("largest_file", [None, 4096], ids=["written", "not written"])
async def test_the_next_copy_waits_until_nobody_writes_the_one_before(tmp_path: Path, largest_file: int | None) -> None:
    """It is made in the same memory. One whose checkpoint another rank has given up may still be written here."""
    learner = writer(4096, largest_file=largest_file, held_back=True)
    (rank,) = learner._ranks
    await learner.save(tmp_path / "given up")
    saving = asyncio.create_task(learner.save(tmp_path / "next"))
    await asyncio.sleep(0.5)
    assert await rank.call("copies") == 1
    await rank.call("let_write")
    await saving
    assert await rank.call("copies") == 2
    if largest_file is None:
        assert await learner.written(wait=True)
        assert names_in(tmp_path) == ["given up", "next"]


async def test_a_full_disk_is_named_and_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    whole = checkpoints_of(tmp_path, writer(8))
    await whole.begin(1, {"step": 1}, [])
    await whole.end(wait=True)
    full = checkpoints_of(tmp_path, writer(4096, largest_file=4096))
    for step in (2, 3):
        await full.begin(step, {"step": step}, [])
        with pytest.raises(CheckpointError) as caught:
            await full.end(wait=True)
        part = tmp_path / f"step-{step:06d}" / "learner" / "rank-000"
        assert type(caught.value) is CheckpointError
        assert str(caught.value).startswith(f"{part} could not be written (")
        assert str(caught.value).endswith("free space on its disk, or set output_dir to a larger one")
        assert names_in(tmp_path) == ["step-000001"], "nothing half-written fills the disk"
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"


async def test_what_a_killed_run_left_under_the_same_name_does_not_get_in(tmp_path: Path) -> None:
    left_over = tmp_path / "step-000001" / "learner" / "rank-001"
    left_over.mkdir(parents=True)
    checkpoints = checkpoints_of(tmp_path, writer(8), keep=1)
    for step in (1, 2):
        await checkpoints.begin(step, {"step": step}, [])
        assert await checkpoints.end(wait=True)
        assert marked_checkpoints(tmp_path) == [tmp_path / f"step-{step:06d}"]
    assert not left_over.exists()


async def test_a_learner_with_another_disk_ends_the_run(tmp_path: Path) -> None:
    class Elsewhere(FakeLearner):
        async def save(self, folder: Path) -> None:
            pass

    checkpoints = checkpoints_of(tmp_path, Elsewhere())
    await checkpoints.begin(1, {"step": 1}, [])
    with pytest.raises(ConfigError, match="set output_dir to a folder that all nodes share"):
        await checkpoints.end(wait=True)

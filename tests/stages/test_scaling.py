"""A run whose workers come and go: scaled by command, followed over nodes, and looked at from outside."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

import rlhf_ray
from rlhf_ray.checkpoint import latest_checkpoint, load_state
from rlhf_ray.cli import app
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import LearnerDiedError
from rlhf_ray.metrics import read_lines, read_summary
from rlhf_ray.pipeline.summary import RunSummary
from rlhf_ray.stages.ppo import run_ppo

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 240

Descendants = Callable[..., list[tuple[psutil.Process, str]]]


@pytest.fixture
def make_config(
    tiny_run: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunConfig]:
    """A run that goes on until it is stopped, scored by a function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scaling_rewards.py").write_text(
        "def brevity(completion_ids, **kwargs):\n    return [-len(ids) / 10 for ids in completion_ids]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**sections: dict[str, Any]) -> RunConfig:
        base = tiny_run("scaled") | {
            "sampling": {"max_new_tokens": 8},
            "scorers": [{"kind": "function", "name": "brevity", "function": "scaling_rewards:brevity"}],
            "generator": {"num_cpus": 1, "kv_cache_gb": 0.02, "max_num_seqs": 1, "threads": 1, "dtype": "float32"},
            "reference": {"num_cpus": 0.25, "threads": 1, "precision": "float32"},
            "learner": {"num_cpus": 0.25, "lr": 1e-4, "threads": 1, "precision": "float32"},
            "ppo": {"steps": 100_000, "batch_size": 8},
        }
        for name, section in sections.items():
            base[name] = base[name] | section
        return RunConfig.model_validate(base)

    return make


class Operator:
    """Someone at another terminal: sees files and processes, and has no connection to Ray."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._errands: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()
        self.run_failed = threading.Event()

    def in_main_thread(self, errand: Callable[[], Any]) -> Any:
        """Have it done after the next step: starting a node sets handlers of signals."""
        done: Future[Any] = Future()
        self._errands.put((errand, done))
        return done.result(PATIENCE_SECONDS)

    def run_errands(self, row: Any) -> None:
        while not self._errands.empty():
            errand, done = self._errands.get()
            done.set_result(errand())

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status in which it holds."""
        end = time.monotonic() + PATIENCE_SECONDS
        now: dict[str, Any] = {}
        while time.monotonic() < end and not self.run_failed.is_set():
            if (self.run_dir / "status.json").exists() and what(now := rlhf_ray.status(self.run_dir)):
                return now
            time.sleep(0.2)
        raise AssertionError(f"waited in vain; the last status: {now}")

    def command(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, [arguments[0], str(self.run_dir), *arguments[1:]])


def operated(config: RunConfig, work: Callable[[Operator], None]) -> RunSummary:
    """The run's summary, after ``work`` was done beside it and it was then stopped as by Ctrl-C."""

    def operate() -> None:
        try:
            operator.wait_for(lambda now: now["step"] >= 1)
            work(operator)
        finally:
            if not operator.run_failed.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    operator = Operator(config.run_dir)
    with ThreadPoolExecutor(1) as threads:
        operating = threads.submit(operate)
        try:
            summary = run_ppo(config, on_step=operator.run_errands)
        except Exception:
            operator.run_failed.set()
            raise
        operating.result()
    return summary


def up(now: dict[str, Any], pool: str = "generators") -> dict[str, Any]:
    """The workers that have done something and stay, by name."""
    return {w["name"]: w for w in now[pool]["workers"] if w["done"] and w["state"] in ("ready", "stale")}


@pytest.fixture
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def test_a_run_is_scaled_by_command_and_its_killed_or_stopped_reference_is_replaced(
    cluster: None, make_config: Callable[..., RunConfig], descendants: Descendants
) -> None:
    def work(operator: Operator) -> None:
        result = operator.command("scale", "--generators", "3")
        assert result.exit_code == 0, result.output
        assert "generators: 1 up of 3 wanted" in result.output
        operator.wait_for(lambda now: len(up(now)) == 3)
        table = operator.command("status").output
        assert ": running\n" in table
        for n in range(3):
            assert f"\ngenerator-{n}  " in table

        assert rlhf_ray.scale(operator.run_dir, generators=1)["generators"]["wanted"] == 1
        alone = operator.wait_for(lambda now: len(now["generators"]["workers"]) == 1)
        assert alone["generators"]["restarts"] == 0

        for restarts, end in enumerate((signal.SIGKILL, signal.SIGSTOP), start=1):
            (reference,) = (process for process, title in descendants() if "ReferenceWorker" in title)
            reference.send_signal(end)
            replaced = operator.wait_for(lambda now, n=restarts: f"reference-{n}" in up(now, "references"))
            assert replaced["deaths"]["reference"] == restarts
            reference.wait(PATIENCE_SECONDS)
            operator.wait_for(lambda now, then=replaced: now["step"] > then["step"] + 2)  # by then it samples again

        for arguments, refusal in (
            (("--generators", "0"), "generators = 0 is below 1"),
            (("--references", "5"), "references = 5 is above reference.max = 1"),
            ((), "scale needs a number"),
        ):
            refused = operator.command("scale", *arguments)
            assert refused.exit_code == 2
            assert refusal in refused.stderr
        printed = json.loads(operator.command("status", "--json").output)
        assert printed["running"] is True
        assert printed["queue"]["slots"] == 16
        assert printed["staleness"]["bound"] == 1
        assert printed["scorers"]["scorer brevity"]["up"] == 1
        assert 0 < printed["occupancy"]["generate"] <= 1

    config = make_config(reference={"max": 1}).model_copy(update={"hang_timeout_s": 90.0})
    summary = operated(config, work)
    assert summary.status == "interrupted"
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert summary.staleness_max <= 1
    after = rlhf_ray.status(config.run_dir)
    assert (after["status"], after["running"], after["step"]) == ("interrupted", False, summary.steps)


@pytest.fixture
def nodes(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two cores, or the test's number: enough for one generator of the run and all else. More nodes come and go."""
    head = {"num_cpus": 2, "include_dashboard": False} | getattr(request, "param", {})
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_pool_with_a_max_follows_the_nodes_that_come_and_go(
    nodes: Cluster, make_config: Callable[..., RunConfig]
) -> None:
    def work(operator: Operator) -> None:
        before = rlhf_ray.status(operator.run_dir)["generators"]
        assert (before["up"], before["wanted"], before["asked"], before["unplaced"]) == (1, 1, 2, 0)
        node = operator.in_main_thread(lambda: nodes.add_node(num_cpus=1))
        grown = operator.wait_for(lambda now: len(up(now)) == 2)
        assert len({worker["node"] for worker in up(grown).values()}) == 2
        nodes.remove_node(node, allow_graceful=False)
        operator.wait_for(lambda now: len(now["generators"]["workers"]) == now["generators"]["wanted"] == 1)

    summary = operated(make_config(generator={"max": 2, "max_restarts": 0}), work)
    assert (summary.status, summary.lost, summary.trained_twice) == ("interrupted", 0, 0)


@pytest.mark.parametrize("nodes", [{"_system_config": {"max_direct_call_object_size": 1}}], indirect=True)
def test_large_responses_that_go_with_their_node_are_made_again(
    nodes: Cluster, make_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """As responses of 100 kB and more, all of these stay on the node that sampled them."""

    def work(operator: Operator) -> None:
        for time_of_it in range(8):
            operator.wait_for(lambda now: len(up(now)) == 2)
            operator.in_main_thread(replace_a_node)
            gone = rlhf_ray.status(operator.run_dir)["step"]
            operator.wait_for(lambda now, gone=gone: now["step"] > gone + 10)
            if time_of_it and "went with the node that held it" in caplog.text:
                return

    def replace_a_node() -> None:
        """While the loop waits: what its generator finishes meanwhile is nowhere else."""
        sampling.append(nodes.add_node(num_cpus=4))
        nodes.remove_node(sampling.pop(0), allow_graceful=False)

    sampling = [nodes.add_node(num_cpus=4) for _ in range(2)]
    config = make_config(generator={"count": 2, "num_cpus": 3, "max_restarts": 0}, ppo={"checkpoint_every": 5})
    summary = operated(config, work)
    assert (summary.status, summary.lost, summary.trained_twice) == ("interrupted", 0, 0)
    assert "went with the node that held it" in caplog.text
    assert summary.deaths["generator"] >= 2
    ledger = load_state(latest_checkpoint(config.run_dir / "checkpoints") / "pipeline")["ledger"]
    assert sum(last - first + 1 for first, last in ledger["trained"]) == 8 * summary.steps


@pytest.fixture
def kill_a_rank(descendants: Descendants) -> Callable[..., psutil.Process]:
    """A signal to one of the learner's processes, as soon as there is one."""

    def kill(how: signal.Signals = signal.SIGKILL) -> psutil.Process:
        while not (ranks := [process for process, title in descendants() if "LearnerWorker" in title]):
            time.sleep(0.1)
        ranks[-1].send_signal(how)
        return ranks[-1]

    return kill


def test_when_a_rank_of_the_learner_dies_or_hangs_the_run_goes_on_from_its_newest_checkpoint(
    cluster: None,
    make_config: Callable[..., RunConfig],
    kill_a_rank: Callable[..., psutil.Process],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def work(operator: Operator) -> None:
        assert operator.command("scale", "--generators", "2").exit_code == 0
        operator.wait_for(lambda now: now["generators"]["wanted"] == 2)
        kill_a_rank()  # before or soon after the first checkpoint
        reached = operator.wait_for(
            lambda now: "going on from step" in caplog.text and now["running"] and now["step"] >= 20
        )["step"]
        hung = kill_a_rank(signal.SIGSTOP)
        operator.wait_for(lambda now: caplog.text.count("going on from step") == 2 and now["step"] > reached + 10)
        assert rlhf_ray.status(operator.run_dir)["generators"]["wanted"] == 2
        hung.wait(PATIENCE_SECONDS)

    config = make_config(learner={"ranks": 2}, ppo={"checkpoint_every": 5})
    config = config.model_copy(update={"hang_timeout_s": 60.0})
    summary = operated(config, work)
    assert (summary.status, summary.lost, summary.trained_twice) == ("interrupted", 0, 0)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, summary.steps + 1))
    checkpoint = latest_checkpoint(config.run_dir / "checkpoints")
    assert checkpoint is not None
    ledger = load_state(checkpoint / "pipeline")["ledger"]
    assert sum(last - first + 1 for first, last in ledger["trained"]) == 8 * summary.steps
    assert summary.deaths["learner"] == 2
    assert re.search("rank [01] of the learner died while ", caplog.text)
    assert re.search("rank [01] of the learner hung while .*did not answer for 60 s", caplog.text)


def test_a_learner_that_dies_again_and_again_ends_the_run_with_the_cause(
    cluster: None, make_config: Callable[..., RunConfig], kill_a_rank: Callable[..., psutil.Process]
) -> None:
    config = make_config(learner={"max_restarts": 0})
    killed = iter([True])

    def kill_once(row: Any) -> None:
        if next(killed, False):
            kill_a_rank()

    with pytest.raises(LearnerDiedError, match=r"(?s)rank 0 of the learner died.*learner\.max_restarts = 0"):
        run_ppo(config, on_step=kill_once)
    assert read_summary(config.run_dir)["status"] == "failed"


def test_a_learner_that_dies_while_it_starts_is_told_as_such(
    cluster: None, make_config: Callable[..., RunConfig], kill_a_rank: Callable[..., psutil.Process]
) -> None:
    config = make_config(learner={"max_restarts": 0})
    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_a_rank)
        with pytest.raises(
            LearnerDiedError,
            match=r"(?s)rank 0 of the learner died while (it started|it had nothing to do|loading).*max_restarts",
        ):
            run_ppo(config)
        killing.result()

"""The shipped Serve file on a running cluster, over real HTTP: a new version under load, a replica that dies, keys."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.serve.schema import ApplicationStatus
from ray.util.state import list_actors
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.ray, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-some-length"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
BODY = {"prompt": "The train", "responses": [" was late.", " was lovely!"]}


@pytest.fixture(scope="module")
def newer_dir(tiny_reward_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "newer"
    shutil.copytree(tiny_reward_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Deployed:
    """The file on a cluster of its own."""

    def __init__(self, model: Path, folder: Path, port: int, dashboard: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.dashboard = dashboard
        self._file = folder / "serve.yaml"
        self._content: dict[str, Any] = yaml.safe_load((ROOT / "deployments" / "reward_service.yaml").read_text())
        (folder / "keys").write_text(KEY + "\n")
        self._content["http_options"]["port"] = port
        self._content["applications"][0]["args"] |= {
            "model": str(model),
            "replicas": 2,
            "num_cpus": 0.5,
            "precision": "float32",
            "threads": 1,
            "batch_wait_ms": 1,
            "api_keys_file": str(folder / "keys"),
        }

    def deploy(self, user_config: dict[str, Any] | None = None) -> None:
        """``serve deploy`` as a person calls it."""
        if user_config is not None:
            self._content["applications"][0]["deployments"] = [{"name": "reward", "user_config": user_config}]
        self._file.write_text(yaml.safe_dump(self._content))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", self.dashboard, str(self._file)]
        end = time.monotonic() + 60
        while (done := subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)).returncode:
            assert time.monotonic() < end, done.stdout + done.stderr
            time.sleep(1)

    def score(self, client: httpx.Client, **headers: str) -> httpx.Response:
        return client.post(f"{self.url}/v1/score", json=BODY, headers=AUTHORIZED | headers, timeout=60)

    def wait_until_running(self) -> None:
        """The first replica answers before the second one is there."""
        end = time.monotonic() + 200
        with httpx.Client() as client:
            while True:
                try:
                    answers = self.score(client).status_code == 200
                    if answers and serve.status().applications["reward"].status == ApplicationStatus.RUNNING:
                        return
                except httpx.TransportError:
                    pass
                assert time.monotonic() < end, serve.status()
                time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed(
    tiny_reward_dir: Path, ray_temp_dir: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Deployed]:
    port = free_port()
    ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        log_to_driver=False,
        _temp_dir=str(ray_temp_dir),
    )
    folder = tmp_path_factory.mktemp("deployed")
    deployed = Deployed(tiny_reward_dir, folder, free_port(), f"http://127.0.0.1:{port}")
    deployed.deploy()
    deployed.wait_until_running()
    yield deployed
    serve.shutdown()
    ray.shutdown()


def replica_pids(deployed: Deployed) -> dict[str, int]:
    """Process of each live replica."""
    found = list_actors(address=deployed.dashboard, filters=[("state", "=", "ALIVE")], detail=True)
    return {actor.actor_id: actor.pid for actor in found if "ServeReplica" in actor.class_name}


class Asking:
    """Callers who ask again as soon as they are answered, and remember every answer."""

    def __init__(self, deployed: Deployed, callers: int, *, retry: bool = False) -> None:
        """
        Args:
            retry: ask again what was answered otherwise than with a score, as a caller would.
        """
        self._deployed = deployed
        self._retry = retry
        self.retried: Counter[int] = Counter()
        self._done = threading.Event()
        self.answers: list[tuple[int, Any]] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(callers)]

    def _ask(self) -> None:
        with httpx.Client() as client:
            while not self._done.is_set():
                reply = self._deployed.score(client)
                while self._retry and reply.status_code != 200:
                    self.retried[reply.status_code] += 1
                    reply = self._deployed.score(client)
                self.answers.append((reply.status_code, reply.json() if reply.status_code == 200 else reply.text))

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a caller was never answered"


def test_a_key_is_asked_for(deployed: Deployed) -> None:
    with httpx.Client() as client:
        assert deployed.score(client, Authorization="Bearer wrong").status_code == 401
        assert client.get(f"{deployed.url}/readyz").status_code == 200
        assert deployed.score(client).status_code == 200


def test_a_new_version_takes_over_under_load_without_a_dropped_request_or_a_restart(
    deployed: Deployed, newer_dir: Path
) -> None:
    before = replica_pids(deployed)
    assert len(before) == 2
    with Asking(deployed, 8) as asking:
        time.sleep(1)
        deployed.deploy({"models": {"reward": {"folder": str(newer_dir)}}})
        end = time.monotonic() + 60
        while not all(answer[1]["model"].startswith("newer@") for answer in asking.answers[-40:]):
            assert time.monotonic() < end
            time.sleep(0.2)
    assert Counter(status for status, _ in asking.answers).keys() == {200}
    scores: dict[str, set[tuple[float, ...]]] = {}
    for _, reply in asking.answers:
        scores.setdefault(reply["model"].split("@")[0], set()).add(tuple(round(raw, 3) for raw in reply["raw_scores"]))
    assert scores.keys() == {"reward", "newer"}
    (old,), (new,) = scores["reward"], scores["newer"]
    assert [-raw for raw in old] == pytest.approx(new, abs=0.002)
    assert replica_pids(deployed) == before


def test_a_replica_that_dies_under_load_costs_nobody_a_wrong_or_a_missing_answer(deployed: Deployed) -> None:
    before = replica_pids(deployed)
    with httpx.Client() as client:
        expected = deployed.score(client).json()["raw_scores"]
    with Asking(deployed, 8, retry=True) as asking:
        time.sleep(1)
        os.kill(next(iter(before.values())), 9)
        count, end = len(asking.answers), time.monotonic() + 100
        while len(replica_pids(deployed).keys() - before.keys()) < 1 or len(asking.answers) < count + 200:
            assert time.monotonic() < end
            time.sleep(0.5)
    # A caller whose replica died is told so with a 5xx, at most once for each that was under way, and asks again.
    assert asking.retried.keys() <= {429, 500, 503}
    assert asking.retried[500] <= 8
    assert len(asking.answers) > 200
    for status, reply in asking.answers:
        assert status == 200
        assert reply["raw_scores"] == pytest.approx(expected, abs=1e-4)


def test_prometheus_sees_what_was_scored(deployed: Deployed) -> None:
    with httpx.Client() as client:
        deployed.score(client)
        port = ray.nodes()[0]["MetricsExportPort"]
        end = time.monotonic() + 60
        while True:
            page = client.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
            if "ray_rlhf_ray_scores_total{" in page and "ray_rlhf_ray_forward_seconds_bucket{" in page:
                break
            assert time.monotonic() < end, "nothing exported"
            time.sleep(2)
    assert KEY not in page

"""The command as a submitted Ray job: the cluster is there before it and stays after it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray import serve
from ray.util.state import list_actors

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def dashboard(ray_temp_dir: Path, free_port: Callable[[], int]) -> Iterator[str]:
    port = free_port()
    ray.init(
        num_cpus=4,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        log_to_driver=False,
        _temp_dir=str(ray_temp_dir),
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()  # its client would outlive this cluster
    ray.shutdown()


def submit(address: str, *command: str) -> str:
    """``ray job submit`` as a person calls it; returns what it printed once the job has ended well.

    The head's job agent comes up a few seconds after the dashboard: until then a submission is refused.
    """
    ray_command = str(Path(sys.executable).with_name("ray"))
    end = time.monotonic() + 300
    while True:
        done = subprocess.run(
            [ray_command, "job", "submit", "--address", address, "--", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        printed = done.stdout + done.stderr
        if done.returncode == 0:
            return printed
        assert "No available agent" in printed, printed
        assert time.monotonic() < end, printed
        time.sleep(1)


@pytest.mark.filterwarnings("ignore")
def test_ppo_runs_as_a_submitted_job_and_leaves_no_actor_behind(
    dashboard: str, tiny_model_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"The train number {i}"}) + "\n" for i in range(4)))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Rain fell"}) + "\n")
    config = {
        "name": "job",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir)},
        "prompts": {"path": str(prompts), "eval_path": str(held_out), "max_tokens": 64},
        "sampling": {"max_new_tokens": 8},
        "serve": {"model": str(tiny_reward_dir), "port": 0, "num_cpus": 0.5, "threads": 1},
        "generator": {"num_cpus": 0.5, "kv_cache_gb": 0.02, "threads": 1},
        "reference": {"num_cpus": 0.5, "threads": 1},
        "learner": {"num_cpus": 0.5, "threads": 1},
        "ppo": {"steps": 1, "batch_size": 4},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("rlhf-ray")), "ppo", "--config", str(file), "--resume"]
    logs = submit(dashboard, *command)
    assert "step 1/1" in logs
    alive = list_actors(address=dashboard, filters=[("state", "=", "ALIVE")])
    assert not {a.class_name for a in alive} & {"GeneratorWorker", "LearnerWorker", "ReferenceWorker"}
    assert serve.status().applications == {}, "the job deletes the application that it started"
    summary = json.loads((tmp_path / "runs" / "job" / "summary.json").read_text())
    assert (summary["status"], summary["samples"], summary["lost"]) == ("finished", 4, 0)

    logs = submit(dashboard, *command, "--set", "ppo.steps=2")
    assert "step 2/2" in logs, "the job submitted again goes on"
    assert "step 1/2" not in logs
    summary = json.loads((tmp_path / "runs" / "job" / "summary.json").read_text())
    assert (summary["steps"], summary["lost"], summary["trained_twice"]) == (2, 0, 0)

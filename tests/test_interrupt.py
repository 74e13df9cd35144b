"""Ctrl-C on a real run: the step in progress, a checkpoint, a clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf_ray.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_ray.metrics import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]


def test_ctrl_c_writes_a_checkpoint_and_leaves_no_process(
    tiny_run: Callable[[str], dict[str, Any]],
    tiny_reward_dir: Path,
    ray_temp_dir: Path,
    tmp_path: Path,
    descendants: Callable[..., list[tuple[psutil.Process, str]]],
) -> None:
    config = tiny_run("stopped") | {
        "sampling": {"max_new_tokens": 8},
        "serve": {"model": str(tiny_reward_dir), "port": 0, "num_cpus": 0.25, "threads": 1},
        "generator": {"num_cpus": 0.25, "kv_cache_gb": 0.02, "threads": 1},
        "reference": {"num_cpus": 0.25, "threads": 1},
        "learner": {"num_cpus": 0.25, "threads": 1},
        "ppo": {"steps": 100_000, "batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": str(ray_temp_dir)
    }
    command = [str(Path(sys.executable).parent / "rlhf-ray"), "ppo", "-c", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "step 2/" in line:
                    started, titles = zip(*descendants(process.pid), strict=True)
                    process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130, "".join(seen)
        finally:
            process.kill()
    run_dir = tmp_path / "runs" / "stopped"
    folder = latest_checkpoint(run_dir / "checkpoints")
    assert folder is not None, "".join(seen)
    _, state = load_checkpoint(folder / "pipeline")
    assert state["step"] == len(read_lines(run_dir / "metrics.jsonl")) >= 2
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    for name in ("raylet ", "gcs_server ", "ray::GeneratorWorker"):
        assert any(title.startswith(name) for title in titles), "the list is of Ray's processes, workers among them"
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []

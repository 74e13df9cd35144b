"""SIGKILL on a real run: what is resumed ends as if nobody had stopped it, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "chaos" / "resume_cycles.py"


def test_a_run_that_is_killed_and_resumed_gives_the_numbers_of_one_that_was_not(
    tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    models = ["--model", str(tiny_model_dir), "--reward", str(tiny_reward_dir)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--cycles", "1", "--steps", "12", *models],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout)
    (kill,) = summary["kills"]
    assert not kill["finished_before_it_was_killed"]
    assert kill["processes_left"] == 0
    assert (summary["rows"], summary["different"]) == (12, [])
    assert summary["numbers_compared"] > 12 * 20
    assert summary["every_prompt_trained_once"]

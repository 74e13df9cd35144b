"""SIGKILL on a real run: what is resumed ends as if nobody had stopped it, and what loses a worker goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(1200)]

SCRIPTS = Path(__file__).parent / "chaos"


def test_a_run_that_is_killed_and_resumed_gives_the_numbers_of_one_that_was_not(
    tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    models = ["--model", str(tiny_model_dir), "--reward", str(tiny_reward_dir)]
    summary = summary_of("resume_cycles.py", "--cycles", "1", "--steps", "12", *models)
    (kill,) = summary["kills"]
    assert not kill["finished_before_it_was_killed"]
    assert kill["processes_left"] == 0
    assert (summary["rows"], summary["different"]) == (12, [])
    assert summary["numbers_compared"] > 12 * 20
    assert summary["every_prompt_trained_once"]


def test_a_run_whose_processes_are_killed_one_after_another_trains_every_prompt_once(
    tiny_model_dir: Path, tiny_reward_dir: Path
) -> None:
    roles = ["generator", "reference", "replica", "controller"]
    models = ["--model", str(tiny_model_dir), "--reward", str(tiny_reward_dir)]
    summary = summary_of("kills.py", "--kills", "4", "--roles", ",".join(roles), *models)
    assert sorted(role for kill in summary["kills"] for role in kill["roles"]) == sorted(roles)
    assert summary["status"] == "finished"
    assert (summary["lost"], summary["trained_twice"]) == (0, 0)
    assert summary["every_prompt_trained_once"]
    assert summary["exit_codes"] == [130, 0]  # stopped as by Ctrl-C, and resumed


def summary_of(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of ``chaos/`` prints, after it has found every promise kept."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary

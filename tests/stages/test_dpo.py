"""DPO leaves a policy that prefers what people preferred, on prompts that it never saw; interrupted, it goes on."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.checkpoint import mark_complete, marked_checkpoints
from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import Preference, write_preferences
from rlhf_ray.errors import ConfigError, DataError, ResourceError
from rlhf_ray.metrics import read_lines, read_summary
from rlhf_ray.stages.dpo import train_dpo


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def pairs_with_a_rule(n: int, *, seed: int) -> list[Preference]:
    """The preferred candidate ends with "!", the other one with "x"; who comes first is a coin."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        good, bad = ("".join(rng.choices("abcdef", k=rng.randint(2, 6))) + end for end in "!x")
        first = rng.random() < 0.5
        pairs.append(
            Preference(
                input_text=f"prompt {seed} {i}",
                candidate1=good if first else bad,
                candidate2=bad if first else good,
                human_preference=float(first),
                annotator="simulated:rule",
            )
        )
    return pairs


TIE = Preference(input_text="tied", candidate1="a", candidate2="b", human_preference=0.5)


def a_run(output_dir: Path, model: Path, **dpo: Any) -> RunConfig:
    """A run whose comparisons are on disk."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"path": str(model)},
            "prompts": {"path": "unused", "eval_path": "unused", "format": "text"},
            "dpo": {"epochs": 4, "lr": 1e-3, "batch_size": 8, "precision": "float32"} | dpo,
        }
    )
    write_preferences(config.run_dir / "preferences.jsonl", [*pairs_with_a_rule(40, seed=1), TIE])
    write_preferences(config.run_dir / "preferences.holdout.jsonl", [TIE, *pairs_with_a_rule(30, seed=2)])
    return config


@pytest.mark.ray
def test_a_run_s_comparisons_become_a_policy_that_prefers_as_they_do(
    cluster: None, tmp_path: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    report = train_dpo(config)
    assert (report.train_pairs, report.pairs, report.ties, report.steps) == (40, 30, 2, 20)
    assert "left out: 2 comparisons that prefer neither response" in caplog.text
    assert report.accuracy >= 0.9
    assert report.accuracy_low < report.accuracy <= report.accuracy_high
    assert report.margin > 0
    assert report.annotators == ("simulated:rule",)

    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[-1]["dpo_loss"] < 0.5
    left = {path.name for path in config.run_dir.iterdir()}
    inputs = {"preferences.jsonl", "preferences.holdout.jsonl"}
    assert left == {*inputs, "config.resolved.yaml", "metrics.jsonl", "tensorboard", "policy", "summary.json"}
    summary = read_summary(config.run_dir)
    assert (summary["status"], summary["dpo_accuracy"], summary["dpo_ties"]) == ("finished", report.accuracy, 2)

    _, loading = AutoModelForCausalLM.from_pretrained(config.run_dir / "policy", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(config.run_dir / "policy").eos_token == "<|end|>"


def test_a_run_that_has_a_policy_keeps_it(tmp_path: Path) -> None:
    config = a_run(tmp_path, tmp_path / "no such model")
    (config.run_dir / "policy").mkdir()
    with pytest.raises(ConfigError, match="already holds a policy; remove it, or choose another name"):
        train_dpo(config)


def test_nothing_but_ties_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    write_preferences(config.run_dir / "preferences.jsonl", [TIE])
    with pytest.raises(DataError, match=r"every comparison to train on is a tie: .* name others in dpo\.data"):
        train_dpo(config)


def test_checkpoints_of_another_training_are_refused_with_what_differs(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    folder = config.run_dir / "dpo.checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text('{"seed": 0, "dpo.beta": 0.5}')
    mark_complete(folder)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier training; resume it"):
        train_dpo(config)
    with pytest.raises(ConfigError, match=r"was written with .*dpo\.beta = 0\.5, .*, training pairs = "):
        train_dpo(config, resume=True)


@pytest.mark.ray
def test_more_than_the_cluster_has_is_refused(cluster: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, num_workers=4)
    with pytest.raises(ResourceError, match=r"4 CPUs \(dpo 4 x 1\) and the cluster has 2; lower dpo.num_cpus"):
        train_dpo(config)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_resume_ends_in_the_policy(
    tmp_path: Path,
    tiny_model_dir: Path,
    ray_temp_dir: Path,
    descendants: Callable[..., list[tuple[psutil.Process, str]]],
) -> None:
    config = a_run(tmp_path, tiny_model_dir, save_steps=10, epochs=40, lr=1e-4)
    written = config.model_dump(mode="json")
    written["prompts"]["eval_path"] = "unused too"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    command = [str(Path(sys.executable).parent / "rlhf-ray"), "dpo", "-c", str(tmp_path / "run.yaml")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["RAY_TMPDIR"] = str(ray_temp_dir)
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "optimiser steps" in line and marked_checkpoints(config.run_dir / "dpo.checkpoints"):
                    break
            started, titles = zip(*descendants(process.pid), strict=True)
            assert any("RayTrainWorker" in title for title in titles), seen
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130, process.stdout.read()
        finally:
            process.kill()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
    assert read_summary(config.run_dir)["status"] == "interrupted"
    assert {path.name for path in config.run_dir.iterdir() if path.name.startswith(".")} == {".lock"}
    refused = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "dpo.checkpoints of an earlier run" in refused.stderr
    assert "--resume to go on" in refused.stderr

    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_summary(config.run_dir)["dpo_steps"] == 200
    steps = [row["step"] for row in read_lines(config.run_dir / "metrics.jsonl")]
    assert steps == sorted(set(steps)), "each step stands there once"
    assert (config.run_dir / "policy" / "model.safetensors").is_file()
    assert (config.run_dir / "report.html").is_file()
    assert not (config.run_dir / "dpo.checkpoints").exists()

"""A reward model is trained on comparisons, tested on prompts it never saw, and saved whole or not at all."""

from __future__ import annotations

import csv
import json
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
import torch
import yaml

from rlhf_ray.checkpoint import mark_complete, marked_checkpoints
from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import Preference, write_preferences
from rlhf_ray.errors import ConfigError, DataError, ModelError, ResourceError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.stages.prepare import check_reward_quality
from rlhf_ray.stages.reward import RewardReport, train_reward
from rlhf_ray.stages.training_data import load_comparisons
from rlhf_ray.types import Turn


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
        good, bad = ("".join(rng.choices("abcdef", k=rng.randint(2, 10))) + end for end in "!x")
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


def a_run(output_dir: Path, model: Path, **reward: Any) -> RunConfig:
    """A run whose comparisons are on disk."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"path": str(model)},
            "prompts": {"path": "unused", "eval_path": "unused", "format": "text"},
            "reward": {"epochs": 4, "lr": 2e-3, "batch_size": 8, "precision": "float32"} | reward,
        }
    )
    write_preferences(config.run_dir / "preferences.jsonl", pairs_with_a_rule(40, seed=1))
    write_preferences(config.run_dir / "preferences.holdout.jsonl", pairs_with_a_rule(30, seed=2))
    return config


@pytest.fixture(scope="module")
def trained(
    cluster: None, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> tuple[RunConfig, RewardReport, list[Any]]:
    config = a_run(tmp_path_factory.mktemp("runs"), tiny_model_dir)
    progress: list[Any] = []
    return config, train_reward(config, progress.append), progress


@pytest.mark.ray
def test_an_obvious_rule_is_learnt_and_generalises(trained: Any) -> None:
    _, report, _ = trained
    assert report.accuracy >= 0.9
    assert report.accuracy_low < report.accuracy <= report.accuracy_high
    assert report.log_loss < 0.5 < math.log(2)
    assert (report.pairs, report.train_pairs, report.annotators) == (30, 40, ("simulated:rule",))


@pytest.mark.ray
def test_the_report_is_written_beside_the_model_and_nothing_else_is_left(trained: Any) -> None:
    config, report, _ = trained
    written = json.loads((config.run_dir / "reward" / "reward_report.json").read_text())
    assert written["accuracy"] == report.accuracy
    assert report.version == RewardScorer(config.run_dir / "reward").version
    assert report.version.startswith("reward@")
    left = {path.name for path in config.run_dir.iterdir()}
    inputs = {"preferences.jsonl", "preferences.holdout.jsonl"}
    assert left == {*inputs, "config.resolved.yaml", "reward", "summary.json"}


@pytest.mark.ray
def test_normalised_scores_of_the_compared_candidates_have_mean_0_and_deviation_1(trained: Any) -> None:
    config, _, _ = trained
    scorer = RewardScorer(config.run_dir / "reward", precision="float32")
    pairs = pairs_with_a_rule(40, seed=1)
    texts = [(p.input_text, text) for p in pairs for text in (p.candidate1, p.candidate2)]
    values = torch.tensor([s.value for s in scorer.score_texts(*zip(*texts, strict=True))])
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.ray
def test_progress_is_told_as_numbers_that_end_at_the_last_step(trained: Any) -> None:
    _, _, progress = trained
    assert [row["step"] for row in progress] == list(range(1, 21))
    assert progress[0]["loss"] == pytest.approx(math.log(2))
    assert progress[-1]["loss"] < progress[0]["loss"]
    assert progress[-1]["eta_seconds"] == 0
    assert {row["steps"] for row in progress} == {20}
    assert all(row["per_second"] > 0 for row in progress)


@pytest.mark.ray
def test_more_frozen_layers_than_there_are_is_refused(cluster: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, freeze_layers=3)
    with pytest.raises(ConfigError, match=r"reward.freeze_layers = 3 and the model has 2 layers"):
        train_reward(config)
    left = {path.name for path in config.run_dir.iterdir()}
    assert left == {"preferences.jsonl", "preferences.holdout.jsonl", "config.resolved.yaml"}


@pytest.mark.ray
def test_the_saved_folder_is_a_plain_sequence_classifier(trained: Any) -> None:
    config, _, _ = trained
    model, tokenizer, _ = load_reward_model(config.run_dir / "reward")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = a_run(tmp_path, tmp_path / "no such model")
    (config.run_dir / "reward").mkdir()
    with pytest.raises(ConfigError, match="already holds a reward model; remove it"):
        train_reward(config)


def test_a_missing_file_of_comparisons_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    (config.run_dir / "preferences.holdout.jsonl").unlink()
    with pytest.raises(DataError, match=r"preferences.holdout.jsonl does not exist; run `rlhf-ray judge`"):
        train_reward(config)


def test_a_pair_that_is_too_long_is_named(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, max_length=300)
    long = Preference(input_text="p", candidate1="a" * 600, candidate2="b", human_preference=1.0)
    write_preferences(config.run_dir / "preferences.jsonl", [*pairs_with_a_rule(40, seed=1), long])
    with pytest.raises(DataError, match=r"preferences.jsonl: the prompt 'p' and a response are 60\d tokens together"):
        train_reward(config)


# ---- A file of one's own


def a_csv(path: Path, pairs: list[Preference]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input_text", "candidate1", "candidate2", "human_preference", "source", "weight"])
        for i, p in enumerate(pairs):
            answer = "candidate1" if p.human_preference else "candidate2"
            writer.writerow([p.input_text, p.candidate1, p.candidate2, answer, "ab"[i % 2], 1 + i % 3])


@pytest.mark.ray
def test_a_csv_with_ties_and_a_bad_row_becomes_a_reward_model(
    cluster: None, tmp_path: Path, tiny_model_dir: Path
) -> None:
    path = tmp_path / "judgements.csv"
    a_csv(path, pairs_with_a_rule(60, seed=1))
    with path.open("a") as file:
        file.writelines(f"tie {i},same{i}!,same{i}?,tie,a,1\n" for i in range(6))
        file.write("broken,only,three\n")
    config = a_run(tmp_path, tiny_model_dir, data=str(path), holdout=0.4)
    for name in ("preferences.jsonl", "preferences.holdout.jsonl"):
        (config.run_dir / name).unlink()
    with pytest.raises(DataError, match=r"1 of 67 rows .* are no comparison; mend them, or use reward.on_bad_row=skip"):
        train_reward(config)
    assert not (config.run_dir / "reward").exists()

    reward = config.reward.model_copy(update={"on_bad_row": "skip"})
    report = train_reward(config.model_copy(update={"reward": reward}))
    rejected = (config.run_dir / "reward.rejects.jsonl").read_text().splitlines()
    assert len(rejected) == 1
    assert "has 3 fields and line 1 names 6 columns" in rejected[0]
    assert report.train_pairs + round(0.4 * 66) == 66
    assert report.accuracy >= 0.9
    assert sum(found.pairs for found in report.quality.by_source.values()) == report.pairs
    assert report.order_agreement == 1.0
    written = json.loads((config.run_dir / "reward" / "reward_report.json").read_text())
    assert set(written["quality"]["by_source"]) == {"a", "b"}


def test_nothing_but_ties_to_test_on_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    tie = Preference(input_text="p", candidate1="a", candidate2="b", human_preference=0.5)
    write_preferences(config.run_dir / "preferences.holdout.jsonl", [tie])
    with pytest.raises(DataError, match=r"every held-out comparison of .*holdout.jsonl is a tie"):
        train_reward(config)


def test_a_dialogue_is_put_to_the_model_turn_by_turn(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"format": "chat"})})
    turns = (Turn("user", "Is it late?"), Turn("assistant", "A little."), Turn("user", "How late?"))
    dialogue = Preference(
        input_text="unused", candidate1=" Ten.", candidate2=" Two.", human_preference=0.25, turns=turns, weight=2.0
    )
    write_preferences(config.run_dir / "preferences.jsonl", [dialogue])
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=True)
    (comparison,), _ = load_comparisons(config, config.reward, tokenizer)
    text = "<|user|>Is it late?<|end|><|assistant|>A little.<|end|><|user|>How late?<|end|><|assistant|>"
    expected = tokenizer.encode(text) + tokenizer.encode(" Two.") + [tokenizer.eos_token_id]
    assert comparison.tokens.chosen_ids == expected
    assert (comparison.tokens.probability, comparison.tokens.weight) == (0.75, 2.0)


# ---- Resuming


RESUMABLE = {"save_steps": 20, "epochs": 100, "lr": 1e-4}


def with_a_checkpoint(config: RunConfig, identity: dict[str, Any]) -> Path:
    """A whole checkpoint that says so of itself."""
    folder = config.run_dir / "reward.checkpoints" / "step-000010"
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps(identity))
    mark_complete(folder)
    return folder


def test_resuming_where_every_checkpoint_is_damaged_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    (with_a_checkpoint(config, {}) / "identity.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*reward\.checkpoints, and the 1 .* are damaged"):
        train_reward(config, resume=True)


def test_checkpoints_of_an_earlier_training_are_not_written_over(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    with_a_checkpoint(config, {})
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier training; resume it"):
        train_reward(config)


def test_resuming_another_training_is_refused_with_what_differs(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    with_a_checkpoint(config, {"seed": 0, "model.path": str(tiny_model_dir), "reward.lr": 0.5})
    with pytest.raises(ConfigError, match=r"was written with .*reward\.lr = 0\.5, .*, training pairs = "):
        train_reward(config, resume=True)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_resume_goes_on_from_the_newest_checkpoint(
    tmp_path: Path,
    tiny_model_dir: Path,
    ray_temp_dir: Path,
    descendants: Callable[..., list[tuple[psutil.Process, str]]],
) -> None:
    config = a_run(tmp_path, tiny_model_dir, **RESUMABLE)
    written = config.model_dump(mode="json")
    written["prompts"]["eval_path"] = "unused too"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(written))
    command = [str(Path(sys.executable).parent / "rlhf-ray"), "reward", "-c", str(tmp_path / "run.yaml")]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["RAY_TMPDIR"] = str(ray_temp_dir)
    checkpoints = config.run_dir / "reward.checkpoints"
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            seen = []
            for line in process.stdout:
                seen.append(line)
                if "optimiser steps" in line and marked_checkpoints(checkpoints):
                    break
            started, titles = zip(*descendants(process.pid), strict=True)
            assert any("RayTrainWorker" in title for title in titles), seen
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130, process.stdout.read()
        finally:
            process.kill()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []
    assert len(list(checkpoints.glob("step-*/COMPLETE"))) in (1, 2), "the older one goes once the newer is marked"
    assert {path.name for path in config.run_dir.iterdir() if path.name.startswith(".")} == {".lock"}

    refused = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "already holds reward.checkpoints of an earlier run" in refused.stderr
    assert "--resume to go on" in refused.stderr

    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((config.run_dir / "reward" / "reward_report.json").read_text())
    assert report["train_steps"] == 500
    assert not checkpoints.exists()


@pytest.mark.ray
def test_more_than_the_cluster_has_is_refused(cluster: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, num_workers=4)
    with pytest.raises(ResourceError, match=r"4 CPUs \(reward 4 x 1\) and the cluster has 2; lower reward.num_cpus"):
        train_reward(config)


# ---- The gate


@pytest.mark.ray
def test_a_reward_model_below_the_floor_is_refused_with_the_way_round_it(trained: Any, tmp_path: Path) -> None:
    config, report, _ = trained
    check_reward_quality(config.run_dir / "reward", min_accuracy=report.accuracy)
    with pytest.raises(
        ModelError, match=r"is right on .* of 30 held-out pairs .* or lower reward\.min_accuracy to use"
    ):
        check_reward_quality(config.run_dir / "reward", min_accuracy=min(1.0, report.accuracy + 0.01) + 1e-9)


def test_a_reward_model_without_a_report_passes_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_reward_quality(tmp_path, min_accuracy=0.9)
    assert "nobody knows how accurate the reward model is" in caplog.text

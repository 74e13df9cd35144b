"""Training on Ray: however many workers share the batches, the same model; and an end with its cause."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.actors.reward_trainer import RewardJob, TrainedReward, train_on_ray
from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.errors import ConfigError, NumericalError, WorkerDiedError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def a_job(folder: Path, base: Path, **reward: Any) -> RewardJob:
    rng = random.Random(1)
    pairs = [
        TokenPair(
            chosen_ids=[*rng.choices(range(40, 300), k=rng.randint(1, 30)), 33, 0],
            rejected_ids=[*rng.choices(range(40, 300), k=rng.randint(1, 30)), 34, 0],
            weight=float(1 + i % 3),
            probability=rng.choice((1.0, 0.8)),
        )
        for i in range(64)
    ]
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"path": str(base)},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "reward": {"epochs": 2, "lr": 5e-4, "batch_size": 8, "precision": "float32", "num_cpus": 1} | reward,
        }
    )
    (folder / "reward").mkdir(parents=True)
    return RewardJob(
        config=config,
        model_folder=str(base),
        train=pairs[:48],
        validation=pairs[48:] if config.reward.early_stop_patience else [],
        score=[[pair.chosen_ids for pair in pairs[:10]], [pairs[0].rejected_ids]],
        folder=folder / "reward",
        checkpoints=folder / "checkpoints",
        identity={},
    )


def test_two_workers_train_the_model_that_one_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Shared batches, summed gradients, global means, checkpoints and a look at the validation pairs among them."""
    options = {"early_stop_patience": 100, "eval_steps": 4, "save_steps": 5}
    trained: dict[int, TrainedReward] = {}
    progress: dict[int, list[Mapping[str, float]]] = {1: [], 2: []}
    for workers in (1, 2):
        job = a_job(tmp_path / str(workers), tiny_model_dir, num_workers=workers, threads=1, **options)
        trained[workers] = train_on_ray(job, progress[workers].append)
    one, two = trained[1], trained[2]
    assert [row["step"] for row in progress[2]] == list(range(1, 13))
    for alone, shared in zip(progress[1], progress[2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)
    assert progress[1][-1]["loss"] < progress[1][0]["loss"]
    assert two.loss == pytest.approx(one.loss, abs=1e-4)
    assert two.validation_loss == pytest.approx(one.validation_loss, abs=1e-4)
    assert (one.steps, two.steps) == (12, 12)
    assert [len(group) for group in two.scores] == [10, 1]
    assert [x for group in two.scores for x in group] == pytest.approx([x for g in one.scores for x in g], abs=1e-3)
    weights = {workers: load_file(tmp_path / str(workers) / "reward" / "model.safetensors") for workers in (1, 2)}
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, atol=1e-4, rtol=0, msg=name)
    for workers in (1, 2):
        assert [path.name for path in (tmp_path / str(workers) / "checkpoints").iterdir()] == ["step-000010"]

    # What transformers, and TRL with it, makes of the folder.
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "2" / "reward", num_labels=1, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(tmp_path / "2" / "reward").pad_token_id == model.config.pad_token_id
    job = a_job(tmp_path / "3", tiny_model_dir)
    with torch.inference_mode():
        raw = [model(input_ids=torch.tensor([ids])).logits.item() for ids in job.score[0]]
    assert raw == pytest.approx(two.scores[0], abs=1e-5)


def test_what_a_worker_refuses_is_said_here(tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.freeze_layers = 9 and the model has 2 layers"):
        train_on_ray(a_job(tmp_path, tiny_model_dir, freeze_layers=9))


def test_a_loss_that_is_no_number_ends_both_workers(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = a_job(tmp_path, tiny_model_dir, num_workers=2, threads=1)
    with pytest.raises(NumericalError, match=r"the reward model's loss became nan at step 1; lower reward\.lr"):
        train_on_ray(replace(job, train=[replace(pair, margin=math.nan) for pair in job.train]))


def test_a_folder_that_the_workers_do_not_see_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    job = a_job(tmp_path, tiny_model_dir)
    job.folder.rmdir()
    with pytest.raises(ConfigError, match="set output_dir to a folder that all nodes share"):
        train_on_ray(job)


def test_a_worker_that_is_killed_ends_the_training_with_its_death(tmp_path: Path, tiny_model_dir: Path) -> None:
    def kill(seen: Mapping[str, float]) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or []) and psutil.Process() in process.parents():
                process.kill()

    with pytest.raises(WorkerDiedError, match="a worker that trained the reward model died"):
        train_on_ray(a_job(tmp_path, tiny_model_dir, epochs=200), kill)

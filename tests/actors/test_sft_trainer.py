"""SFT on Ray: two workers that share the batches make the policy that one makes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.sft_trainer import SFTJob, TrainedSFT, train_on_ray
from rlhf_ray.config import RunConfig
from rlhf_ray.data.demonstrations import TokenDemonstration

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def a_job(folder: Path, base: Path, **sft: Any) -> SFTJob:
    rng = random.Random(1)
    rows = []
    for _ in range(56):
        prompt = rng.choices(range(40, 300), k=rng.randint(1, 20))
        response = [*rng.choices((33, 34, 35), k=rng.randint(1, 9)), 0]
        rows.append(TokenDemonstration(token_ids=prompt + response, prompt_tokens=len(prompt)))
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"path": str(base)},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "sft": {"epochs": 2, "lr": 5e-4, "batch_size": 8, "precision": "float32", "threads": 1} | sft,
        }
    )
    (folder / "scratch" / "policy").mkdir(parents=True)
    return SFTJob(
        config=config,
        model_folder=str(base),
        train=rows[:48],
        holdout=rows[48:],
        folder=folder / "scratch" / "policy",
        checkpoints=folder / "checkpoints",
        identity={},
    )


def test_two_workers_train_the_policy_that_one_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Shared batches, and a mean over the tokens of both."""
    trained: dict[int, TrainedSFT] = {}
    progress: dict[int, list[Mapping[str, float]]] = {1: [], 2: []}
    for workers in (1, 2):
        job = a_job(tmp_path / str(workers), tiny_model_dir, num_workers=workers, save_steps=5)
        trained[workers] = train_on_ray(job, progress[workers].append)
        assert [path.name for path in job.checkpoints.iterdir()] == ["step-000010"]
    for alone, shared in zip(progress[1], progress[2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        assert shared["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)
    one, two = trained[1], trained[2]
    assert one.holdout_loss < one.holdout_loss_before
    assert two.holdout_loss_before == pytest.approx(one.holdout_loss_before, abs=1e-5)
    assert two.holdout_loss == pytest.approx(one.holdout_loss, abs=1e-3)
    weights = {n: load_file(tmp_path / str(n) / "scratch" / "policy" / "model.safetensors") for n in (1, 2)}
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, atol=1e-4, rtol=0, msg=name)

"""DPO on Ray: two workers share the reading of the reference and the batches, and make the policy that one makes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.dpo_trainer import DPOJob, TrainedDPO, train_on_ray
from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import TokenPair

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def a_job(folder: Path, base: Path, **dpo: Any) -> DPOJob:
    rng = random.Random(1)
    pairs = []
    for i in range(57):
        prompt = rng.choices(range(40, 300), k=rng.randint(1, 20))
        chosen, rejected = ([*rng.choices(range(40, 300), k=rng.randint(0, 6)), end, 0] for end in (33, 34))
        pairs.append(
            TokenPair(
                chosen_ids=prompt + chosen,
                rejected_ids=prompt + rejected,
                prompt_tokens=len(prompt),
                weight=float(1 + i % 3),
                probability=rng.choice((1.0, 0.8)),
            )
        )
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "model": {"path": str(base)},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "dpo": {"epochs": 2, "lr": 5e-4, "batch_size": 8, "precision": "float32", "threads": 1} | dpo,
        }
    )
    (folder / "scratch" / "policy").mkdir(parents=True)
    return DPOJob(
        config=config,
        model_folder=str(base),
        train=pairs[:48],
        holdout=pairs[48:],
        folder=folder / "scratch" / "policy",
        checkpoints=folder / "checkpoints",
        identity={},
    )


def test_two_workers_train_the_policy_that_one_does(tmp_path: Path, tiny_model_dir: Path) -> None:
    trained: dict[int, TrainedDPO] = {}
    progress: dict[int, list[Mapping[str, float]]] = {1: [], 2: []}
    for workers in (1, 2):
        job = a_job(tmp_path / str(workers), tiny_model_dir, num_workers=workers)
        trained[workers] = train_on_ray(job, progress[workers].append)
    for alone, shared in zip(progress[1], progress[2], strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert progress[1][-1]["loss"] < progress[1][0]["loss"]
    assert (trained[1].steps, trained[2].steps) == (12, 12)
    for alone, shared in zip(trained[1].rewards, trained[2].rewards, strict=True):
        assert shared == pytest.approx(alone, abs=1e-3)
    weights = {n: load_file(tmp_path / str(n) / "scratch" / "policy" / "model.safetensors") for n in (1, 2)}
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[2][name], value, atol=1e-4, rtol=0, msg=name)

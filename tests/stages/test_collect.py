"""Collecting candidates with a real engine: what is written, and one engine that goes on with another policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.config import RunConfig
from rlhf_ray.stages.collect import collect, sample_responses
from rlhf_ray.stages.prepare import prepare

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> object:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> RunConfig:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"The train number {i}"}) + "\n" for i in range(3)))
    return RunConfig.model_validate(
        {
            "output_dir": tmp_path,
            "model": {"path": str(tiny_model_dir)},
            "prompts": {"path": str(prompts), "eval_path": "unused", "max_tokens": 64},
            "sampling": {"max_new_tokens": 8},
            "collect": {"completions": 2, "max_prompts": 2},
            "generator": {"num_cpus": 0.5, "kv_cache_gb": 0.02},
        }
    )


def test_candidates_of_each_prompt_are_written_and_repeat_with_the_seed(cluster: object, config: RunConfig) -> None:
    seen: list[tuple[int, int]] = []
    report = collect(config, lambda done, of: seen.append((done, of)))
    rows = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert [(row["prompt"], row["prompt_index"]) for row in rows] == [
        ("The train number 0", 0),
        ("The train number 1", 1),
    ]
    assert all(len(row["completions"]) == 2 for row in rows)
    assert rows[0]["completions"][0] != rows[0]["completions"][1]
    assert (report.prompts, report.completions) == (2, 4)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    report.path.unlink()
    collect(config, lambda done, of: None)
    assert [json.loads(line) for line in report.path.read_text().splitlines()] == rows


def test_an_engine_that_goes_on_with_another_policy_samples_as_one_that_began_with_it(
    cluster: object, config: RunConfig, tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(5)
    moved = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    prepared = prepare(config, config.prompts.path)
    encoded = prepared.encode(config.prompts.path)
    base, then = sample_responses(prepared, [str(tiny_model_dir), str(other)], encoded, 2)
    (fresh,) = sample_responses(prepared, [str(other)], encoded, 2)
    assert [r.response_ids for r in then] == [r.response_ids for r in fresh]
    assert [r.response_ids for r in then] != [r.response_ids for r in base]
    for mine, theirs in zip(then, fresh, strict=True):
        assert mine.rollout_logprobs == pytest.approx(theirs.rollout_logprobs, abs=1e-4)

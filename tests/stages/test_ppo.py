"""The whole loop on a real cluster: vLLM generators, the served reward model, reference and learner actors."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from rlhf_ray.actors.generator import RayGenerator
from rlhf_ray.checkpoint import load_checkpoint
from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.errors import ConfigError, ModelError, ResourceError, RlhfRayError
from rlhf_ray.metrics import read_lines, write_summary
from rlhf_ray.stages.evaluate_run import run_evaluate
from rlhf_ray.stages.ppo import run_ppo

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, BATCH = 20, 8
"""Enough steps, with one response at a time in each engine, that a second generator which is up some seconds after the
first takes part."""


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    serve.shutdown()  # its client would outlive this cluster
    ray.shutdown()


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"The train number {i} leaves"}) + "\n" for i in range(11)))
    held_out.write_text("".join(json.dumps({"prompt": f"Rain fell on bridge {i}"}) + "\n" for i in range(3)))
    return train, held_out


@pytest.fixture
def make_config(tiny_model_dir: Path, tiny_reward_dir: Path, prompt_files: tuple[Path, Path], tmp_path: Path) -> Any:
    def make(**sections: Any) -> RunConfig:
        train, held_out = prompt_files
        base: dict[str, Any] = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tiny_model_dir)},
            "prompts": {"path": str(train), "eval_path": str(held_out), "max_tokens": 64},
            "sampling": {"max_new_tokens": 12},
            "serve": {"model": str(tiny_reward_dir), "port": 0, "num_cpus": 0.5, "threads": 1, "precision": "float32"},
            "generator": {
                "count": 2,
                "num_cpus": 0.5,
                "kv_cache_gb": 0.02,
                "max_num_seqs": 4,
                "threads": 1,
                "dtype": "float32",
            },
            "reference": {"num_cpus": 0.5, "threads": 1, "precision": "float32"},
            "learner": {"num_cpus": 0.5, "lr": 1e-4, "threads": 1, "precision": "float32"},
            "ppo": {"steps": STEPS, "batch_size": BATCH, "checkpoint_every": 8},
            "evaluate": {"samples_per_prompt": 2},
        }
        for name, section in sections.items():
            base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
        return RunConfig.model_validate(base)

    return make


def test_an_asynchronous_run_trains_every_prompt_once_within_its_staleness_bound(
    cluster: None, make_config: Any
) -> None:
    config = make_config(name="async", generator={"max_num_seqs": 1})
    summary = run_ppo(config)

    assert (summary.status, summary.steps, summary.samples) == ("finished", STEPS, STEPS * BATCH)
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert summary.staleness_max == 1
    assert summary.sampler_parity_max < 1e-3

    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4), "the first policy is the reference"
    assert abs(rows[-1]["kl"]) > 1e-4, "a trained policy has left it"
    parity = [row["parity_max"] for row in rows if "parity_max" in row]
    assert parity, "updates were acknowledged with a probe"
    assert max(parity) < 1e-3
    assert rows[-1]["generators"] in (1, 2), "the second one may still be starting"
    assert len(read_lines(config.run_dir / "samples.jsonl")) == STEPS * config.ppo.samples_per_step

    _, state = load_checkpoint(config.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "pipeline")
    assert state["step"] == STEPS
    assert load_config(config.run_dir / "config.resolved.yaml").learner.precision == "float32"
    written = json.loads((config.run_dir / "summary.json").read_text())
    assert written["samples"] == STEPS * BATCH
    assert written["stage_seconds"]["train"] > 0

    base = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(config.run_dir / "policy").state_dict()
    assert any(not torch.equal(base[name], trained[name]) for name in base)

    evaluation = run_evaluate(config)
    assert (evaluation.prompts, evaluation.samples_per_prompt) == (3, 2)
    assert evaluation.base.kl == pytest.approx(0, abs=1e-3), "the base's distance from itself"
    assert abs(evaluation.trained.kl) > 1e-3


def test_two_ranks_at_staleness_zero_train_only_on_what_the_newest_policy_sampled_and_one_resumes(
    cluster: None, make_config: Any
) -> None:
    config = make_config(
        name="sync",
        ppo={"max_staleness": 0, "steps": 2, "checkpoint_every": 1},
        generator={"count": 1},
        learner={"ranks": 2},
    )
    summary = run_ppo(config)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert summary.staleness_max == 0
    assert [row["staleness_max"] for row in rows] == [0, 0]
    assert all(row["sampler_gap"] < 1e-3 for row in rows), "every token was sampled by the policy that trains on it"

    alone = config.learner.model_copy(update={"ranks": 1})
    longer = config.model_copy(update={"ppo": config.ppo.model_copy(update={"steps": 3}), "learner": alone})
    resumed = run_ppo(longer, resume=True)
    assert (resumed.steps, resumed.samples) == (3, 3 * BATCH)
    assert (resumed.lost, resumed.trained_twice) == (0, 0)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [(row["step"], row["version"]) for row in rows] == [(1, 1), (2, 2), (3, 3)], "the learner went on from 2"
    kept = sorted(folder.name for folder in (config.run_dir / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"], "ppo.keep_checkpoints"
    with pytest.raises(ConfigError, match=r"is at step 3 and ppo\.steps = 3"):
        run_ppo(longer, resume=True)
    with pytest.raises(ConfigError, match=r"was written with seed = 0; give the same"):
        run_ppo(longer.model_copy(update={"seed": 1}), resume=True)
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        run_ppo(longer)

    shutil.rmtree(config.run_dir / "policy")
    write_summary(config.run_dir, {"status": "running"})  # it was killed after its last checkpoint
    assert run_ppo(longer, resume=True).steps == 3
    assert (config.run_dir / "policy" / "model.safetensors").is_file()
    assert read_lines(config.run_dir / "metrics.jsonl") == rows


def test_a_run_without_a_critic_compares_the_responses_to_each_prompt_and_lora_needs_no_reference_worker(
    cluster: None, make_config: Any
) -> None:
    config = make_config(
        name="groups",
        ppo={"estimator": "rloo", "completions": 4, "steps": 2, "samples_per_step": 8},
        generator={"count": 1},
        learner={"lora_rank": 4, "lr": 1e-2},
        reference={"count": 0},
    )
    summary = run_ppo(config)
    assert (summary.status, summary.samples, summary.lost, summary.trained_twice) == ("finished", 2 * BATCH, 0, 0)
    kl = [row["kl_k3"] for row in read_lines(config.run_dir / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-5, "the first step has led the policy away from its base"
    rows = read_lines(config.run_dir / "samples.jsonl")
    assert sorted(row["prompt_id"] for row in rows) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    for start in range(0, 16, 4):
        assert len({row["prompt"] for row in rows[start : start + 4]}) == 1
        assert len({row["response"] for row in rows[start : start + 4]}) > 1
    assert "loss_value" not in read_lines(config.run_dir / "metrics.jsonl")[-1]


def test_what_cannot_work_is_refused_before_anything_is_started(
    cluster: None, make_config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match=r"the run asks for .* CPUs .*generator 2 x 3.* and the cluster has 4"):
        run_ppo(make_config(generator={"num_cpus": 3}))
    with pytest.raises(ModelError, match=r"there is no reward model in .*; train one with `rlhf-ray reward`"):
        run_ppo(make_config(serve={"model": str(tmp_path)}))
    policy_folder = make_config().model.path
    with pytest.raises(ModelError, match=r"has \d+ labels \(.*\) and a reward model has one; set serve\.model"):
        run_ppo(make_config(serve={"model": policy_folder}))
    with pytest.raises(ResourceError, match=r"learner\.num_cpus = 5 and no node of the cluster has more than 4 CPUs"):
        run_ppo(make_config(learner={"num_cpus": 5}))
    with pytest.raises(ModelError, match="there is no trained policy"):
        run_evaluate(make_config(name="untrained"))


def test_a_killed_generator_is_replaced_and_its_prompts_are_issued_again(
    cluster: None, make_config: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: dict[str, RayGenerator] = {}
    start = RayGenerator.start

    def remembered(name: str, *args: Any, **kwargs: Any) -> RayGenerator:
        started[name] = start(name, *args, **kwargs)
        return started[name]

    monkeypatch.setattr(RayGenerator, "start", remembered)
    config = make_config(name="killed", generator={"count": 1}, ppo={"steps": 4, "checkpoint_every": 0})

    def kill_the_first(row: Any) -> None:
        if row["step"] == 1:
            ray.kill(started["generator-0"]._actor)

    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        summary = run_ppo(config, on_step=kill_the_first)
    assert (summary.status, summary.steps, summary.samples) == ("finished", 4, 4 * BATCH)
    assert (summary.lost, summary.trained_twice) == (0, 0)
    assert list(started) == ["generator-0", "generator-1"]
    assert "replacing it (1 of 3)" in caplog.text


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scorers that are functions of a module in the current folder, by name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ppo_rewards", raising=False)
    (tmp_path / "ppo_rewards.py").write_text(
        "def brevity(completion_ids, **kwargs):\n"
        "    return [-len(ids) / 10 for ids in completion_ids]\n"
        "async def picky(prompts, **kwargs):\n"
        "    return [float('nan') if '7' in prompt else 1.0 for prompt in prompts]\n"
    )
    return lambda name, **more: {"kind": "function", "name": name, "function": f"ppo_rewards:{name}", **more}


def test_a_weighted_sum_trains_and_each_of_its_scorers_is_logged_apart(
    cluster: None, make_config: Any, rewards: Any
) -> None:
    scorers = [{"kind": "served", "name": "reward"}, rewards("brevity", weight=2)]
    config = make_config(name="sum", scorers=scorers, generator={"count": 1}, ppo={"steps": 2, "checkpoint_every": 0})
    summary = run_ppo(config)
    assert (summary.status, summary.lost, summary.trained_twice) == ("finished", 0, 0)
    for row in read_lines(config.run_dir / "metrics.jsonl"):
        assert row["score_brevity_mean"] == pytest.approx(-row["response_length"] / 10)
        assert row["score_mean"] == pytest.approx(row["score_reward_mean"] + 2 * row["score_brevity_mean"], abs=1e-5)
    for sample in read_lines(config.run_dir / "samples.jsonl"):
        parts = sample["score_parts"]
        assert sample["score"] == pytest.approx(parts["reward"] + 2 * parts["brevity"], abs=1e-5)


def test_a_function_alone_needs_no_reward_model_and_is_what_evaluation_shows(
    cluster: None, make_config: Any, rewards: Any, tmp_path: Path
) -> None:
    config = make_config(
        name="function",
        scorers=[rewards("brevity")],
        serve={"model": str(tmp_path / "nowhere")},
        generator={"count": 1},
        ppo={"steps": 2, "checkpoint_every": 0},
    )
    assert run_ppo(config).status == "finished"
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["score_mean"] for row in rows] == pytest.approx([-row["response_length"] / 10 for row in rows])
    assert not any(key.startswith("score_brevity") for row in rows for key in row)
    evaluation = run_evaluate(config)
    for side in (evaluation.base, evaluation.trained):
        assert side.score == pytest.approx(-side.tokens / 10)


def test_a_scorer_without_a_score_ends_the_run_with_its_name_and_cause(
    cluster: None, make_config: Any, rewards: Any
) -> None:
    scorers = [{"kind": "served", "name": "reward"}, rewards("picky")]
    ppo = {"steps": 4, "checkpoint_every": 0, "max_quarantined": 0}
    config = make_config(name="picky", scorers=scorers, generator={"count": 1}, ppo=ppo)
    cause = r"prompt \d+ \('The train number 7 leaves'\) is quarantined.* scorer picky: ppo_rewards:picky gave nan for"
    with pytest.raises(RlhfRayError, match=cause):
        run_ppo(config)
    written = json.loads((config.run_dir / "summary.json").read_text())
    assert written["status"] == "failed"
    assert re.match(f"RlhfRayError: {cause}", written["cause"])


def test_a_prompt_whose_responses_get_no_score_is_quarantined_and_the_run_goes_on(
    cluster: None, make_config: Any, rewards: Any
) -> None:
    ppo = {"steps": 2, "checkpoint_every": 0}
    config = make_config(name="poison", scorers=[rewards("picky")], generator={"count": 1}, ppo=ppo)
    summary = run_ppo(config)
    assert (summary.status, summary.samples, summary.lost, summary.trained_twice) == ("finished", 2 * BATCH, 0, 0)
    rows = read_lines(config.run_dir / "quarantine.jsonl")
    assert len(rows) == summary.quarantined > 0, "two steps see each of the eleven prompts"
    for row in rows:
        assert row["prompt"] == "The train number 7 leaves"
        assert row["cause"].startswith(f"scorer picky: ppo_rewards:picky gave nan for prompt {row['prompt_id']}, ")
    assert read_lines(config.run_dir / "metrics.jsonl")[-1]["quarantined"] == summary.quarantined

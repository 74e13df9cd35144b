"""Two ranks take the step that one takes, whatever is trained and however it is cut; any number goes on from there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import spawn

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import InputError
from rlhf_ray.models.sharding import own_slice
from rlhf_ray.roles.learner import PPOLearner
from rlhf_ray.roles.ranks import Ranks
from rlhf_ray.types import Experience, Prompt, Rollout, StepReport

CPU = torch.device("cpu")
SIZE = 2
STEPS = 2

SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "one pass": {},
    "many passes over small micro-batches": {
        "ppo": {"epochs": 2, "minibatches": 2},
        "learner": {"micro_batch_tokens": 24},
    },
    "a critic of its own": {"learner": {"critic": "model"}},
    "lora": {"learner": {"lora_rank": 4, "lora_alpha": 8.0}, "ppo": {"epochs": 2}},
    "lora as its own reference": {
        "learner": {"lora_rank": 4, "micro_batch_tokens": 24},
        "reference": {"count": 0},
    },
    "groups that ranks share": {"ppo": {"estimator": "rloo", "completions": 2}},
    "grpo with its KL in the loss": {
        "ppo": {"estimator": "grpo", "completions": 4, "kl": {"coef": 0.0, "loss": "k3", "loss_coef": 0.1}},
    },
    "gradient checkpointing": {"learner": {"gradient_checkpointing": True}, "ppo": {"epochs": 2}},
}


def make_learner(folder: Path, out: Path, settings: Mapping[str, Any], ranks: Ranks | None = None) -> PPOLearner:
    config = RunConfig.model_validate(
        {
            "output_dir": out,
            "model": {"path": str(folder)},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "learner": {"lr": 1e-3, "threads": 1, "precision": "float32", **settings.get("learner", {})},
            "ppo": {"batch_size": 8, **settings.get("ppo", {})},
            "reference": settings.get("reference", {}),
        }
    )
    critic = str(folder) if config.learner.critic == "model" else None
    return PPOLearner(config, str(folder), "cpu", "float32", critic_folder=critic, ranks=ranks)


def batch(version: int, completions: int = 1) -> list[Experience]:
    """Eight rows of many lengths; a prompt's responses stand apart, so that different ranks get them."""
    rng = np.random.default_rng(version)
    ids = [[rng.integers(3, 300, rng.integers(*span)).tolist() for span in ((2, 9), (1, 12))] for _ in range(8)]
    return [
        Experience(
            rollout=Rollout(
                prompt=Prompt(prompt_id=i % (8 // completions), text="", token_ids=tuple(prompt_ids), seed=0),
                response_ids=tuple(response_ids),
                rollout_logprobs=(-3.0,) * len(response_ids),
                policy_versions=(version,) * len(response_ids),
                finish_reason="stop",
                text="",
            ),
            score=float(rng.normal()),
            ref_logprobs=np.full(len(response_ids), -3.0, np.float32),
        )
        for i, (prompt_ids, response_ids) in enumerate(ids)
    ]


def train(learner: PPOLearner, settings: Mapping[str, Any]) -> list[StepReport]:
    completions = settings.get("ppo", {}).get("completions", 1)
    reports = []
    for _ in range(STEPS):
        experiences = batch(learner.version, completions)
        if "reference" in settings:
            experiences = [replace(e, ref_logprobs=None) for e in experiences]
        reports.append(learner.train_step(experiences, kl_coef=0.05))
    return reports


def outcome(learner: PPOLearner, reports: Sequence[StepReport]) -> dict[str, Any]:
    return {
        "metrics": [dict(report.metrics) for report in reports],
        "weights": learner.weights(),
        "probe": learner.probe().logprobs,
    }


def one_rank(rank: int, port: int, folder: Path, out: Path) -> None:
    """What each of the processes does; rank 0 writes what came of it."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    ranks = Ranks.joined(store, rank=rank, size=SIZE, device=CPU)
    outcomes: dict[str, Any] = {"on_this_node": ranks.on_this_node}
    for name, settings in SETTINGS.items():
        learner = make_learner(folder, out, settings, ranks)
        outcomes[name] = outcome(learner, train(learner, settings))
        for _ in range(2):  # the second time in the memory of the first
            learner.save(out / name / "checkpoint")
        learner.export(out / name / "policy")
        outcomes[f"{name}, further"] = outcome(learner, train(learner, settings))
    parameters = list(learner._model.parameters())
    outcomes["sharded"] = sum(own_slice(p).numel() < p.numel() for p in parameters) / len(parameters)

    settings = SETTINGS["a critic of its own"]
    learner = make_learner(folder, out, settings, ranks)
    learner.load(out / "alone")
    outcomes["resumed from one rank's"] = outcome(learner, train(learner, settings))

    bad = batch(learner.version)
    bad[5] = replace(bad[5], score=math.nan)
    reports = [learner.train_step(bad, kl_coef=0.05), learner.train_step(batch(learner.version), kl_coef=0.05)]
    outcomes["after a score that is no number"] = outcome(learner, reports)

    learner = make_learner(folder, out, {"learner": {"lr": 1e30}, "ppo": {"epochs": 2}}, ranks)
    outcomes["diverged"] = dict(learner.train_step(batch(0), kl_coef=0.05).metrics)
    every_rank = ranks.gather((learner.version, outcomes["diverged"]["skipped"], ranks.rank))
    if rank == 0:
        torch.save(outcomes | {"every_rank": every_rank}, out / "outcomes.pt")
    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and outcomes of the processes."""
    out = tmp_path_factory.mktemp("ranks")
    alone = make_learner(tiny_model_dir, out, SETTINGS["a critic of its own"])
    train(alone, {})
    alone.save(out / "alone")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=2))
    spawn(one_rank, (store.port, tiny_model_dir, out), nprocs=SIZE)
    return out, torch.load(out / "outcomes.pt", weights_only=False)


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert mine == pytest.approx(other, rel=2e-3, abs=1e-5)
    assert set(ours["weights"]) == set(theirs["weights"])
    assert max(float((ours["weights"][n] - w).abs().max()) for n, w in theirs["weights"].items()) < 2e-5
    assert ours["probe"] == pytest.approx(theirs["probe"], abs=1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_take_the_steps_of_one(
    name: str, shared: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    learner = make_learner(tiny_model_dir, tmp_path, SETTINGS[name])
    start = learner.weights()
    expected = outcome(learner, train(learner, SETTINGS[name]))
    assert max(float((expected["weights"][n] - w).abs().max()) for n, w in start.items()) > 1e-4
    same(shared[1][name], expected)


@pytest.mark.parametrize("name", ["one pass", "a critic of its own", "lora"])
def test_one_rank_goes_on_from_what_two_have_saved(
    name: str, shared: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    learner = make_learner(tiny_model_dir, tmp_path, SETTINGS[name])
    assert learner.load(shared[0] / name / "checkpoint") == STEPS
    same(outcome(learner, train(learner, SETTINGS[name])), shared[1][f"{name}, further"])


def test_two_ranks_go_on_from_what_one_has_saved(
    shared: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = SETTINGS["a critic of its own"]
    unbroken = make_learner(tiny_model_dir, tmp_path, settings)
    train(unbroken, settings)
    same(shared[1]["resumed from one rank's"], outcome(unbroken, train(unbroken, settings)))


def test_a_checkpoint_of_which_a_ranks_part_is_missing_is_refused(
    shared: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    learner = make_learner(tiny_model_dir, tmp_path, {})
    checkpoint = shared[0] / "one pass" / "checkpoint"
    (checkpoint / "rank-001").rename(checkpoint / "elsewhere")
    try:
        with pytest.raises(InputError, match="rank-001 is not complete"):
            learner.load(checkpoint)
    finally:
        (checkpoint / "elsewhere").rename(checkpoint / "rank-001")


def test_the_policy_is_exported_whole(shared: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(shared[0] / "lora" / "policy").state_dict()
    weights = shared[1]["lora"]["weights"]
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())


def test_the_weights_are_spread_over_the_ranks_of_a_node(shared: tuple[Path, dict[str, Any]]) -> None:
    assert shared[1]["sharded"] > 0.9
    assert shared[1]["on_this_node"] == SIZE


def test_all_ranks_skip_a_step_together_and_go_on(shared: tuple[Path, dict[str, Any]]) -> None:
    skipped, taken = shared[1]["after a score that is no number"]["metrics"]
    assert (skipped["skipped"], taken["skipped"]) == (1.0, 0.0)
    assert "loss_policy" in taken
    assert shared[1]["diverged"]["skipped"] == 1.0
    assert [(version, skipped) for version, skipped, _ in shared[1]["every_rank"]] == [(1, 1.0)] * SIZE

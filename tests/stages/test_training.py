"""What SFT, DPO and reward training share: where each begins, and what it leaves of an earlier try."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rlhf_ray.checkpoint import mark_complete
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.metrics import MetricsWriter, read_lines
from rlhf_ray.stages.training import check_start, policy_training, refuse_anothers


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    unused = {"model": {"path": "unused"}, "prompts": {"path": "unused", "eval_path": "unused"}}
    return RunConfig.model_validate({"name": "run", "output_dir": str(tmp_path), **unused})


def test_a_new_training_begins_at_no_step(tmp_path: Path) -> None:
    assert check_start(tmp_path / "sft.checkpoints", {}, resume=False) is None


@pytest.mark.parametrize("left", [(), ("step-000010",)], ids=["nothing", "a checkpoint cut short"])
def test_one_that_was_cut_short_before_its_first_checkpoint_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: tuple[str, ...]
) -> None:
    for name in left:
        (tmp_path / "sft.checkpoints" / name).mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        assert check_start(tmp_path / "sft.checkpoints", {}, resume=True) == 0
    assert "there is no checkpoint in" in caplog.text
    assert "beginning at the first step" in caplog.text


@pytest.mark.parametrize(
    ("left", "others"),
    [
        ({}, None),
        ({"metrics": "sft_loss"}, None),
        ({"checkpoints": "sft.checkpoints", "metrics": "dpo_loss"}, None),
        ({"checkpoints": "reward.checkpoints"}, None),
        ({"metrics": "kl"}, "ppo"),
        ({"metrics": "dpo_loss"}, "dpo"),
        ({"checkpoints": "checkpoints", "metrics": "dpo_loss"}, "dpo and ppo"),
    ],
)
def test_what_another_trainer_has_left_is_not_taken_for_an_earlier_try(
    tmp_path: Path, left: dict[str, str], others: str | None
) -> None:
    if "checkpoints" in left:
        folder = tmp_path / left["checkpoints"] / "step-000010"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        mark_complete(folder)
    if "metrics" in left:
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, left["metrics"]: 0.5}) + "\n")
    if others is None:
        refuse_anothers(tmp_path, "sft")
    else:
        with pytest.raises(
            ConfigError, match=f"holds what {others} has left, and no checkpoint of sft; choose another"
        ):
            refuse_anothers(tmp_path, "sft")


@pytest.mark.parametrize(("start", "steps"), [(0, [1]), (2, [1, 2, 3]), (None, [1, 2, 3, 4, 1])])
def test_steps_that_are_taken_again_stand_in_the_metrics_once(
    config: RunConfig, start: int | None, steps: list[int]
) -> None:
    with MetricsWriter(config.run_dir) as earlier:
        for step in (1, 2, 3, 4):
            earlier.write({"step": step, "sft_loss": 1.0})
    progress = {"step": (start or 0) + 1, "loss": 0.5, "accuracy": 1.0, "per_second": 2.0}
    with policy_training(config, config.sft, start=start, on_progress=None) as (folder, hear):
        hear(progress)
        (folder / "config.json").write_text(json.dumps({}))
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == steps
    assert rows[-1]["sft_loss"] == 0.5
    assert (config.run_dir / "policy" / "config.json").is_file()

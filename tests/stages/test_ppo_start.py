"""Where a PPO run begins, as far as it shows without a cluster: at nothing, or at the newest whole checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.checkpoint import MARKER, mark_complete, save_checkpoint
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.metrics import write_summary
from rlhf_ray.stages.ppo import _find_start, _identity


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    sections: dict[str, Any] = {"output_dir": str(tmp_path), "model": {"path": "m"}, "prompts": {"path": "a.jsonl"}}
    sections["prompts"]["eval_path"] = "b.jsonl"
    return RunConfig.model_validate(sections)


def save_step(config: RunConfig, step: int) -> Path:
    folder = config.run_dir / "checkpoints" / f"step-{step:06d}"
    save_checkpoint(folder / "pipeline", tensors={}, state={"step": step, "identity": _identity(config, [], None)})
    mark_complete(folder)
    return folder


def test_a_resumed_run_goes_on_from_the_newest_whole_checkpoint_and_says_why_not_from_a_newer_one(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save_step(config, 10), save_step(config, 20)
    assert _find_start(config, resume=True, identity=_identity(config, [], None)).folder == newer
    (newer / "pipeline" / MARKER).write_text('{"state.json": "')
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        start = _find_start(config, resume=True, identity=_identity(config, [], None))
    assert start.folder == older
    assert start.state is not None
    assert start.state["step"] == 10
    assert f"{newer} is passed over: {newer / 'pipeline' / MARKER} is missing or damaged" in caplog.text
    assert sorted(folder.name for folder in older.parent.iterdir()) == ["step-000010", "step-000020.damaged"]


def test_where_every_checkpoint_is_damaged_resuming_is_refused_and_so_is_starting_over_them(config: RunConfig) -> None:
    for step in (10, 20):
        (save_step(config, step) / "pipeline" / "state.json").write_text("{")
    with pytest.raises(ConfigError, match=r"no whole checkpoint in .*, and the 2 that are marked complete are damaged"):
        _find_start(config, resume=True, identity=_identity(config, [], None))
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        _find_start(config, resume=False, identity={})


def test_what_died_between_its_last_checkpoint_and_its_policy_goes_on_and_what_is_finished_does_not(
    config: RunConfig,
) -> None:
    last = save_step(config, config.ppo.steps)
    for status in ("running", "failed"):
        write_summary(config.run_dir, {"status": status})
        assert _find_start(config, resume=True, identity={}).folder == last
    write_summary(config.run_dir, {"status": "finished"})
    with pytest.raises(ConfigError, match=r"is at step 100 and ppo\.steps = 100; raise ppo\.steps"):
        _find_start(config, resume=True, identity={})
    fewer = config.model_copy(update={"ppo": config.ppo.model_copy(update={"steps": 99})})
    write_summary(config.run_dir, {"status": "failed"})
    with pytest.raises(ConfigError, match=r"is at step 100 and ppo\.steps = 99; raise ppo\.steps"):
        _find_start(fewer, resume=True, identity={})


def test_prompts_that_have_changed_are_refused_since_the_ledger_knows_their_numbers(config: RunConfig) -> None:
    save_step(config, 10)  # of no prompts
    with pytest.raises(ConfigError, match=r"was written with prompts' content = [0-9a-f]{12}; give the same"):
        _find_start(config, resume=True, identity=_identity(config, [("a", (1, 2))], None))


def test_resuming_what_never_wrote_a_checkpoint_begins_at_the_first_step_and_says_so(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert not _find_start(config, resume=False, identity={}).again
    with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
        start = _find_start(config, resume=True, identity=_identity(config, [], None))
    assert (start.folder, start.step, start.again) == (None, 0, True)
    assert "there is no checkpoint in" in caplog.text

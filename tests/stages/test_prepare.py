"""What every stage refuses before anything heavy starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.stages.prepare import check_same_tokenizer, prepare


def a_config(model: Path, **sections: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": str(model)}, "prompts": {"path": "a", "eval_path": "b"}, **sections}
    )


def test_a_reward_model_with_another_tokenizer_is_refused(
    tiny_model_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    policy = load_tokenizer(tiny_model_dir, need_chat_template=False)
    check_same_tokenizer(policy, tiny_reward_dir)
    other = tmp_path / "other"
    shutil.copytree(tiny_reward_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="has another tokenizer than the policy"):
        check_same_tokenizer(policy, other)


def test_every_auto_is_resolved_and_the_output_folder_is_absolute(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = prepare(a_config(tiny_model_dir, learner={"num_gpus": 1})).config
    assert config.learner.precision == "bfloat16", "the driver answers for a GPU that it does not have"
    assert config.generator.dtype in ("float32", "bfloat16")
    assert "auto" not in (config.reference.precision, config.serve.precision, config.reward.precision)
    assert config.run_dir == tmp_path / "runs" / "run"

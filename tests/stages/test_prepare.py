"""What every stage refuses before anything heavy starts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError, DataError, ModelError
from rlhf_ray.stages.prepare import check_reward_model_reads, check_scorers, prepare


def a_config(model: Path, **sections: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": str(model)}, "prompts": {"path": "a", "eval_path": "b"}, **sections}
    )


def test_a_reward_model_with_another_tokenizer_is_refused(
    tiny_model_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    policy = prepare(a_config(tiny_model_dir))
    check_reward_model_reads(policy, tiny_reward_dir, [[1, 2]])
    other = tmp_path / "other"
    shutil.copytree(tiny_reward_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="has another tokenizer than the policy"):
        check_reward_model_reads(policy, other, [[1, 2]])


@pytest.mark.parametrize("fits", [True, False])
def test_a_reward_model_must_read_the_longest_prompt_a_whole_response_and_eos(
    tiny_model_dir: Path, tiny_reward_dir: Path, fits: bool
) -> None:
    policy = prepare(a_config(tiny_model_dir, sampling={"max_new_tokens": 12}))
    prompts = [[1], [1] * (512 - 12 - 1 + (not fits)), [1, 2]]
    if fits:
        check_reward_model_reads(policy, tiny_reward_dir, prompts)
    else:
        with pytest.raises(ModelError, match=r"reads 512 tokens, and the longest prompt, .* and EOS are 513"):
            check_reward_model_reads(policy, tiny_reward_dir, prompts)


def test_a_bad_prompt_line_is_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The train"}\n{"text": "no prompt"}\n')
    with pytest.raises(DataError, match="line 2"):
        prepare(a_config(tmp_path / "no_model"), str(tmp_path / "prompts.jsonl"))


def test_every_auto_is_resolved_and_the_output_folder_is_absolute(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = prepare(a_config(tiny_model_dir, learner={"num_gpus": 1})).config
    assert config.learner.precision == "bfloat16", "the driver answers for a GPU that it does not have"
    assert config.generator.dtype in ("float32", "bfloat16")
    assert "auto" not in (config.reference.precision, config.serve.precision, config.reward.precision)
    assert config.run_dir == tmp_path / "runs" / "run"


SERVED = {"kind": "served", "name": "reward"}
REMOTE = {"kind": "remote", "name": "far", "urls": ["http://far:1"], "api_key_env": "FAR_KEY"}


def test_a_scorer_whose_function_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def brevity(completions, **kwargs): ...\n")
    function = {"kind": "function", "name": "brief", "function": "my_rewards:brevity"}
    check_scorers(a_config(tmp_path, scorers=[SERVED, function]))
    with pytest.raises(ConfigError, match=r"^scorers\.1\.function = my_rewards:breviti cannot be imported"):
        check_scorers(a_config(tmp_path, scorers=[SERVED, {**function, "function": "my_rewards:breviti"}]))


def test_a_scorer_whose_api_key_is_not_there_is_refused_and_a_bad_key_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(
        ConfigError, match=r"^scorers\.0\.api_key_env = FAR_KEY, and that environment variable holds no"
    ):
        check_scorers(a_config(tmp_path, scorers=[REMOTE]))
    monkeypatch.setenv("FAR_KEY", "s3cret")
    check_scorers(a_config(tmp_path, scorers=[REMOTE]))
    for key in ("", " ", "s3cret\n", "s3crét"):
        monkeypatch.setenv("FAR_KEY", key)
        with pytest.raises(ConfigError) as refused:
            check_scorers(a_config(tmp_path, scorers=[REMOTE]))
        assert "s3cr" not in str(refused.value)

"""SFT leaves a policy that anybody can load, its figures, and nothing else; what cannot work is refused at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import Preference, write_preferences
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.metrics import read_lines, read_summary
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.report.page import write_report
from rlhf_ray.stages.sft import train_sft
from rlhf_ray.stages.training_data import load_sft_data
from rlhf_ray.types import Turn


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


def comparisons(n: int, *, seed: int) -> list[Preference]:
    """What is preferred is made of exclamation marks."""
    rng = random.Random(seed)
    return [
        Preference(
            input_text=f"prompt {seed} {i}",
            candidate1="!" * rng.randint(2, 6),
            candidate2="".join(rng.choices("abcdef", k=5)),
            human_preference=1.0,
            annotator="simulated:rule",
        )
        for i in range(n)
    ]


def a_run(output_dir: Path, model: Path, **sft: Any) -> RunConfig:
    """A run whose comparisons are on disk."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"path": str(model)},
            "prompts": {"path": "unused", "eval_path": "unused", "format": "text"},
            "sft": {"epochs": 4, "lr": 2e-3, "batch_size": 8, "precision": "float32"} | sft,
        }
    )
    tie = Preference(input_text="tied", candidate1="a", candidate2="b", human_preference=0.5)
    write_preferences(config.run_dir / "preferences.jsonl", [*comparisons(40, seed=1), tie])
    write_preferences(config.run_dir / "preferences.holdout.jsonl", comparisons(10, seed=2))
    return config


@pytest.mark.ray
def test_the_preferred_responses_of_a_run_become_a_policy(cluster: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    steps: list[float] = []
    report = train_sft(config, lambda seen: steps.append(seen["step"]))
    assert (report.responses, report.holdout_responses, report.ties, report.steps) == (40, 10, 1, 20)
    assert report.holdout_loss < 0.7 * report.holdout_loss_before
    assert steps[-1] == 20

    left = {path.name for path in config.run_dir.iterdir()}
    inputs = {"preferences.jsonl", "preferences.holdout.jsonl"}
    assert left == {*inputs, "config.resolved.yaml", "metrics.jsonl", "tensorboard", "policy", "summary.json"}
    summary = read_summary(config.run_dir)
    assert (summary["status"], summary["sft_holdout_loss"]) == ("finished", report.holdout_loss)
    rows = read_lines(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == steps
    assert rows[-1]["sft_loss"] < rows[0]["sft_loss"]

    policy, loading = AutoModelForCausalLM.from_pretrained(config.run_dir / "policy", output_loading_info=True)
    assert not loading["missing_keys"]
    assert str(policy.dtype) == "torch.float32"
    tokenizer = AutoTokenizer.from_pretrained(config.run_dir / "policy")
    ids = tokenizer("prompt 3 1", return_tensors="pt")["input_ids"]
    written = policy.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).startswith("!!")
    assert "Loss on held-out responses" in write_report(config.run_dir).read_text()


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_the_token_ids_are_those_that_ppo_and_the_reward_model_see(
    tmp_path: Path, tiny_model_dir: Path, prompt_format: str
) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"format": prompt_format})})
    path = tmp_path / "own.jsonl"
    rows = [
        {"prompt": "The train", "response": " was late."},
        {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", " A"))]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = config.sft.model_copy(update={"data": str(path), "holdout": 0.5})
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=True)
    data = load_sft_data(config, section, tokenizer)
    found = {tuple(row.token_ids): row.prompt_tokens for row in (*data.train, *data.holdout)}
    expected = {}
    for prompt, turns, response in (
        ("The train", (Turn("user", "The train"),), " was late."),
        ("\n\nSystem: S\n\nHuman: U\n\nAssistant: ", (Turn("system", "S"), Turn("user", "U")), " A"),
    ):
        templated = "".join(f"<|{turn.role}|>{turn.content}<|end|>" for turn in turns) + "<|assistant|>"
        before = tokenizer.encode(prompt if prompt_format == "text" else templated)
        expected[*before, *tokenizer.encode(response), tokenizer.eos_token_id] = len(before)
    assert found == expected


def test_a_run_that_has_a_policy_keeps_it(tmp_path: Path) -> None:
    config = a_run(tmp_path, tmp_path / "no such model")
    (config.run_dir / "policy").mkdir()
    with pytest.raises(ConfigError, match="already holds a policy; remove it, or choose another name"):
        train_sft(config)


def test_missing_comparisons_are_refused_with_the_key_for_one_s_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    (config.run_dir / "preferences.holdout.jsonl").unlink()
    with pytest.raises(DataError, match=r"preferences.holdout.jsonl does not exist; .* in sft\.data"):
        train_sft(config)


def test_a_bad_row_and_one_that_is_too_long_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "q"}\n')
    with pytest.raises(DataError, match=r"1 of 2 rows of .* are no demonstration; .* sft\.on_bad_row=skip to write"):
        train_sft(a_run(tmp_path, tiny_model_dir, data=str(path)))
    path.write_text('{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "' + "a" * 600 + '"}\n')
    with pytest.raises(DataError, match=r"prompt 'q' and a response are 602 tokens .*; raise sft\.max_length \(300\)"):
        train_sft(a_run(tmp_path, tiny_model_dir, data=str(path), max_length=300))


def test_nothing_but_ties_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    tie = Preference(input_text="p", candidate1="a", candidate2="b", human_preference=0.5)
    write_preferences(config.run_dir / "preferences.jsonl", [tie])
    with pytest.raises(DataError, match="must each prefer some response; here there are only ties"):
        train_sft(config)

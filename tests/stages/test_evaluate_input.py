"""What two policies, a judge and a place for the result must be like, and what is refused before anything starts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError, DataError, ModelError, ScorerError
from rlhf_ray.metrics import write_json
from rlhf_ray.stages.evaluate import EvalRow, compare
from rlhf_ray.stages.evaluate_input import make_judge, prepare_pair
from rlhf_ray.types import Prompt, Rollout, Score

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tiny_model_dir: Path, tmp_path: Path) -> MakeConfig:
    """A run that has prompts and no policy; what is given goes into its section evaluate."""
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "The train"}\n{"prompt": "Rain fell"}\n')

    def make(scorers: Any = None, **evaluate: Any) -> RunConfig:
        data: dict[str, Any] = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tiny_model_dir)},
            "prompts": {"path": "train.jsonl", "eval_path": str(tmp_path / "held_out.jsonl"), "max_tokens": 64},
            "sampling": {"max_new_tokens": 12},
            "evaluate": evaluate,
        }
        return RunConfig.model_validate(data | ({"scorers": scorers} if scorers else {}))

    return make


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Copies the tiny model, with its tokenizer changed if so wished, into a folder of the given name."""

    def copy(name: str, change: Callable[[Any], None] | None = None) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_model_dir, folder)
        if change is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            change(tokenizer)
            tokenizer.save_pretrained(folder)
        return str(folder)

    return copy


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of judges in the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_judges", raising=False)
    (tmp_path / "some_judges.py").write_text(
        "async def begins(prompts, completions, completion_ids, **kwargs):\n"
        "    return [float(c.startswith(p[0])) + len(i) for p, c, i in zip(prompts, completions, completion_ids)]\n"
        "def silent(**kwargs):\n"
        "    return [None for _ in kwargs['prompts']]\n"
        "def needs_more(prompts, completions, answers):\n"
        "    return [0.0 for _ in prompts]\n"
    )


def rollout(prompt: str, response: str) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=0, text=prompt, token_ids=(1,), seed=0),
        response_ids=(1, 2),
        rollout_logprobs=(-1.0, -1.0),
        policy_versions=(0, 0),
        finish_reason="stop",
        text=response,
    )


def test_each_policy_is_found_and_the_run_s_tokenizer_makes_the_prompts(
    make_config: MakeConfig, copied: Callable[..., str], tiny_model_dir: Path
) -> None:
    policy, baseline = copied("one"), copied("other")
    prepared, folders, encoded = prepare_pair(make_config(policy=policy, baseline=baseline, max_prompts=1))
    assert folders == {policy: policy, baseline: baseline}
    assert prepared.model_folder == str(tiny_model_dir.resolve())
    assert [text for text, _ in encoded] == ["The train"]
    alone, folders, _ = prepare_pair(make_config(policy=policy))
    assert folders[str(tiny_model_dir)] == alone.model_folder


def test_a_policy_that_is_not_there_is_refused_with_its_key(make_config: MakeConfig, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no" / "where")
    with pytest.raises(ModelError, match=r"^evaluate\.policy = .*where is no folder, no file and no hub id"):
        prepare_pair(make_config(policy=nowhere))
    with pytest.raises(ModelError, match=r"^evaluate\.policy = .* has no config\.json"):
        prepare_pair(make_config(policy=str(tmp_path)))


def test_a_baseline_that_is_not_there_is_refused_with_its_key(
    make_config: MakeConfig, copied: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"^evaluate\.baseline = .* has no config\.json"):
        prepare_pair(make_config(policy=copied("one"), baseline=str(tmp_path)))


def test_a_policy_is_not_compared_with_itself(make_config: MakeConfig, copied: Callable[..., str]) -> None:
    policy = copied("one")
    with pytest.raises(ConfigError, match=r"^evaluate\.policy = .* and evaluate\.baseline = .* are one model"):
        prepare_pair(make_config(policy=policy, baseline=f"{policy}/../one"))


def test_prompts_that_are_not_there_are_refused_with_the_key(make_config: MakeConfig, copied: Any) -> None:
    with pytest.raises(DataError, match=r"^none\.jsonl: .*name a JSONL file in .* or evaluate\.prompts"):
        prepare_pair(make_config(policy=copied("one"), prompts="none.jsonl"))


def test_a_policy_with_another_vocabulary_is_refused(make_config: MakeConfig, copied: Callable[..., str]) -> None:
    policy = copied("one", lambda tokenizer: tokenizer.add_tokens(["<|new|>"]))
    with pytest.raises(ModelError, match=r"^evaluate\.policy = .* has another tokenizer than model\.path; the KL to"):
        prepare_pair(make_config(policy=policy))


def test_a_policy_with_another_chat_template_is_refused(make_config: MakeConfig, copied: Callable[..., str]) -> None:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = "{{ messages[0]['content'] }}"

    baseline = copied("other", change)
    with pytest.raises(ModelError, match=r"^evaluate\.baseline = .* has another chat template than model\.path"):
        prepare_pair(make_config(policy=copied("one"), baseline=baseline))
    as_text = make_config(policy=copied("two"), baseline=baseline)
    prompts = as_text.prompts.model_copy(update={"format": "text"})
    prepare_pair(as_text.model_copy(update={"prompts": prompts}))


def an_evaluation(config: RunConfig, **changes: Any) -> dict[str, Any]:
    row = EvalRow(prompt="p", sample=0, response="", tokens=1, truncated=False, gold=0.0, score=None, kl=0.0)
    names = {"base_path": config.model.path, "trained_path": config.evaluate.policy, "judge": "vader"}
    return asdict(compare([row], [row])) | names | {"prompts_path": config.prompts.eval_path} | changes


def test_a_comparison_is_renewed_and_nothing_else_is_written_over(
    make_config: MakeConfig, copied: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    config = make_config(policy=copied("one"), output=str(output))
    write_json(output, an_evaluation(config))
    prepare_pair(config)
    write_json(output, an_evaluation(config, judge="scorer reward"))
    with pytest.raises(ConfigError, match=r"result\.json holds the comparison of .*one with .*, judged by scorer rew"):
        prepare_pair(config)
    for something in ('{"mine": 1}', "[1]", "mine"):
        output.write_text(something)
        with pytest.raises(ConfigError, match=r"result\.json is there and holds no comparison; name another file"):
            prepare_pair(config)
    output.unlink()
    output.mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written into .*result\.json; name another file"):
        prepare_pair(config)


def test_a_file_in_the_output_s_way_is_refused(
    make_config: MakeConfig, copied: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "a_file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written into"):
        prepare_pair(make_config(policy=copied("one"), output=str(tmp_path / "a_file" / "result.json")))


def test_vader_judges_the_response(make_config: MakeConfig) -> None:
    found = make_judge(make_config())([rollout("p", "What a joy!"), rollout("p", "The worst.")], None)
    assert found[0] > 0 > found[1]


def test_a_function_judges_prompt_and_response_as_often_as_it_is_asked(make_config: MakeConfig, judges: None) -> None:
    judge = make_judge(make_config(judge="some_judges:begins"))
    for _ in range(2):
        assert judge([rollout("Rain", "R"), rollout("Rain", "S")], None) == [3.0, 2.0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("some_judges:nobody", r"^evaluate\.judge = some_judges:nobody cannot be imported \(AttributeError"),
        ("no_such_module:judge", r"^evaluate\.judge = no_such_module:judge cannot be imported \(ModuleNotFound"),
        ("some_judges:needs_more", r"^evaluate\.judge = some_judges:needs_more cannot be called with prompts"),
    ],
)
def test_a_function_that_cannot_judge_is_refused(
    make_config: MakeConfig, judges: None, name: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_judge(make_config(judge=name))


def test_a_judge_that_gives_no_verdict_is_named(make_config: MakeConfig, judges: None) -> None:
    judge = make_judge(make_config(judge="some_judges:silent"))
    with pytest.raises(ScorerError, match=r"^evaluate\.judge: some_judges:silent gave None for prompt 0"):
        judge([rollout("p", "r")], None)


def test_a_scorer_judges_by_what_it_adds_to_the_score(make_config: MakeConfig) -> None:
    function = {"kind": "function", "function": "some:function"}
    harm, help_ = function | {"name": "harm", "weight": -2.0}, function | {"name": "help"}
    both = [Score(value=-3.0, raw=-3.0, reward_version="", parts={"harm": 2.0, "help": 1.0})]
    assert make_judge(make_config([harm, help_], judge="harm"))([rollout("p", "r")], both) == [-4.0]
    assert make_judge(make_config([harm, help_], judge="help"))([rollout("p", "r")], both) == [1.0]
    alone = [Score(value=-4.0, raw=-4.0, reward_version="")]
    assert make_judge(make_config([harm], judge="harm"))([rollout("p", "r")], alone) == [-4.0]

"""Base against trained, pair by pair, with figures that can be checked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config import EvaluateConfig, ModelConfig, PromptsConfig, RunConfig
from rlhf_ray.errors import ModelError
from rlhf_ray.metrics import read_summary
from rlhf_ray.stages.evaluate import (
    EvalRow,
    compare,
    distinct,
    evaluate,
    load_evaluation,
    pairing,
    read_evaluation,
    rows,
)
from rlhf_ray.types import Prompt, Rollout, Score


def row(prompt: str, sample: int, gold: float, **changes: object) -> EvalRow:
    plain = EvalRow(
        prompt=prompt, sample=sample, response="a word", tokens=2, truncated=False, gold=gold, score=0.0, kl=0.0
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def rollout(prompt_id: int, prompt: str, response: str, *, logprobs: Sequence[float] = (-1.0, -2.0)) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, text=prompt, token_ids=(1, 2), seed=prompt_id),
        response_ids=tuple(range(len(logprobs))),
        rollout_logprobs=tuple(logprobs),
        policy_versions=(0,) * len(logprobs),
        finish_reason="length",
        text=response,
    )


def praise(rollouts: Sequence[Rollout], scores: Sequence[Score] | None) -> list[float]:
    return [float(rollout.text == "good") for rollout in rollouts]


def score(value: float) -> Score:
    return Score(value=value, raw=value, reward_version="test")


def test_each_response_is_paired_with_the_one_of_the_same_prompt_and_number() -> None:
    base = [row("p", 0, 0.0), row("p", 1, 0.5), row("q", 0, 0.25), row("q", 1, 1.0)]
    trained = [row("q", 1, 0.0), row("q", 0, 0.25), row("p", 1, 1.0), row("p", 0, 1.0)]
    result = compare(base, trained)
    assert result.win_rate.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert result.tie_share == 0.25
    assert (result.base.gold, result.trained.gold) == pytest.approx((0.4375, 0.5625))
    assert result.gold_gain.value == pytest.approx(0.125)
    assert [(s.prompt, s.base_gold, s.trained_gold) for s in result.samples] == [
        ("p", 0.0, 1.0),
        ("p", 0.5, 1.0),
        ("q", 0.25, 0.25),
        ("q", 1.0, 0.0),
    ]


def test_the_means_of_each_side_are_its_own() -> None:
    base = [row("p", 0, 0.0, tokens=4, truncated=True), row("q", 0, 0.0, tokens=8, response="one two")]
    trained = [row("p", 0, 0.0, score=1.0, kl=4.0), row("q", 0, 0.0, score=2.0, kl=7.0)]
    result = compare(base, trained)
    assert (result.base.tokens, result.base.truncated_share, result.base.distinct_1) == (6.0, 0.5, 1.0)
    assert (result.trained.kl, result.trained.score, result.trained.distinct_1) == (5.5, 1.5, 0.5)
    assert result.score_gain.value == pytest.approx(1.5)
    assert (result.prompts, result.samples_per_prompt) == (2, 1)


def test_a_score_that_rises_while_gold_falls_shows() -> None:
    base = [row(f"p{i}", 0, 0.5, score=0.0) for i in range(20)]
    trained = [row(f"p{i}", 0, 0.1, score=3.0) for i in range(20)]
    result = compare(base, trained)
    assert result.score_gain.low > 0 > result.gold_gain.high
    assert result.win_rate.value == 0.0


def test_the_interval_resamples_prompts_and_not_responses() -> None:
    """Ten equal responses to a prompt know no more than one: copies must not narrow the interval."""
    golds = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]

    def interval(copies: int) -> tuple[float, float]:
        base = [row(f"p{i}", s, 0.5) for i in range(len(golds)) for s in range(copies)]
        trained = [row(f"p{i}", s, gold) for i, gold in enumerate(golds) for s in range(copies)]
        win = compare(base, trained).win_rate
        return win.low, win.high

    assert interval(10) == interval(1)
    assert interval(1) == (0.25, 0.875), "the binomial's 2.5 % and 97.5 % points for 5 of 8"


def test_the_interval_of_a_certain_win_has_no_width() -> None:
    base = [row(f"p{i}", 0, 0.0) for i in range(5)]
    trained = [row(f"p{i}", 0, 1.0) for i in range(5)]
    win = compare(base, trained).win_rate
    assert (win.low, win.value, win.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("trained", [[], [row("q", 0, 0.0)], [row("p", 0, 0.0), row("p", 1, 0.0)]])
def test_sides_that_do_not_answer_the_same_prompts_are_refused(trained: list[EvalRow]) -> None:
    with pytest.raises(ValueError, match="the same prompts, each equally often"):
        compare([row("p", 0, 0.0)], trained)


def test_distinct_counts_different_word_sequences() -> None:
    texts = ["The cat, the dog", "the cat!"]
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)
    assert distinct(["", "one"], 2) == 0.0


def test_rollouts_become_rows_numbered_by_prompt_id_with_the_kl_of_the_response() -> None:
    found = rows(
        [rollout(3, "p", "second"), rollout(1, "q", "other"), rollout(2, "p", "first", logprobs=(-1.0, -2.0, -0.5))],
        gold=[6.0, 5.0, 7.0],
        scores=[score(0.3), score(0.1), score(0.2)],
        reference_logprobs=[np.array([-1.5, -4.0]), np.array([-1.0, -2.0]), np.array([-2.0, -2.0, -0.25])],
    )
    assert [(r.prompt, r.sample, r.response, r.score) for r in found] == [
        ("q", 0, "other", 0.1),
        ("p", 0, "first", 0.2),
        ("p", 1, "second", 0.3),
    ]
    assert [r.kl for r in found] == pytest.approx([0.0, 0.75, 2.5])
    assert [r.gold for r in found] == [5.0, 7.0, 6.0]
    assert [r.tokens for r in found] == [2, 3, 2]
    assert all(r.truncated for r in found)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        name="made-up",
        output_dir=tmp_path,
        model=ModelConfig(path="the/base"),
        prompts=PromptsConfig(path="train.jsonl", eval_path="held_out.jsonl"),
    )


def test_evaluate_asks_both_policies_and_leaves_its_findings(config: RunConfig) -> None:
    policy = config.run_dir / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    asked: list[str] = []

    def sample(models: Sequence[str]) -> list[list[Rollout]]:
        asked.extend(models)
        return [
            [rollout(i, f"prompt {i}", "bad" if model == "the/base" else "good") for i in range(3)] for model in models
        ]

    result = evaluate(
        config,
        sample=sample,
        gold=praise,
        measure=lambda rollouts: (
            [score(2.0 if r.text == "good" else 0.0) for r in rollouts],
            [np.array([-2.0, -4.0]) for _ in rollouts],
        ),
    )
    assert asked == ["the/base", str(policy)]
    assert (result.base.gold, result.trained.gold, result.win_rate.value) == (0.0, 1.0, 1.0)
    assert result.trained.kl == pytest.approx(3.0)
    assert load_evaluation(config.run_dir) == result
    written = json.loads((config.run_dir / "evaluation.json").read_text())
    assert written["samples"][0]["base"] == "bad"
    summary = read_summary(config.run_dir)
    assert (summary["gold_before"], summary["gold_after"], summary["win_rate"]) == (0.0, 1.0, 1.0)
    assert math.isclose(summary["kl_evaluation"], 3.0)


def test_another_pair_goes_into_a_file_of_its_own_and_leaves_the_run_s_figures_alone(config: RunConfig) -> None:
    (config.run_dir / "policy").mkdir(parents=True)
    (config.run_dir / "evaluation.json").write_text("as it was")
    named = EvaluateConfig(policy="runs/second/policy", baseline="org/first", prompts="recipe:asks.jsonl")
    asked: list[str] = []

    def sample(models: Sequence[str]) -> list[list[Rollout]]:
        asked.extend(models)
        return [[rollout(0, "prompt", "good" if model == "org/first" else "bad")] for model in models]

    result = evaluate(
        config.model_copy(update={"evaluate": named}),
        sample=sample,
        gold=praise,
        measure=lambda rollouts: (None, [np.array([-2.0, -4.0]) for _ in rollouts]),
    )
    assert asked == ["org/first", "runs/second/policy"]
    assert (result.base_name, result.trained_name, result.win_rate.value) == ("first", "second", 0.0)
    assert (result.base_path, result.trained_path, result.reference) == ("org/first", "runs/second/policy", "the/base")
    assert (result.prompts_path, result.judge) == ("recipe:asks.jsonl", "vader")
    assert read_evaluation(config.run_dir / "comparisons" / "second-over-first-on-asks.json") == result
    assert (config.run_dir / "evaluation.json").read_text() == "as it was"
    assert read_summary(config.run_dir) == {}


def test_policies_are_called_by_their_runs_or_by_the_last_part_of_their_path(config: RunConfig) -> None:
    def names(**evaluate: Any) -> tuple[str, str]:
        pair = pairing(config.model_copy(update={"evaluate": EvaluateConfig(**evaluate)}))
        return pair.trained.name, pair.base.name

    assert names() == ("made-up", "base")
    assert names(policy="package://models/small.Q4.gguf", baseline="/a/model") == ("small.Q4", "model")
    assert names(policy="a/run/policy", baseline="b/run/policy") == ("a/run/policy", "b/run/policy")


def test_who_judged_and_where_the_result_goes_follow_from_the_configuration(config: RunConfig) -> None:
    def of(**evaluate: Any) -> tuple[str, str]:
        pair = pairing(config.model_copy(update={"evaluate": EvaluateConfig(**evaluate)}))
        return pair.judge, str(pair.output.relative_to(config.run_dir))

    assert of() == ("vader", "evaluation.json")
    assert of(judge="mine:helpful", max_prompts=3) == ("mine:helpful", "evaluation.json")
    assert of(judge="reward", baseline="a b/c d") == ("scorer reward", "comparisons/made-up-over-c-d.json")
    assert of(output=config.run_dir / "x.json") == ("vader", "x.json")


def test_a_file_from_before_names_were_written_down_is_read(config: RunConfig) -> None:
    config.run_dir.mkdir(parents=True)
    written = asdict(compare([row("p", 0, 0.0)], [row("p", 0, 1.0)]))
    for key in ("base_name", "trained_name", "base_path", "trained_path", "reference", "prompts_path", "judge"):
        del written[key]
    (config.run_dir / "evaluation.json").write_text(json.dumps(written))
    found = load_evaluation(config.run_dir)
    assert found is not None
    assert (found.base_name, found.trained_name, found.judge) == ("base", "trained", "vader")


def test_where_nothing_scores_the_judge_decides_alone(config: RunConfig) -> None:
    policy = config.run_dir / "policy"
    policy.mkdir(parents=True)
    (policy / "config.json").write_text("{}")
    result = evaluate(
        config,
        sample=lambda models: [[rollout(0, "prompt", "bad" if m == "the/base" else "good")] for m in models],
        gold=praise,
        measure=lambda rollouts: (None, [np.array([-2.0, -4.0]) for _ in rollouts]),
    )
    assert (result.win_rate.value, result.trained.kl) == (1.0, 3.0)
    assert (result.base.score, result.trained.score, result.score_gain) == (None, None, None)
    assert (result.samples[0].base_score, result.samples[0].trained_score) == (None, None)
    assert load_evaluation(config.run_dir) == result


def test_evaluate_without_a_trained_policy_is_refused_before_sampling(config: RunConfig) -> None:
    def never(models: Sequence[str]) -> list[list[Rollout]]:
        pytest.fail(f"sampled {models}")

    with pytest.raises(ModelError, match=r"no trained policy at .*policy; run rlhf-ray ppo"):
        evaluate(config, sample=never, gold=praise, measure=lambda _: ([], []))


def test_a_run_that_was_not_evaluated_has_no_evaluation(tmp_path: Path) -> None:
    assert load_evaluation(tmp_path) is None

"""Completions become comparisons: the clearest pairs, in shuffled order, split so that no prompt is on both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import RunConfig
from rlhf_ray.data.preference_files import read_preferences
from rlhf_ray.errors import DataError
from rlhf_ray.stages.judge import clearest_pairs, judge, read_completions

MOODS = ["I hate it, it is horrible.", "It is a table.", "It is good.", "It is wonderful, I love it!"]


def a_config(folder: Path, seed: int = 0, **judge_section: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": str(folder),
            "seed": seed,
            "model": {"path": "unused"},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "judge": judge_section,
        }
    )


def write_completions(config: RunConfig, rows: list[Any]) -> Path:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    path = config.run_dir / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def forty_prompts() -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {i}", "prompt_index": i, "completions": MOODS} for i in range(40)]


def test_the_clearest_pair_of_each_prompt_is_compared_and_the_happier_one_wins(tmp_path: Path) -> None:
    config = a_config(tmp_path, holdout=0.25)
    write_completions(config, forty_prompts())
    report = judge(config)
    assert (report.train_pairs, report.holdout_pairs) == (30, 10)
    for preference in read_preferences(report.train_path) + read_preferences(report.holdout_path):
        assert (preference.chosen, preference.rejected) == (MOODS[3], MOODS[0])
        assert preference.meta["gold1" if preference.human_preference else "gold2"] > 0.6


def test_no_prompt_is_on_both_sides_even_if_its_text_comes_twice(tmp_path: Path) -> None:
    config = a_config(tmp_path, holdout=0.5, pairs_per_prompt=3)
    write_completions(config, forty_prompts() + forty_prompts())
    report = judge(config)
    train, holdout = ({p.input_text for p in read_preferences(f)} for f in (report.train_path, report.holdout_path))
    assert (len(train), len(holdout)) == (20, 20)
    assert not train & holdout
    assert report.train_pairs == 20 * 2, "four responses make two pairs that share none"


def test_candidate_order_is_shuffled_by_the_seed_and_repeatable(tmp_path: Path) -> None:
    def answers(name: str, seed: int) -> list[float]:
        config = a_config(tmp_path / name, seed=seed)
        write_completions(config, forty_prompts())
        return [p.human_preference for p in read_preferences(judge(config).train_path)]

    first = answers("a", seed=3)
    assert 8 < sum(first) < 28
    assert answers("b", seed=3) == first
    assert answers("c", seed=4) != first


def test_the_labeller_says_that_it_is_simulated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = a_config(tmp_path)
    write_completions(config, forty_prompts())
    with caplog.at_level("INFO", logger="rlhf_ray"):
        report = judge(config)
    assert "simulated labeller (simulated:vader: a program, standing in for people)" in caplog.text
    assert {json.loads(line)["annotator"] for line in report.train_path.read_text().splitlines()} == {"simulated:vader"}


def test_pairs_are_taken_clearest_first_and_never_below_the_margin_or_at_a_tie() -> None:
    gold = {"a": 0.9, "b": -0.6, "c": 0.1, "d": 0.3, "e": 0.1}

    def margins(count: int, min_margin: float) -> list[float]:
        pairs = clearest_pairs("p", gold, count=count, min_margin=min_margin, rng=random.Random(0))
        return [round(abs(p.meta["gold1"] - p.meta["gold2"]), 6) for p in pairs]

    assert margins(1, 0.0) == [1.5]
    assert margins(9, 0.0) == [1.5, 0.2], "a against b, d against c; e ties with c, and nobody is asked about twice"
    assert margins(9, 0.25) == [1.5]


def test_too_few_clear_pairs_are_refused_with_the_knobs(tmp_path: Path) -> None:
    config = a_config(tmp_path, min_margin=1.99)
    write_completions(config, forty_prompts())
    with pytest.raises(DataError, match=r"0 prompts have a pair clear enough.*lower judge.min_margin"):
        judge(config)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"completions": []}, '"prompt" must be text'),
        ({"prompt": "p", "completions": [1]}, '"completions" must be a list'),
    ],
)
def test_a_bad_line_of_completions_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write_completions(a_config(tmp_path), [*forty_prompts()[:1], row])
    with pytest.raises(DataError, match=f"line 2: {complaint}"):
        read_completions(path)


def test_missing_completions_are_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rlhf-ray collect"):
        judge(a_config(tmp_path))

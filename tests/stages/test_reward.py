"""A reward model is trained on comparisons, tested on prompts it never saw, and saved whole or not at all."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import RunConfig
from rlhf_ray.data.preferences import Preference, write_preferences
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.roles.reward_trainer import TokenPair, fit_reward_model, new_reward_model
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.stages.reward import RewardReport, log_loss, train_reward, wilson_interval

CPU = torch.device("cpu")


def pairs_with_a_rule(n: int, *, seed: int) -> list[Preference]:
    """The preferred candidate ends with "!", the other one with "x"; who comes first is a coin."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        good, bad = ("".join(rng.choices("abcdef", k=rng.randint(2, 10))) + end for end in "!x")
        first = rng.random() < 0.5
        pairs.append(
            Preference(
                input_text=f"prompt {seed} {i}",
                candidate1=good if first else bad,
                candidate2=bad if first else good,
                human_preference=float(first),
                annotator="simulated:rule",
            )
        )
    return pairs


def a_run(output_dir: Path, model: Path, **reward: Any) -> RunConfig:
    """A run whose comparisons are on disk."""
    config = RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"path": str(model)},
            "prompts": {"path": "unused", "eval_path": "unused", "format": "text"},
            "reward": {"epochs": 4, "lr": 2e-3, "batch_size": 8, "precision": "float32"} | reward,
        }
    )
    write_preferences(config.run_dir / "preferences.jsonl", pairs_with_a_rule(40, seed=1))
    write_preferences(config.run_dir / "preferences.holdout.jsonl", pairs_with_a_rule(30, seed=2))
    return config


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> tuple[RunConfig, RewardReport, list[Any]]:
    config = a_run(tmp_path_factory.mktemp("runs"), tiny_model_dir)
    progress: list[Any] = []
    return config, train_reward(config, progress.append), progress


def test_an_obvious_rule_is_learnt_and_generalises(trained: Any) -> None:
    _, report, _ = trained
    assert report.accuracy >= 0.9
    assert report.accuracy_low < report.accuracy <= report.accuracy_high
    assert report.log_loss < 0.5 < math.log(2)
    assert (report.pairs, report.train_pairs, report.annotators) == (30, 40, ("simulated:rule",))


def test_the_report_is_written_beside_the_model_and_nothing_else_is_left(trained: Any) -> None:
    config, report, _ = trained
    written = json.loads((config.run_dir / "reward" / "reward_report.json").read_text())
    assert written["accuracy"] == report.accuracy
    assert report.version == RewardScorer(config.run_dir / "reward").version
    assert report.version.startswith("reward@")
    left = {path.name for path in config.run_dir.iterdir()}
    inputs = {"preferences.jsonl", "preferences.holdout.jsonl"}
    assert left == {*inputs, "config.resolved.yaml", "reward", "summary.json"}


def test_normalised_scores_of_the_compared_candidates_have_mean_0_and_deviation_1(trained: Any) -> None:
    config, _, _ = trained
    scorer = RewardScorer(config.run_dir / "reward", precision="float32")
    pairs = pairs_with_a_rule(40, seed=1)
    texts = [(p.input_text, text) for p in pairs for text in (p.candidate1, p.candidate2)]
    values = torch.tensor([s.value for s in scorer.score_texts(*zip(*texts, strict=True))])
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_progress_is_told_as_numbers_that_end_at_the_last_step(trained: Any) -> None:
    _, _, progress = trained
    assert [row["step"] for row in progress] == list(range(1, 21))
    assert progress[0]["loss"] == pytest.approx(math.log(2))
    assert progress[-1]["loss"] < progress[0]["loss"]
    assert progress[-1]["eta_seconds"] == 0
    assert {row["steps"] for row in progress} == {20}
    assert all(row["pairs_per_second"] > 0 for row in progress)


def test_what_was_trained_in_memory_scores_the_same_once_saved_and_loaded(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, epochs=6)
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer)
    pairs = [TokenPair(chosen_ids=[7, 8, 33, 2], rejected_ids=[7, 9, 2])] * 8
    (tmp_path / "scratch").mkdir()
    fit_reward_model(
        model, tokenizer, pairs, config.reward, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
    )
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    sequences = [[7, 8, 33, tokenizer.eos_token_id], [5] * 40 + [tokenizer.eos_token_id], [tokenizer.eos_token_id]]
    with torch.inference_mode():
        one_by_one = [model.eval()(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    assert len({round(raw, 3) for raw in one_by_one}) == 3
    scored = RewardScorer(tmp_path / "reward", precision="float32").score_ids(sequences)
    assert [score.raw for score in scored] == pytest.approx(one_by_one, abs=1e-5)


def test_the_trainer_sees_exactly_the_token_ids_it_is_given(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second EOS, nothing cut, nothing tokenised again."""
    config = a_run(tmp_path, tiny_model_dir, epochs=1, batch_size=2)
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    eos = tokenizer.eos_token_id
    model = new_reward_model(tiny_model_dir, tokenizer)
    seen: list[list[int]] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        assert (input_ids[attention_mask == 0] == tokenizer.pad_token_id).all()
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    given = [[9, eos], [9, 9, eos, 10, eos], [11] * 30 + [eos], [12, 13, eos]]
    pairs = [
        TokenPair(chosen_ids=given[0], rejected_ids=given[1]),
        TokenPair(chosen_ids=given[2], rejected_ids=given[3]),
    ]
    (tmp_path / "scratch").mkdir()
    fit_reward_model(
        model, tokenizer, pairs, config.reward, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
    )
    assert sorted(seen) == sorted(given)


def test_a_new_reward_model_scores_zero_and_pads_with_anything_but_eos(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer)
    assert not model.score.weight.any()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_frozen_layers_stay_as_they_were_and_get_no_backward_pass(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, epochs=2, batch_size=4)
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer, freeze_layers=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    reached: list[tuple[bool, bool]] = []
    model.model.layers[1].register_forward_hook(
        lambda module, inputs, output: reached.append((inputs[0].requires_grad, output.requires_grad))
    )
    pairs = [TokenPair(chosen_ids=[7, 8, 33, 2], rejected_ids=[7, 9, 2])] * 8
    (tmp_path / "scratch").mkdir()
    fit_reward_model(
        model, tokenizer, pairs, config.reward, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
    )
    assert set(reached) == {(False, True)}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("model.layers.")} == {"1"}
    assert "model.embed_tokens.weight" not in changed
    assert {"score.weight", "model.norm.weight"} <= changed


def test_more_frozen_layers_than_there_are_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir, freeze_layers=3)
    with pytest.raises(ConfigError, match=r"reward.freeze_layers = 3 and the model has 2 layers"):
        train_reward(config)
    left = {path.name for path in config.run_dir.iterdir()}
    assert left == {"preferences.jsonl", "preferences.holdout.jsonl", "config.resolved.yaml"}


def test_the_saved_folder_is_a_plain_sequence_classifier(trained: Any) -> None:
    config, _, _ = trained
    model, tokenizer, _ = load_reward_model(config.run_dir / "reward")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = a_run(tmp_path, tmp_path / "no such model")
    (config.run_dir / "reward").mkdir()
    with pytest.raises(ConfigError, match="already holds a reward model; remove it"):
        train_reward(config)


def test_a_missing_file_of_comparisons_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = a_run(tmp_path, tiny_model_dir)
    (config.run_dir / "preferences.holdout.jsonl").unlink()
    with pytest.raises(DataError, match=r"preferences.holdout.jsonl does not exist; run `rlhf-ray judge`"):
        train_reward(config)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"human_preference": 0.5}, "pair 41: human_preference is 0.5; training takes decided comparisons"),
        ({"candidate1": "a" * 600}, r"pair 41: prompt and candidate are 60\d tokens; raise reward.max_length \(300\)"),
    ],
)
def test_a_pair_that_cannot_be_trained_on_is_named(
    tmp_path: Path, tiny_model_dir: Path, change: dict[str, Any], complaint: str
) -> None:
    config = a_run(tmp_path, tiny_model_dir, max_length=300)
    bad = {"input_text": "p", "candidate1": "a", "candidate2": "b", "human_preference": 1.0} | change
    write_preferences(config.run_dir / "preferences.jsonl", [*pairs_with_a_rule(40, seed=1), Preference(**bad)])
    with pytest.raises(DataError, match=complaint):
        train_reward(config)


def test_wilson_intervals_match_published_values() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_log_loss_of_a_margin_is_exact_and_does_not_overflow() -> None:
    assert log_loss(0.0) == pytest.approx(math.log(2))
    assert log_loss(2.0) == pytest.approx(0.126928, abs=1e-6)
    assert log_loss(-2.0) == pytest.approx(2.126928, abs=1e-6)
    assert log_loss(-1000.0) == 1000.0
    assert log_loss(1000.0) == 0.0

"""A reward model is fitted to pairs of token ids: the same whether it was interrupted or not, whole or by LoRA."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from rlhf_ray.config import RewardConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.roles.reward_trainer import Fitted, fit_reward_model, new_reward_model
from rlhf_ray.roles.scorer import RewardScorer

CPU = torch.device("cpu")
EOS = 0


def a_section(**reward: Any) -> RewardConfig:
    return RewardConfig.model_validate({"epochs": 4, "lr": 2e-3, "batch_size": 8, "precision": "float32"} | reward)


def pairs_with_a_rule(n: int, *, seed: int, good: int = 33, bad: int = 34) -> list[TokenPair]:
    """Of all lengths; the preferred one ends with another token than the other."""
    rng = random.Random(seed)
    return [
        TokenPair(
            chosen_ids=[*rng.choices(range(40, 300), k=rng.randint(1, 12)), good, EOS],
            rejected_ids=[*rng.choices(range(40, 300), k=rng.randint(1, 12)), bad, EOS],
        )
        for _ in range(n)
    ]


class Stop(Exception):
    """What ends a training half way."""


def fitted(
    folder: Path,
    base: Path,
    section: RewardConfig,
    pairs: Sequence[TokenPair],
    *,
    validation: Sequence[TokenPair] = (),
    stop_after: int | None = None,
) -> tuple[Any, Fitted, list[Mapping[str, float]]]:
    """(model, what came of it, progress); resumes from what is in ``folder``, and may be stopped there."""
    tokenizer = load_tokenizer(base, need_chat_template=False)
    model = new_reward_model(base, tokenizer, freeze_layers=section.freeze_layers)
    progress: list[Mapping[str, float]] = []

    def on_progress(seen: Mapping[str, float]) -> None:
        progress.append(seen)
        if seen["step"] == stop_after:
            raise Stop

    came = fit_reward_model(
        model,
        tokenizer,
        pairs,
        section,
        seed=0,
        device=CPU,
        dtype=torch.float32,
        scratch=folder / f"scratch-{stop_after}",
        validation=validation,
        checkpoints=folder / "checkpoints",
        identity={"seed": 0},
        on_progress=on_progress,
    )
    return model, came, progress


def loss(model: Any, pairs: Sequence[TokenPair]) -> float:
    with torch.inference_mode():
        margins = [
            (
                model(input_ids=torch.tensor([p.chosen_ids])).logits
                - model(input_ids=torch.tensor([p.rejected_ids])).logits
            )
            for p in pairs
        ]
    return torch.nn.functional.softplus(-torch.stack(margins)).mean().item()


def test_what_was_trained_in_memory_scores_the_same_once_saved_and_loaded(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(epochs=6)
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer)
    pairs = [TokenPair(chosen_ids=[7, 8, 33, 2], rejected_ids=[7, 9, 2])] * 8
    (tmp_path / "scratch").mkdir()
    fit_reward_model(
        model, tokenizer, pairs, section, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
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
    section = a_section(epochs=1, batch_size=2)
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
        model, tokenizer, pairs, section, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
    )
    assert sorted(seen) == sorted(given)


@pytest.mark.parametrize(("seconds", "noticed"), [(1, range(2, 11, 2)), (31, range(1, 11))])
def test_progress_comes_every_so_many_steps_and_after_half_a_minute_without_any(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, noticed: range
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("rlhf_ray.roles.trl_training.time", clock)
    monkeypatch.setattr("rlhf_ray.roles.trl_training._PROGRESS_NOTICES", 5)
    forward = LlamaForSequenceClassification.forward

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += seconds
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", slow)
    section = a_section(epochs=2, batch_size=2, save_steps=0)
    _, came, progress = fitted(tmp_path, tiny_model_dir, section, pairs_with_a_rule(10, seed=0))
    assert [seen["step"] for seen in progress] == list(noticed)
    assert [seen["eta_seconds"] for seen in progress] == [(10 - step) * seconds for step in noticed]
    assert came.loss == pytest.approx(sum(seen["loss"] for seen in progress) / len(progress), abs=1e-3)


def test_a_new_reward_model_scores_zero_and_pads_with_anything_but_eos(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer)
    assert not model.score.weight.any()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_frozen_layers_stay_as_they_were_and_get_no_backward_pass(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(epochs=2, batch_size=4)
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
        model, tokenizer, pairs, section, seed=0, device=CPU, dtype=torch.float32, scratch=tmp_path / "scratch"
    )
    assert set(reached) == {(False, True)}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("model.layers.")} == {"1"}
    assert "model.embed_tokens.weight" not in changed
    assert {"score.weight", "model.norm.weight"} <= changed


def test_ties_and_weights_reach_the_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two opposite answers to one pair: the heavier one wins; a tie moves nothing that stands at zero."""
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    section = a_section(epochs=20, lr=1e-3, batch_size=2)
    first, second = [5, 6, 7, tokenizer.eos_token_id], [8, 9, tokenizer.eos_token_id]

    def margin(*pairs: TokenPair) -> float:
        model = new_reward_model(tiny_model_dir, tokenizer)
        fit_reward_model(
            model,
            tokenizer,
            pairs,
            section,
            seed=0,
            device=CPU,
            dtype=torch.float32,
            scratch=tmp_path,
        )
        with torch.inference_mode():
            scores = [model(input_ids=torch.tensor([ids])).logits.item() for ids in (first, second)]
        return scores[0] - scores[1]

    light = TokenPair(chosen_ids=first, rejected_ids=second, weight=1.0)
    heavy = TokenPair(chosen_ids=second, rejected_ids=first, weight=3.0)
    assert margin(light, heavy) < -0.3
    assert margin(light, replace(heavy, weight=1 / 3)) > 0.3
    tie = TokenPair(chosen_ids=first, rejected_ids=second, probability=0.5)
    assert abs(margin(tie, tie)) < 1e-6


# ---- Going on


@pytest.mark.parametrize(
    ("save_steps", "stop_after", "options"),
    [
        pytest.param(5, 12, {}, id="in the middle of the second epoch"),
        pytest.param(6, 7, {}, id="between two epochs"),
        pytest.param(5, 12, {"lora_rank": 4}, id="LoRA"),
        pytest.param(5, 12, {"early_stop_patience": 100, "eval_steps": 2}, id="with the best weights so far"),
    ],
)
def test_a_training_that_was_killed_and_resumed_ends_where_an_undisturbed_one_does(
    tmp_path: Path, tiny_model_dir: Path, save_steps: int, stop_after: int, options: dict[str, Any]
) -> None:
    section = a_section(epochs=3, batch_size=4, save_steps=save_steps, **options)
    pairs = pairs_with_a_rule(24, seed=1)
    validation = pairs_with_a_rule(7, seed=2, good=34, bad=33) if section.early_stop_patience else ()
    undisturbed, expected, _ = fitted(tmp_path / "a", tiny_model_dir, section, pairs, validation=validation)

    with pytest.raises(Stop):
        fitted(tmp_path / "b", tiny_model_dir, section, pairs, validation=validation, stop_after=stop_after)
    kept = stop_after - stop_after % save_steps
    assert [folder.name for folder in (tmp_path / "b" / "checkpoints").iterdir()] == [f"step-{kept:06d}"]
    resumed, came, progress = fitted(tmp_path / "b", tiny_model_dir, section, pairs, validation=validation)

    assert progress[0]["step"] == kept + 1
    assert came.steps == expected.steps == 18
    assert came.loss == pytest.approx(expected.loss, abs=1e-6)
    assert came.validation_loss == pytest.approx(expected.validation_loss, abs=1e-6)
    for (name, value), (_, other) in zip(undisturbed.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-6, rtol=0, msg=name)


def test_a_checkpoint_holds_no_pickle_that_only_a_pickle_could_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(epochs=1, save_steps=2)
    fitted(tmp_path, tiny_model_dir, section, pairs_with_a_rule(32, seed=1))
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-000002"
    for path in folder.iterdir():
        assert path.suffix in (".safetensors", ".json", ".jinja", ".pt", ".pth", "") or path.name == "README.md", path
        if path.suffix in (".pt", ".pth"):
            with torch.serialization.safe_globals([*_numpy_state()]):
                torch.load(path, weights_only=True)


def _numpy_state() -> list[Any]:
    """What numpy's random state is made of; the trainer allows the same when it reads it."""
    import numpy as np

    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]


# ---- Ending early


def test_training_ends_when_the_validation_loss_rises_and_the_best_weights_are_kept(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    section = a_section(epochs=10, early_stop_patience=2, eval_steps=3, lr=5e-3, save_steps=0)
    opposite = pairs_with_a_rule(11, seed=2, good=34, bad=33)
    model, came, _ = fitted(tmp_path, tiny_model_dir, section, pairs_with_a_rule(32, seed=1), validation=opposite)
    assert came.steps == 3 + 2 * 3
    assert came.validation_loss == pytest.approx(loss(model, opposite), abs=1e-5)


# ---- LoRA


def test_lora_changes_each_linear_layer_by_a_matrix_of_its_rank_and_nothing_else_but_the_head(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    section = a_section(epochs=6, lr=1e-2, lora_rank=3, lora_alpha=6, save_steps=0)
    before = new_reward_model(tiny_model_dir, load_tokenizer(tiny_model_dir, need_chat_template=False)).state_dict()
    pairs = pairs_with_a_rule(32, seed=1)
    model, _, progress = fitted(tmp_path, tiny_model_dir, section, pairs)
    after = model.state_dict()
    assert progress[-1]["loss"] < 0.3
    assert after.keys() == before.keys()
    for name, value in after.items():
        change = value - before[name]
        if name.endswith("proj.weight"):
            assert torch.linalg.matrix_rank(change, atol=1e-4, rtol=0) == 3, name
        elif name == "score.weight":
            assert change.any()
        else:
            assert not change.any(), name

    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(tiny_model_dir, need_chat_template=False).save_pretrained(tmp_path / "reward")
    assert [path.name for path in (tmp_path / "reward").glob("*.safetensors")] == ["model.safetensors"]
    loaded, _, _ = load_reward_model(tmp_path / "reward")
    assert loss(loaded, pairs) == pytest.approx(loss(model, pairs), abs=1e-6)


def test_lora_leaves_frozen_layers_alone(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(epochs=1, lora_rank=2, freeze_layers=1, save_steps=0)
    before = new_reward_model(tiny_model_dir, load_tokenizer(tiny_model_dir, need_chat_template=False)).state_dict()
    model, _, _ = fitted(tmp_path, tiny_model_dir, section, pairs_with_a_rule(32, seed=1))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("model.layers.")} == {"1"}

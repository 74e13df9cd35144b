"""A reward model is what its folder holds, never more, and reads one form of input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.models.loading import quiet
from rlhf_ray.models.reward import ScoreNormalisation, load_reward_model, model_version, reward_input

EOS = 2


def classifier(base: Path, folder: Path, *, labels: int = 1, dropout: float = 0.0) -> Path:
    with quiet():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, attention_dropout=dropout
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture
def reward_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return classifier(tiny_model_dir, tmp_path / "reward")


def test_the_saved_head_is_the_loaded_head_and_nothing_wants_a_gradient(reward_dir: Path) -> None:
    model, tokenizer, normalisation = load_reward_model(reward_dir)
    saved = load_file(reward_dir / "model.safetensors")["score.weight"]
    assert torch.equal(model.score.weight, saved)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert normalisation == ScoreNormalisation(mean=0.0, std=1.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_dropout_in_the_folder_changes_no_score(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, _, _ = load_reward_model(classifier(tiny_model_dir, tmp_path / "dropping", dropout=0.5))
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_checkpoint_without_its_head_is_refused_and_not_filled_with_random_numbers(reward_dir: Path) -> None:
    tensors = load_file(reward_dir / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, reward_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack score\.weight"):
        load_reward_model(reward_dir)


def test_a_language_model_is_no_reward_model(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="2 labels"):
        load_reward_model(tiny_model_dir)


def test_a_classifier_of_three_labels_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"3 labels .* serve\.model"):
        load_reward_model(classifier(tiny_model_dir, tmp_path / "three", labels=3))


def test_a_missing_folder_and_pickled_weights_are_refused(reward_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no reward model"):
        load_reward_model(tmp_path / "none")
    torch.save(load_file(reward_dir / "model.safetensors"), reward_dir / "pytorch_model.bin")
    (reward_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no reward model"):
        load_reward_model(reward_dir)


def test_the_normalisation_survives_its_file(reward_dir: Path) -> None:
    ScoreNormalisation(mean=-0.25, std=1.75).save(reward_dir)
    assert json.loads((reward_dir / "score_normalisation.json").read_text()) == {"mean": -0.25, "std": 1.75}
    assert load_reward_model(reward_dir)[2] == ScoreNormalisation(mean=-0.25, std=1.75)


@pytest.mark.parametrize("text", ["[]", "{", '{"mean": 0}', '{"mean": 0, "std": 0}', '{"mean": NaN, "std": 1}'])
def test_a_normalisation_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "score_normalisation.json").write_text(text)
    with pytest.raises(ModelError, match=r"score_normalisation\.json must hold"):
        ScoreNormalisation.load(tmp_path)


def test_the_version_names_the_content(reward_dir: Path, tmp_path: Path) -> None:
    version = model_version(reward_dir)
    name, _, digest = version.partition("@")
    assert name == "reward"
    assert len(digest) == 12
    copy = tmp_path / "elsewhere" / "reward"
    shutil.copytree(reward_dir, copy)
    (copy / "notes.txt").write_text("no weights")
    assert model_version(copy) == version
    tensors = load_file(copy / "model.safetensors")
    tensors["score.weight"] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert model_version(copy) != version
    with pytest.raises(ModelError, match="no safetensors"):
        model_version(tmp_path)


def test_a_finished_and_a_cut_response_both_end_in_one_eos() -> None:
    assert reward_input([7, EOS, 8], [9, 10], eos_id=EOS) == [7, EOS, 8, 9, 10, EOS]
    assert reward_input([7, EOS, 8], [9, 10, EOS], eos_id=EOS) == [7, EOS, 8, 9, 10, EOS]
    assert reward_input([7], [], eos_id=EOS) == [7, EOS]


@given(st.lists(st.integers(0, 5), max_size=6), st.lists(st.integers(0, 5), max_size=6))
def test_what_is_read_begins_with_the_prompt_and_ends_with_exactly_one_eos(
    prompt: list[int], response: list[int]
) -> None:
    ids = reward_input(prompt, response, eos_id=EOS)
    assert ids[: len(prompt)] == prompt
    assert ids[-1] == EOS
    read = ids[len(prompt) : -1]
    assert read == response[: len(read)]
    assert set(response[len(read) :]) <= {EOS}
    assert not read or read[-1] != EOS


def test_an_input_that_is_too_long_is_refused_and_not_cut() -> None:
    assert len(reward_input([7, 8], [9], eos_id=EOS, max_length=4)) == 4
    with pytest.raises(DataError, match=r"5 tokens with EOS .* at most 4"):
        reward_input([7, 8], [9, 10], eos_id=EOS, max_length=4)

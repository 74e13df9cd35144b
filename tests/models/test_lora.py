"""LoRA starts as nothing, trains alone, and merges into the very model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.models.lora import add_lora, merged_state, without_lora

IDS = torch.arange(5, 25).unsqueeze(0)


@pytest.fixture
def plain(tiny_model_dir: Path) -> Any:
    return load_policy_model(tiny_model_dir)


def with_lora(folder: Path, **options: Any) -> Any:
    model = load_policy_model(folder)
    add_lora(model, **{"rank": 4, "alpha": 8.0, "targets": None, "seed": 0, **options})
    return model


def test_it_starts_as_the_model_that_it_is_added_to(plain: Any, tiny_model_dir: Path) -> None:
    model = with_lora(tiny_model_dir)
    assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-6)
    state = merged_state(model)
    assert set(state) == set(plain.state_dict())
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_the_merged_state_is_the_trained_model(plain: Any, tiny_model_dir: Path) -> None:
    model = with_lora(tiny_model_dir)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name
                torch.nn.init.normal_(parameter, std=0.2)
    trained = model(input_ids=IDS).logits
    assert not torch.allclose(trained, plain(input_ids=IDS).logits, atol=1e-2)
    plain.load_state_dict(merged_state(model))
    assert torch.allclose(plain(input_ids=IDS).logits, trained, atol=1e-4)


def test_the_model_it_was_added_to_can_be_read_without_it(plain: Any, tiny_model_dir: Path) -> None:
    model = with_lora(tiny_model_dir)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.2)
    trained = model(input_ids=IDS).logits
    with without_lora(model):
        assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-6)
    assert torch.equal(model(input_ids=IDS).logits, trained)
    assert not torch.allclose(trained, plain(input_ids=IDS).logits, atol=1e-2)


def test_the_layers_can_be_chosen_and_the_head_is_left_out(tiny_model_dir: Path) -> None:
    chosen = {name for name, p in with_lora(tiny_model_dir, targets=["q_proj"]).named_parameters() if p.requires_grad}
    assert chosen
    assert all(".q_proj." in name for name in chosen)
    every = {name for name, p in with_lora(tiny_model_dir).named_parameters() if p.requires_grad}
    assert any(".down_proj." in name for name in every)
    assert not any("lm_head" in name for name in every)


def test_a_layer_that_there_is_none_of_is_refused_with_those_that_there_are(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_targets names query, and LlamaForCausalLM has no such .* q_proj"):
        with_lora(tiny_model_dir, targets=["q_proj", "query"])

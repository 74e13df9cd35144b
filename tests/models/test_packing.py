"""Sequences packed into one row score as each does alone; a model that cannot be read so is left to padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from rlhf_ray.models.packing import pack_classifier, packed_logits, padded_logits

SEQUENCES = [[*range(5, 5 + length)] for length in (60, 1, 17, 3, 90, 2)]
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 2,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(num_key_value_heads=2, **SIZES)


def a_model(make: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = make._from_config(config, attn_implementation="sdpa").eval()
    torch.nn.init.normal_(getattr(model, "score", getattr(model, "classifier", None)).weight)
    return model


@torch.inference_mode()
def alone(model: Any) -> list[list[float]]:
    return [model(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in SEQUENCES]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (LlamaForSequenceClassification, LLAMA),
        (Qwen2ForSequenceClassification, Qwen2Config(num_key_value_heads=4, **SIZES)),
    ],
)
def test_each_packed_sequence_scores_as_it_does_alone(make: Any, config: Any) -> None:
    model = a_model(make, config)
    expected = alone(model)
    assert pack_classifier(model)
    assert packed_logits(model, SEQUENCES).tolist() == [pytest.approx(row, abs=1e-5) for row in expected]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (BertForSequenceClassification, BertConfig(**SIZES)),
        (MistralForSequenceClassification, MistralConfig(num_key_value_heads=2, sliding_window=8, **SIZES)),
    ],
    ids=["an encoder", "a window"],
)
def test_what_cannot_be_packed_is_padded(make: Any, config: Any) -> None:
    model = a_model(make, config)
    assert not pack_classifier(model)
    assert padded_logits(model, SEQUENCES).tolist() == [pytest.approx(row, abs=1e-5) for row in alone(model)]


def test_a_model_that_scores_otherwise_when_it_is_packed_is_found_out_and_left_as_it_was() -> None:
    model = a_model(LlamaForSequenceClassification, LLAMA)
    expected = alone(model)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # sees what comes after, where no mask forbids it
    assert not pack_classifier(model)
    assert padded_logits(model, SEQUENCES).tolist() == [pytest.approx(row, abs=1e-5) for row in expected]

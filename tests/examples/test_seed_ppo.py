"""The example runs from a command line, and so does an old script in which the import alone was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf_ray.data.scored_responses import read_scored_responses
from rlhf_ray.examples.seed_ppo import main

# As a script for TRL 0.11 stood; SMALL stands for its hyperparameters and the model's name.
OLD_SCRIPT = """
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead, create_reference_model
from trl.core import LengthSampler

config = PPOConfig(**SMALL)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token


def tokenize(sample):
    sample["input_ids"] = tokenizer.encode(sample["review"])[:4]
    sample["query"] = tokenizer.decode(sample["input_ids"])
    return sample


def collator(data):
    return dict((key, [d[key] for d in data]) for key in data[0])


dataset = {"train": Dataset.from_dict({"review": [f"The train number {n} was late." for n in range(9)]}).map(tokenize)}
dataset["train"].set_format(type="torch")
ppo_trainer = PPOTrainer(
    config=config,
    model=model,
    ref_model=ref_model,
    tokenizer=tokenizer,
    dataset=dataset["train"],
    data_collator=collator,
)
device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    device = 0 if torch.cuda.is_available() else "cpu"

generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
}
output_length_sampler = LengthSampler(4, 8)

for epoch, batch in enumerate(ppo_trainer.dataloader):
    query_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, length_sampler=output_length_sampler, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors)
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    rewards = [torch.tensor(len(text) / 10) for text in texts]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)

model.save_pretrained(OUTPUT)
tokenizer.save_pretrained(OUTPUT)
"""
OLD_IMPORT = """
from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead, create_reference_model
from trl.core import LengthSampler
"""
NEW_IMPORT = """
from rlhf_ray import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead, create_reference_model, LengthSampler
"""


def test_an_old_script_runs_with_the_import_alone_changed(tiny_model_dir: Path, tmp_path: Path) -> None:
    small = {
        "model_name": str(tiny_model_dir),
        "learning_rate": 1.41e-5,
        "ppo_epochs": 2,
        "mini_batch_size": 2,
        "batch_size": 4,
    }
    assert OLD_IMPORT in OLD_SCRIPT
    names: dict[str, Any] = {"SMALL": small, "OUTPUT": tmp_path / "policy"}
    exec(compile(OLD_SCRIPT.replace(OLD_IMPORT, NEW_IMPORT), "old_script.py", "exec"), names)
    assert names["epoch"] == 1  # nine rows are two batches of four
    assert names["stats"]["objective/kl"] != 0
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    moved = max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())
    assert 0 < moved < 1e-3


def test_the_example_trains_and_leaves_its_policy_and_what_it_wrote(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--steps", "2", "--batch-size", "4"]
    history = main(["--model", str(tiny_model_dir), "--output", str(tmp_path), *sizes])
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert history[1]["objective/kl"] != 0
    rows = read_scored_responses(tmp_path / "responses.jsonl")
    assert len(rows) == 8
    assert sum(row.rewards for row in rows[:4]) / 4 == pytest.approx(history[0]["ppo/mean_scores"], abs=1e-6)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    assert any(not bool((trained[name] == tensor).all()) for name, tensor in start.items())
    printed = capsys.readouterr().out
    assert "step 2: reward" in printed
    assert str(tmp_path / "policy") in printed


def test_prompts_of_ones_own_are_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The old bridge"}\n' * 2)
    arguments = ["--prompts", str(tmp_path / "prompts.jsonl"), "--steps", "1", "--batch-size", "2"]
    main([*arguments, "--model", str(tiny_model_dir), "--output", str(tmp_path)])
    assert {row.prompt for row in read_scored_responses(tmp_path / "responses.jsonl")} == {"The old bridge"}

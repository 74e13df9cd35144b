"""Samples per second of the whole PPO loop, and the time of a weight update, on this machine; beside TRL's if asked.

    python tests/bench/ppo_throughput.py [--steps 8] [--set key=value ...]
    python tests/bench/ppo_throughput.py --trl [--tokens 32] [--epochs 1] [--steps 4]

The demo's recipe with 32 samples x 24 tokens a step, one optimiser step per batch: generator (vLLM), served reward
model, reference and learner with a critic all in the loop, as in a run. The reward model is the base with a fresh head:
its arithmetic is that of a trained one. The first two steps fill the pipeline and are left out; so is start-up.

With ``--trl``, TRL 1.9.2 (the last line of TRL with PPO) and ours run one after the other on the same prompts, with
responses of the same length, the same reference and reward model: ours first with a critic of its own as TRL has it,
then with our default, a head on the policy. TRL gets an environment of its own, made on first use: this one's packages
under TRL 1.9.2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.data.prompts import read_prompts
from rlhf_ray.metrics import read_lines
from rlhf_ray.models.loading import resolve_precision
from rlhf_ray.models.reward import ScoreNormalisation
from rlhf_ray.report.quiet import quiet_libraries
from rlhf_ray.roles.reward_trainer import new_reward_model
from rlhf_ray.roles.scorer import RewardSettings
from rlhf_ray.stages.ppo import run_ppo
from rlhf_ray.stages.prepare import prepare

WARM_UP_STEPS = 2
BATCH = 32
TRL = "trl==1.9.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps counted, after two that are not")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--trl", action="store_true", help="run TRL 1.9.2 beside ours")
    parser.add_argument("--tokens", type=int, default=32, help="with --trl: of each response")
    parser.add_argument("--epochs", type=int, default=1, help="with --trl: passes over each batch")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.trl:
            print(json.dumps(_ours(folder, arguments.steps, arguments.overrides), indent=2))
            return
        work = [f"sampling.max_new_tokens={arguments.tokens}", f"ppo.epochs={arguments.epochs}", *arguments.overrides]
        seconds = _trl_step_seconds(folder, arguments)
        figures: dict[str, Any] = {
            "tokens": arguments.tokens,
            "epochs": arguments.epochs,
            "trl": {"samples_per_second_median": BATCH / statistics.median(seconds["seconds_step"])},
        }
        figures["trl"]["rss_gb_max"] = max(seconds["rss_gb"])
        for critic in ("model", "head"):
            ours = _ours(folder, arguments.steps, [*work, f"learner.critic={critic}"])
            ours["against_trl"] = ours["samples_per_second_median"] / figures["trl"]["samples_per_second_median"]
            figures[f"ours, critic = {critic}"] = ours
    print(json.dumps(figures, indent=2))


def _ours(folder: Path, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    name = f"bench-{len(list(folder.iterdir()))}"
    config = _config(folder, name, steps, overrides)
    _fresh_reward_model(config, folder / "reward")
    summary = run_ppo(config, on_step=lambda row: print(_line(row), file=sys.stderr, flush=True))
    rows = read_lines(config.run_dir / "metrics.jsonl")[WARM_UP_STEPS:]
    return {
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


def _config(folder: Path, name: str, steps: int, overrides: Sequence[str]) -> RunConfig:
    return load_config(
        "recipe:demo",
        [
            f"output_dir={folder}",
            f"name={name}",
            "serve.port=0",
            f"serve.model={folder}/reward",
            f"ppo.batch_size={BATCH}",
            f"ppo.steps={steps + WARM_UP_STEPS}",
            *overrides,
        ],
    )


def _trl_step_seconds(folder: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Of each counted step of TRL: its seconds, and the memory of its one process."""
    config = _config(folder, "trl", arguments.steps, arguments.overrides)
    _fresh_reward_model(config, folder / "reward")
    rows = folder / "trl.jsonl"
    job = {
        "model": prepare(config).model_folder,
        "reward": str(folder / "reward"),
        "prompts": read_prompts(config.prompts.path),
        "batch_size": BATCH,
        "tokens": arguments.tokens,
        "epochs": arguments.epochs,
        "steps": arguments.steps + 1,
        "threads": len(os.sched_getaffinity(0)),
        "bf16": resolve_precision("auto", torch.device("cpu")) == torch.bfloat16,
        "rows": str(rows),
        "scratch": str(folder / "trl"),
    }
    (folder / "trl.json").write_text(json.dumps(job))
    with (folder / "trl.log").open("w") as log:
        command = [_trl_python(), str(Path(__file__).with_name("trl_ppo.py")), str(folder / "trl.json")]
        if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"TRL failed:\n{(folder / 'trl.log').read_text()[-3000:]}")
    counted = read_lines(rows)[1:]
    return {key: [row[key] for row in counted] for key in ("seconds_step", "rss_gb")}


def _trl_python() -> str:
    """Python of an environment with this one's packages and, before them, TRL 1.9.2."""
    home = Path("~/.cache/rlhf_ray/bench").expanduser() / TRL
    python = home / "bin" / "python"
    if not (home / ".ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", TRL], check=True)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (home / ".ready").touch()
    return str(python)


_DTYPES = (torch.float32, torch.bfloat16)


def _fresh_reward_model(config: RunConfig, folder: Path) -> None:
    if folder.is_dir():
        return
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

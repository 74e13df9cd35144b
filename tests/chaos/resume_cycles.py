"""Kill a PPO run without a word again and again, resume it each time, and hold it against a run that was never stopped.

    python tests/chaos/resume_cycles.py [--cycles 10] [--set key=value ...]

Real vLLM, Serve and Ray on a tiny model, on CPUs in float32. Each cycle waits for a few steps and a random moment
more, sends SIGKILL to the driver, waits until its processes are gone, and resumes. A JSON summary is printed. The exit
code is 1 unless every number of every step is the same to the last bit, timings and occupancy aside, and so is the
policy.

``--cycles 0`` compares two runs that nobody stops. With ``--set deterministic=false``, or ``ppo.max_staleness`` above
0, numbers may differ; the ledger and the staleness bound are then what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from common import COMMAND, newest_ledger, step_of, tiny_models, write_config

from rlhf_ray.checkpoint import latest_checkpoint, marked_checkpoints
from rlhf_ray.config import RunConfig, load_config
from rlhf_ray.metrics import read_lines, read_summary

SECONDS_TO_END = 120.0
TIMES = ("seconds_", "samples_per_second", "tokens_per_second", "slots_in_use", "generators")
"""How the rows' keys begin that say how long things took and how full the pipeline was."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10, help="times that the run is killed")
    parser.add_argument("--steps", type=int, default=0, help="of the run; default: 6 a cycle and 6 more")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--model", type=Path, help="policy; default: a random one of two layers")
    parser.add_argument("--reward", type=Path, help="reward model on it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="r_", dir="/tmp"))  # short, since the path of a Unix socket must be
    try:
        model, reward = arguments.model, arguments.reward
        if model is None or reward is None:
            model, reward = tiny_models(root)
        steps = arguments.steps or 6 * arguments.cycles + 6
        unbroken, broken = (
            _written_config(root, name, model, reward, steps, arguments.overrides) for name in ("unbroken", "broken")
        )
        _finish(root, unbroken)
        draw = random.Random(arguments.seed)
        kills = [_kill_once(root, broken, draw) for _ in range(arguments.cycles)]
        _finish(root, broken)
        summary = {"cycles": arguments.cycles, "steps": steps, "kills": kills} | _compare(unbroken, broken)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(summary, indent=2))
    in_order = summary["every_prompt_trained_once"] and summary["within_the_staleness_bound"]
    exact = not summary["deterministic"] or not summary["different"]
    killed = not any(kill["processes_left"] or kill["finished_before_it_was_killed"] for kill in kills)
    return 0 if in_order and exact and killed else 1


def _written_config(
    root: Path, name: str, model: Path, reward: Path, steps: int, overrides: Sequence[str]
) -> tuple[RunConfig, Path, list[str]]:
    """The run's configuration, its file, and the overrides that go with it."""
    ppo = {
        "steps": steps,
        "minibatches": 2,
        "max_staleness": 0,
        "checkpoint_every": 2,
        "samples_per_step": 8,
        "kl": {"controller": "adaptive", "target": 0.01, "horizon": 100},
    }
    learner = {"lr": 1e-3, "warmup_steps": 10}
    path = write_config(root, name, model, reward, top={"deterministic": True}, learner=learner, ppo=ppo)
    return load_config(path, overrides), path, [part for override in overrides for part in ("--set", override)]


def _start(root: Path, run: tuple[RunConfig, Path, list[str]]) -> subprocess.Popen[str]:
    """A new run, or a resumed one where there is a checkpoint; one that was killed before its first begins afresh."""
    config, path, overrides = run
    whole = marked_checkpoints(config.run_dir / "checkpoints")
    way = ["--resume"] if whole else ["--overwrite"] if config.run_dir.exists() else []
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(root)}
    log = (root / f"{config.name}.log").open("a")
    return subprocess.Popen(
        [str(COMMAND), "ppo", "-c", str(path), *overrides, *way], env=env, stdout=log, stderr=log, text=True
    )


def _finish(root: Path, run: tuple[RunConfig, Path, list[str]]) -> None:
    with _start(root, run) as process:
        code = process.wait()
    if code:
        raise SystemExit(f"the run ended with code {code}:\n" + (root / f"{run[0].name}.log").read_text()[-4000:])


def _kill_once(root: Path, run: tuple[RunConfig, Path, list[str]], draw: random.Random) -> dict[str, Any]:
    config = run[0]
    begins = step_of(latest_checkpoint(config.run_dir / "checkpoints"))
    at_row = begins + draw.randint(1, 5)
    with _start(root, run) as process:
        while process.poll() is None and _rows(config) < at_row:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, left = psutil.wait_procs(started, timeout=SECONDS_TO_END)
    for straggler in left:
        straggler.kill()
    return {
        "began_at_step": begins,
        "killed_after_step": _rows(config),
        "newest_checkpoint": step_of(latest_checkpoint(config.run_dir / "checkpoints")),
        "finished_before_it_was_killed": process.returncode == 0,
        "processes_left": len(left),
    }


def _rows(config: RunConfig) -> int:
    """The last step that the run has logged."""
    rows = read_lines(config.run_dir / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def _compare(unbroken: tuple[RunConfig, Path, list[str]], broken: tuple[RunConfig, Path, list[str]]) -> dict[str, Any]:
    config = broken[0]
    folders = [run[0].run_dir for run in (unbroken, broken)]
    rows = [[_numbers(row) for row in read_lines(folder / "metrics.jsonl")] for folder in folders]
    samples = [read_lines(folder / "samples.jsonl") for folder in folders]
    weights = [sorted((folder / "policy").glob("*.safetensors")) for folder in folders]
    different = [
        f"step {one['step']}: {key} {one.get(key)!r} and {other.get(key)!r}"
        for one, other in zip(*rows, strict=False)
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]
    different += ["number of steps"] if len(rows[0]) != len(rows[1]) else []
    different += ["samples.jsonl"] if samples[0] != samples[1] else []
    different += ["policy"] if [p.read_bytes() for p in weights[0]] != [p.read_bytes() for p in weights[1]] else []
    trained = newest_ledger(folders[1])["trained"]
    summary = read_summary(folders[1])
    return {
        "deterministic": config.deterministic,
        "rows": len(rows[1]),
        "numbers_compared": sum(map(len, rows[1])),
        "different": different[:20],
        "every_prompt_trained_once": trained == [[0, config.ppo.steps * config.ppo.prompts_per_step - 1]]
        and summary["lost"] == summary["trained_twice"] == 0,
        "staleness_max": max(row["staleness_max"] for row in rows[1]),
        "within_the_staleness_bound": all(row["staleness_max"] <= config.ppo.max_staleness for row in rows[1]),
    }


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMES)}


if __name__ == "__main__":
    sys.exit(main())

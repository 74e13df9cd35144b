"""A made-up run's folder, as the stages would leave it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from rlhf_ray.metrics import write_json, write_summary
from rlhf_ray.stages.evaluate import EvalRow, compare


def step_metrics(step: int) -> dict[str, float]:
    rise = 1 - 0.95**step
    return {
        "step": step,
        "score_mean": 2 * rise,
        "kl": 8 * rise,
        "kl_k3": 8.5 * rise,
        "approx_kl": 0.004,
        "clipfrac": 0.05,
        "explained_variance": 0.8 * rise,
        "entropy": 3 - rise,
        "staleness_mean": 0.5,
        "staleness_max": 1.0,
        "response_length": 23.0,
        "truncated_share": 0.9,
        "grad_norm": 0.7,
        "seconds_step": 8.0,
        "seconds_wait": 3.0,
        "seconds_train": 4.5,
        "seconds_publish": 0.25,
        "seconds_sync": 0.5,
        "seconds_generate": 2.5,
        "seconds_score": 0.5,
        "seconds_reference": 0.4,
        "samples_per_second": 4.0,
        "tokens_per_second": 92.0,
        "parity_max": 1e-5,
    }


def eval_row(i: int, response: str, *, gold: float, score: float, kl: float) -> EvalRow:
    return EvalRow(
        prompt=f"The <train> number {i}",
        sample=0,
        response=response,
        tokens=20 + i,
        truncated=i % 2 == 0,
        gold=gold,
        score=score,
        kl=kl,
    )


@pytest.fixture
def hostile() -> str:
    """Text that a model might write and a page must not run."""
    return "<script>alert('x')</script> & <b>bold</b> {{ 7 * 7 }}"


@pytest.fixture
def write_run(hostile: str) -> Callable[..., Path]:
    """Writes everything that a finished demo leaves and a report reads, save TensorBoard's events."""

    def write(run_dir: Path, *, steps: int = 60) -> Path:
        run_dir.mkdir(parents=True)
        lines = [json.dumps(step_metrics(step)) for step in range(1, steps + 1)]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        (run_dir / "config.resolved.yaml").write_text("name: made-up\nmodel:\n  path: some/model-135M\n", "utf-8")
        base = [eval_row(i, f"It was <i>dull</i>, number {i}.", gold=0.1, score=0.0, kl=0.0) for i in range(8)]
        joys = [hostile, *(f"It was a joy, number {i}!" for i in range(1, 8))]
        trained = [eval_row(i, joy, gold=0.6, score=1.5, kl=6.0) for i, joy in enumerate(joys)]
        write_json(run_dir / "evaluation.json", asdict(compare(base, trained)))
        (run_dir / "reward").mkdir()
        interval = {"accuracy": 0.74, "accuracy_low": 0.65, "accuracy_high": 0.82}
        reward = {**interval, "pairs": 96, "annotators": ["simulated:vader"]}
        write_json(run_dir / "reward" / "reward_report.json", reward)
        write_summary(
            run_dir,
            {
                "status": "finished",
                "steps": steps,
                "samples": 32 * steps,
                "samples_per_second": 4.02,
                "tokens_per_second": 92.3,
                "kl_last": 7.6,
                "staleness_max": 1,
                "stage_seconds": {"wait": 180.0, "train": 270.0, "publish": 15.0, "generate": 2.5},
                "lost": 0,
                "trained_twice": 0,
                "wall_seconds": 754.0,
            },
        )
        return run_dir

    return write

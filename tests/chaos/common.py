"""What the scripts of this folder share: tiny models, the configuration of a small run, and what a run has left."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from rlhf_ray.checkpoint import latest_checkpoint, load_state

COMMAND = Path(sys.executable).parent / "rlhf-ray"


def _conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conftest_of_tests", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_models(root: Path) -> tuple[Path, Path]:
    """A policy and a reward model on it: those of the tests."""
    conftest = _conftest()
    conftest.make_tiny_model(root / "model")
    conftest.make_tiny_reward(root / "reward", root / "model")
    return root / "model", root / "reward"


def write_config(
    root: Path, name: str, model: Path, reward: Path, *, top: Mapping[str, Any], **sections: Mapping[str, Any]
) -> Path:
    """The file of a run in float32 on a quarter of a core each, below ``root``.

    Args:
        top: keys outside of sections.
        sections: keys that a section has besides, or instead of, those of here.
    """
    worker = {"num_cpus": 0.25, "threads": 1}
    config: dict[str, Any] = {
        **_conftest().make_tiny_run(root, model, name=name),
        "sampling": {"max_new_tokens": 12},
        "serve": {"model": str(reward), "port": 0, "precision": "float32", **worker},
        "generator": {"kv_cache_gb": 0.02, "dtype": "float32", **worker},
        "reference": {"precision": "float32", **worker},
        "learner": {"precision": "float32", **worker},
        "ppo": {"batch_size": 8},
        **top,
    }
    for section, keys in sections.items():
        config[section] = {**config[section], **keys}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def newest_ledger(run_dir: Path) -> dict[str, Any]:
    """The prompts of the newest whole checkpoint, by what has become of them."""
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None, f"{run_dir} has no whole checkpoint"
    ledger: dict[str, Any] = load_state(checkpoint / "pipeline")["ledger"]
    return ledger


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint's folder; 0 for none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

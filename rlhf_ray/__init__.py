"""RLHF as a service on Ray: preferences, a served reward model, and asynchronous PPO.

The names below are the public ones; each is imported when it is first used, so that ``import rlhf_ray`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.config import RunConfig, load_config
    from rlhf_ray.errors import RlhfRayError
    from rlhf_ray.stages.ppo import run_ppo

_HOME = {
    "RlhfRayError": "rlhf_ray.errors",
    "RunConfig": "rlhf_ray.config",
    "load_config": "rlhf_ray.config",
    "run_ppo": "rlhf_ray.stages.ppo",
}

__all__ = ["RlhfRayError", "RunConfig", "load_config", "run_ppo"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

"""Which stages the demo runs; what they do is tested where they live."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray import demo
from rlhf_ray.config import RunConfig


@pytest.fixture
def run_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the demo with every stage replaced by its name; returns what was planned, and what was run."""
    service = SimpleNamespace(name="reward")
    done: list[str] = []

    def stand_in(name: str, result: Any = None) -> Callable[..., Any]:
        def called(*_: Any, service: Any = None, **__: Any) -> Any:
            done.append(f"{name} with {service.name}" if service else name)
            return result

        return called

    monkeypatch.setattr(demo, "check_inputs", lambda config: None)
    monkeypatch.setattr(demo, "connected", nullcontext)
    monkeypatch.setattr(demo, "check_resources", lambda needs: None)
    monkeypatch.setattr(demo, "PeakMemory", lambda: nullcontext(SimpleNamespace(peak_bytes=0)))
    monkeypatch.setattr(demo, "_start_service", stand_in("serve", service))
    monkeypatch.setattr(demo.serve, "stop_service", stand_in("stop"))
    for stage in ("collect", "judge", "reward", "evaluate", "report"):
        monkeypatch.setattr(demo, f"run_{stage}", stand_in(stage))
    monkeypatch.setattr(demo, "run_ppo", stand_in("ppo", SimpleNamespace(status="finished")))

    def run(**sections: Any) -> list[str]:
        base = {"model": {"path": "m"}, "prompts": {"path": "a", "eval_path": "b"}, "output_dir": str(tmp_path)}
        planned: list[str] = []
        console: Any = SimpleNamespace(plan=planned.extend)
        demo.run_demo(RunConfig.model_validate({**base, **sections}), console)
        assert planned == [step.split()[0] for step in done if step != "stop"]
        return done

    return run


def test_the_demo_makes_a_reward_model_and_serves_it_to_the_loop(run_demo: Callable[..., list[str]]) -> None:
    made = ["collect", "judge", "reward", "serve"]
    assert run_demo() == [*made, "ppo with reward", "evaluate with reward", "stop", "report"]


def test_where_no_scorer_is_the_served_model_the_demo_begins_with_ppo(run_demo: Callable[..., list[str]]) -> None:
    scorers = [{"kind": "function", "name": "brief", "function": "my_rewards:brevity"}]
    assert run_demo(scorers=scorers) == ["ppo", "evaluate", "report"]

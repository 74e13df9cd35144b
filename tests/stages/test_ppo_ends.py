"""How a PPO run ends, as far as it shows without a cluster: its status on disk, and the signals that stop it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import DataLostError, LearnerDiedError, ParityError
from rlhf_ray.metrics import read_summary, status_kept
from rlhf_ray.stages import ppo
from rlhf_ray.stages.ppo import _run_to_its_end, _stop_on_ctrl_c


class Stoppable:
    """The one method of a pipeline that a signal calls."""

    def __init__(self) -> None:
        self.stops = 0

    def request_stop(self) -> None:
        self.stops += 1


def test_the_summary_says_how_a_run_ended(tmp_path: Path) -> None:
    with status_kept(tmp_path):
        assert read_summary(tmp_path) == {"status": "running", "cause": None}
    with pytest.raises(ParityError), status_kept(tmp_path):
        raise ParityError("they differ")
    assert read_summary(tmp_path) == {"status": "failed", "cause": "ParityError: they differ"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_asks_for_a_stop_and_the_next_one_is_let_through(number: signal.Signals) -> None:
    """Kubernetes and a job's stop send SIGTERM, a person at a terminal SIGINT."""
    before = signal.getsignal(number)
    pipeline, wished = Stoppable(), threading.Event()
    with _stop_on_ctrl_c(pipeline, wished):  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        assert pipeline.stops == 1
        assert wished.is_set()
        assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL, before)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL, before)


async def test_without_a_signal_nothing_is_stopped() -> None:
    pipeline, wished = Stoppable(), threading.Event()
    with _stop_on_ctrl_c(pipeline, wished):  # type: ignore[arg-type]
        await asyncio.sleep(0)
    assert pipeline.stops == 0
    assert not wished.is_set()


class Loops:
    """Stands in for the loops of one run, which end with these errors one after the other, and then well."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        config = SimpleNamespace(learner=SimpleNamespace(max_restarts=3), run_dir=tmp_path)
        self.run: Any = SimpleNamespace(
            prepared=SimpleNamespace(config=config), identity={}, stop_wished=threading.Event(), deaths=Counter()
        )
        self.errors = list(errors)
        self.asked: list[dict[str, int]] = []
        for name in ("_start_workers", "_train"):
            monkeypatch.setattr(ppo, name, getattr(self, name))
        monkeypatch.setattr(ppo, "_newest_start", lambda config, identity: SimpleNamespace(step=0))

    async def _start_workers(self, run: Any, stack: Any, asked: dict[str, int]) -> Any:
        self.asked.append(dict(asked))
        return SimpleNamespace(note_asked=lambda asked: asked.update(generators=3))

    async def _train(self, run: Any, workers: Any, start: Any) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "the summary"

    async def end(self) -> Any:
        return await _run_to_its_end(self.run, SimpleNamespace(step=0))  # type: ignore[arg-type]


async def test_lost_data_and_a_dead_learner_have_the_loop_begin_again_with_the_pools_as_they_were_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = Loops(tmp_path, monkeypatch, DataLostError("gone"), LearnerDiedError("rank 0 died"))
    assert await loops.end() == "the summary"
    assert loops.asked == [{}, {"generators": 3}, {"generators": 3}]
    assert loops.run.deaths == {"learner": 1}


async def test_a_run_that_is_being_stopped_does_not_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = Loops(tmp_path, monkeypatch, LearnerDiedError("rank 0 died"))
    loops.run.stop_wished.set()
    with pytest.raises(LearnerDiedError, match="rank 0 died; the run was being stopped: go on with --resume"):
        await loops.end()
    assert loops.asked == [{}]

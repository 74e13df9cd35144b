"""How a PPO run ends, as far as it shows without a cluster: its status on disk, and the signals that stop it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from rlhf_ray.errors import ParityError
from rlhf_ray.metrics import read_summary, status_kept
from rlhf_ray.stages.ppo import _stop_on_ctrl_c


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
    pipeline = Stoppable()
    with _stop_on_ctrl_c(pipeline):  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        assert pipeline.stops == 1
        assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL, before)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL, before)


async def test_without_a_signal_nothing_is_stopped() -> None:
    pipeline = Stoppable()
    with _stop_on_ctrl_c(pipeline):  # type: ignore[arg-type]
        await asyncio.sleep(0)
    assert pipeline.stops == 0

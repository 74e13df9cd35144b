"""What the machinery against death costs a PPO run: samples per second with it against without, in one run.

    python tests/bench/machinery.py [--blocks 6] [--steps 10] [--set key=value ...]

With: a checkpoint every ``--steps`` steps (10, the default of ``ppo.checkpoint_every``), the watch over every worker,
and the status that is kept every second. Without: none of these; the ledger and the workers' own counting stay. The
recipe is that of ``ppo_throughput.py``; this takes too long to be part of ``make bench``. Blocks of steps take turns in
the order on, off, off, on, ..., so that a machine that grows faster or slower favours neither. A block's checkpoint is
taken after its second step, so that what is written in the background falls into the same block. The mean of a block's
steps has it in it; the median has what is left without. The first checkpoint, for whose copy memory is taken once, and
the last step, after which nobody samples, are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_throughput import BATCH, _config, _fresh_reward_model, _line

from rlhf_ray.actors.client import ActorClient
from rlhf_ray.metrics import read_lines
from rlhf_ray.pipeline.loop import Pipeline
from rlhf_ray.report.quiet import quiet_libraries
from rlhf_ray.stages.ppo import run_ppo
from rlhf_ray.stages.steering import Steering


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="an even number")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    quiet_libraries()
    is_on = [block % 4 in (0, 3) for block in range(arguments.blocks)]
    with tempfile.TemporaryDirectory() as name:
        rows = _rows(Path(name), arguments.steps, is_on, arguments.overrides)
    blocks = [rows[i : i + arguments.steps] for i in range(0, len(rows), arguments.steps)]
    seconds = [[row["seconds_step"] for row in block] for block in blocks]
    figures: dict[str, Any] = {"seconds_of_steps": dict(enumerate(seconds)), "on": is_on}
    for name, of in (("mean", statistics.fmean), ("median", statistics.median)):
        on, off = (
            [of(block) for block, lit in zip(seconds, is_on, strict=True) if lit is wanted] for wanted in (True, False)
        )
        figures[f"samples_per_second_by_{name}_step"] = {"on": [BATCH / s for s in on], "off": [BATCH / s for s in off]}
        figures[f"on_against_off_by_{name}_step"] = statistics.fmean(off) / statistics.fmean(on)
    print(json.dumps(figures, indent=2))


def _rows(folder: Path, steps: int, is_on: list[bool], overrides: list[str]) -> list[dict[str, Any]]:
    """Metrics of the counted steps."""
    switch = Switch()
    switch.install()
    warm_up = 2 * steps - 2  # the first block begins two steps before the second checkpoint
    counted = steps * len(is_on)
    total = warm_up + counted + 1
    config = _config(folder, "machinery", total, [f"ppo.steps={total}", f"ppo.checkpoint_every={steps}", *overrides])
    _fresh_reward_model(config, folder / "reward")

    def on_step(row: Any) -> None:
        print(_line(row), file=sys.stderr, flush=True)
        block = max(0, int(row["step"]) - warm_up) // steps
        switch.turn(on=block >= len(is_on) or is_on[block])

    run_ppo(config, on_step=on_step)
    return read_lines(config.run_dir / "metrics.jsonl")[warm_up:][:counted]


class Switch:
    """Turns the machinery of a run in this process on and off while it goes on."""

    def __init__(self) -> None:
        self._on = asyncio.Event()
        self._on.set()

    def turn(self, *, on: bool) -> None:
        (self._on.set if on else self._on.clear)()

    def install(self) -> None:
        for owner, method in (
            (ActorClient, "_next_pulse"),
            (Steering, "_take_wish"),
            (Pipeline, "_begin_save"),
        ):
            setattr(owner, method, self._switched(getattr(owner, method), waits=method != "_begin_save"))
        stop = Pipeline.request_stop

        def stop_with_all_on(pipeline: Pipeline) -> None:
            self.turn(on=True)  # what waits for it would never end
            stop(pipeline)

        setattr(Pipeline, "request_stop", stop_with_all_on)  # noqa: B010 (a plain assignment is an error to mypy)

    def _switched(self, work: Callable[..., Any], *, waits: bool) -> Callable[..., Any]:
        """Work that is left out while the switch is off; for good, or until it is on again."""

        async def switched(*arguments: Any) -> Any:
            if waits:
                await self._on.wait()
            return await work(*arguments) if self._on.is_set() else None

        return switched


if __name__ == "__main__":
    main()

"""What ``rlhf-ray status`` prints for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.stages.live import POOLS, standing

COLUMNS = ("worker", "state", "version", "in hand", "done", "restarts", "node")


def status_lines(folder: Path, now: Mapping[str, Any]) -> list[str]:
    """A run's status, as ``rlhf_ray.status`` gives it, as lines of text."""
    lines = [f"{folder}: {standing(now)}"]
    if now["silent_seconds"] is None:
        return lines
    queue, staleness = now["queue"], now["staleness"]
    lines += [
        f"step {now['step']} of {now['steps']}, version {now['version']}",
        f"staleness: mean {staleness['mean']:.2f}, largest {staleness['max']}, bound {staleness['bound']}",
        f"queue: {queue['slots_in_use']} of {queue['slots']} slots; prompts: "
        f"{queue['waiting_for_a_generator']} waiting for a generator, {queue['being_generated']} being generated, "
        f"{queue['being_scored']} being scored, {queue['finished']} finished",
        "busy in the last minute: " + ", ".join(f"{stage} {share:.0%}" for stage, share in now["occupancy"].items()),
    ]
    if (left_out := now.get("quarantined")) and left_out["prompts"]:
        lines.append(f"quarantined: {left_out['prompts']} prompts, bound {left_out['bound']}; see quarantine.jsonl")
    if now["replicas"]:
        lines.append("reward model: " + ", ".join(f"{n} {state.lower()}" for state, n in now["replicas"].items()))
    if not now["running"]:
        return lines
    pools = [name for name in POOLS if now[name]]
    lines += [_pool_line(name, now[name]) for name in pools]
    scorers = now.get("scorers") or {}
    lines += [f"{name}: {pool['up']} up; {_restarts(pool)}" for name, pool in scorers.items()]
    rows = [
        [_cell(worker[column.replace(" ", "_")]) for column in ("name", *COLUMNS[1:])]
        for pool in (*(now[name] for name in pools), *scorers.values())
        for worker in pool["workers"]
    ]
    return [*lines, "", *_aligned([COLUMNS, *rows])]


def _pool_line(name: str, pool: Mapping[str, Any]) -> str:
    line = f"{name}: {pool['up']} up of {pool['wanted']} wanted"
    if pool["max"] is not None:
        line += f" (follows the cluster up to {pool['asked']})"
    if pool["unplaced"]:
        line += f", {pool['unplaced']} waiting for a place"
    return f"{line}; {_restarts(pool)}"


def _restarts(pool: Mapping[str, Any]) -> str:
    return f"{pool['restarts']} of {pool['max_restarts']} restarts used"


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

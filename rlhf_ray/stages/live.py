"""A PPO run under way, looked at and steered from outside.

    the run, every second or two ──writes──► status.json        ──► status(run_dir)
                                 ◄──reads─── control/scale.json ◄── scale(run_dir, generators=3)

Files of the run's folder and nothing else: it works without a connection to Ray, from any machine that shares the
folder, for a run on a laptop and for a submitted job alike. The run says in ``status.json`` which wish it has taken.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.errors import ConfigError, RlhfRayError
from rlhf_ray.metrics import STATUS_FILE, read_json, read_summary, write_json

SCALE_FILE = Path("control") / "scale.json"

POOLS = ("generators", "references")

SILENCE_SECONDS = 20.0
"""A run that has not written its status for so long is gone, or hangs."""

RESTART_SECONDS = 600.0
"""A run whose workers begin again has no status to write for as long as their models load."""

TAKE_SECONDS = 20.0
"""How long ``scale`` waits for the run's word."""

_POLL_SECONDS = 0.2


def status(run_dir: str | Path) -> dict[str, Any]:
    """How a PPO run stands; JSON-ready.

    ``status`` is starting, running, restarting (a rank of the learner died, or what waited for it was lost, and the
    workers begin again from the newest checkpoint), finishing (its loop is over, and the policy is being written),
    silent (nothing was heard for ``SILENCE_SECONDS``: its process is gone or hangs), or how it ended: finished,
    interrupted, failed, then with ``cause``. ``running`` is whether its workers work now, ``silent_seconds`` the age of
    what follows: ``step``, ``steps``, ``version``, ``staleness`` (in versions, with its bound), ``queue`` (prompts by
    stage; slots), ``quarantined`` (prompts, with their bound), ``deaths`` (workers that died, by kind), ``occupancy``
    (share of the last minute in which a stage had something to do), ``generators`` and ``references`` (each pool with
    its workers; null where there are no references), ``scorers`` (those in a process of their own, as "scorer NAME",
    each a pool of one), ``replicas`` of the reward model by state, and ``scale``, the last wish taken. All of that is
    absent before the loop has begun.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder = _run_folder(run_dir)
    picture, word = read_json(folder / STATUS_FILE), read_summary(folder)
    age = max(0.0, time.time() - picture["at"]) if picture else None
    said = word.get("status")
    if said == "running":
        if age is None:
            said = "starting"
        elif picture.get("restarting") and age < RESTART_SECONDS:
            said = "restarting"
        elif age > SILENCE_SECONDS:
            said = "silent"
        elif picture["ended"]:
            said = "finishing"
    head = {"status": said, "cause": word.get("cause"), "running": said == "running", "silent_seconds": age}
    return head | picture


def scale(
    run_dir: str | Path,
    *,
    generators: int | None = None,
    references: int | None = None,
    wait_seconds: float = TAKE_SECONDS,
) -> dict[str, Any]:
    """Have so many generators, or references, in a run under way; returns its status once it has taken the wish.

    Workers join and leave in their own time. In a pool that follows the cluster (``generator.max``) the number is the
    most that it grows to.

    Raises:
        ConfigError: the run is not running, or the number is below ``min`` or above ``max`` of its section.
        RlhfRayError: the run has not taken the wish within ``wait_seconds``.
    """
    wish = {"generators": generators, "references": references}
    wanted = {pool: number for pool, number in wish.items() if number is not None}
    if not wanted:
        raise ConfigError("scale needs a number: name generators (--generators N), references (--references M) or both")
    folder = _run_folder(run_dir)
    now = status(folder)
    if not now["running"]:
        raise ConfigError(f"{folder} cannot be scaled: {standing(now)}")
    if refusal := refusal_of(wanted, now):
        raise ConfigError(refusal)
    ticket = uuid.uuid4().hex
    (folder / SCALE_FILE).parent.mkdir(exist_ok=True)
    write_json(folder / SCALE_FILE, {"id": ticket, **wanted})
    end = time.monotonic() + wait_seconds
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        now = status(folder)
        taken = now.get("scale") or {}
        if taken.get("id") == ticket:
            if taken["refused"]:
                raise ConfigError(taken["refused"])
            return now
        if read_json(folder / SCALE_FILE).get("id") != ticket:
            raise RlhfRayError(f"another scale took the place of this one in {folder}; see `rlhf-ray status`")
    raise RlhfRayError(
        f"the run in {folder} has not taken the wish within {wait_seconds:g} s; it is taken as soon as the run reads "
        f"{folder / SCALE_FILE}; see `rlhf-ray status`"
    )


def refusal_of(wanted: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why a run of this status does not take the wish; None if it does."""
    for pool, number in wanted.items():
        if not now.get(pool):
            return f"this run has no {pool}: its learner is the reference too; leave --{pool} out"
        section, least, most = pool.removesuffix("s"), now[pool]["min"], now[pool]["max"]
        if not isinstance(number, int) or number < least:
            return f"{pool} = {number} is below {least}, the least that {section}.min allows; ask for more"
        if most is not None and number > most:
            return (
                f"{pool} = {number} is above {section}.max = {most}; ask for fewer, or start the run with a higher one"
            )
    return None


def note_restart(run_dir: Path) -> None:
    """Leave word that the run's workers begin again."""
    picture = read_json(run_dir / STATUS_FILE)
    if picture:  # else its loop has not begun
        write_json(run_dir / STATUS_FILE, picture | {"at": time.time(), "ended": False, "restarting": True})


def standing(now: Mapping[str, Any]) -> str:
    """A status in a few words."""
    age = now["silent_seconds"]
    if now["status"] == "silent":
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now["at"]))
        return f"no word since {since}, {age:.0f} s ago; its process is gone, or hangs"
    if now["status"] == "failed":
        return f"failed: {now['cause']}"
    words = {
        "starting": "starting; its loop has not begun",
        "restarting": "its workers begin again from the newest checkpoint",
        "finishing": "its loop is over and the policy is being written",
        "interrupted": "interrupted; `rlhf-ray ppo --resume` goes on",
    }
    return words.get(now["status"], str(now["status"]))


def _run_folder(run_dir: str | Path) -> Path:
    """The folder of a run, given as it is or as a name under runs/."""
    given = Path(run_dir).expanduser()
    for folder in (given, Path("runs") / given):
        if read_summary(folder):
            return Path(os.path.abspath(folder))
    raise ConfigError(f"{given} holds no run (summary.json is missing); name the folder of one, such as runs/first")

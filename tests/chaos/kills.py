"""Kill the processes of a PPO run under way, one after another, and check what the run promises.

    python tests/chaos/kills.py [--kills 50] [--seed 0] [--roles generator,driver,...] [--minutes 40] [--elastic]

Real vLLM, Serve and Ray on a tiny model, on a cluster of five nodes that are processes of this machine: a head, and a
node for each of two generators, the reference, and the reward model's replica. At random moments one process gets
SIGKILL: of a generator, the reference, the replica, a scorer that is a function, Serve's controller, one of two ranks
of the learner, one of those four nodes as a whole, the driver (which is then resumed). The next one follows after the
run is whole again, or now and then within two seconds. At the end the run is stopped, resumed, and finished a few steps
later.

``--elastic`` instead scales a run from 1 generator to 3 and back to 1, and holds its ledger against that of a run with
a fixed pool.

A JSON summary is printed. The exit code is 1 unless every prompt was trained once (or stands in quarantine), nothing
was lost, nothing was staler than allowed, and the run went on after each kill. ``stall`` is the longest time between
the ends of two steps from the kill until the run was whole, less the median of the run; seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common import COMMAND, newest_ledger, tiny_models, write_config
from ray.cluster_utils import Cluster

import rlhf_ray
from rlhf_ray.config import load_config
from rlhf_ray.metrics import read_lines, read_summary

TITLES = {
    "generator": "ray::GeneratorWorker",
    "reference": "ray::ReferenceWorker",
    "replica": "ray::ServeReplica",
    "scorer": "ray::ScorerWorker",
    "controller": "ray::ServeController",
    "learner": "ray::LearnerWorker",
}
"""How Ray titles the process of a role."""

WITH_A_NODE = ("generator", "reference", "replica")
"""Each of these has a node of its own."""

ROLES = (*TITLES, "node", "driver")

TWO_AT_ONCE = "two at once"
SHARE_OF_TWO = 0.15
"""How often a kill is followed by the next one at once."""

WHOLE_SECONDS = 300.0
"""A run that is not whole by then has broken its promise."""

OWN_NODE = 9
"""Of the ten cores that a node says it has."""

STEPS_TO_END = 5
FOR_EVER = 10_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the roles and of the moments")
    parser.add_argument("--roles", default=",".join(ROLES), help="which to kill, in turn; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=40, help="no kill begins later than this")
    parser.add_argument("--model", type=Path, help="policy; default: a random one of two layers")
    parser.add_argument("--reward", type=Path, help="reward model on it")
    parser.add_argument("--elastic", action="store_true", help="scale from 1 to 3 to 1 instead of killing")
    arguments = parser.parse_args()
    roles = arguments.roles.split(",")
    if unknown := set(roles) - set(ROLES):
        parser.error(f"--roles has no {', '.join(sorted(unknown))}")
    root = Path(tempfile.mkdtemp(prefix="r_", dir="/tmp"))  # short, since the path of a Unix socket must be
    try:
        models = arguments.model, arguments.reward
        if None in models:
            models = tiny_models(root)
        with Nodes(root, workers=3 if arguments.elastic else 4) as nodes:
            if arguments.elastic:
                summary = _elastic(root, nodes, *models)
            else:
                summary = _kills(root, nodes, models, arguments.kills, roles, arguments.seed, 60 * arguments.minutes)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(summary, indent=2))
    return 1 if summary["broken"] else 0


class Nodes:
    """A Ray cluster of this script's own: its processes have a temporary folder and ports of their own."""

    def __init__(self, root: Path, *, workers: int) -> None:
        head = {"num_cpus": 8, "include_dashboard": False, "temp_dir": str(root)}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(workers):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [process for node in self._cluster.list_all_nodes() for process in _processes(node)]
        self._cluster.shutdown()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def add(self) -> None:
        """A node that has room for one of ``WITH_A_NODE``."""
        self._cluster.add_node(num_cpus=10)

    def of_role(self, role: str) -> list[psutil.Process]:
        """The role's processes."""
        return [p for node in self._cluster.list_all_nodes() for p in _processes(node) if _title(p, TITLES[role])]

    def lose_one(self, draw: random.Random) -> str | None:
        """End all processes of a node, as if its machine were gone, and add another one.

        Returns:
            The role that had it; None where there is none that somebody had.
        """
        had = [(role, node) for node in self._cluster.worker_nodes if (role := _role_of(node)) is not None]
        if not had:
            return None
        role, node = draw.choice(sorted(had, key=lambda one: str(one[1].node_id)))
        processes = _processes(node)
        self._cluster.remove_node(node, allow_graceful=False)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.add()
        return role


def _role_of(node: Any) -> str | None:
    """Whose node it is; None where nobody has come yet, or what cannot be lost has gone there."""
    there = _processes(node)
    if any(_title(p, TITLES["learner"], TITLES["controller"]) for p in there):
        return None
    return next((role for role in WITH_A_NODE if any(_title(p, TITLES[role]) for p in there)), None)


def _processes(node: Any) -> list[psutil.Process]:
    """The workers of a node, which are its raylet's children."""
    try:
        (raylet,) = node.all_processes["raylet"]
        return list(psutil.Process(raylet.process.pid).children(recursive=True))
    except (KeyError, psutil.NoSuchProcess):
        return []


def _title(process: psutil.Process, *titles: str) -> bool:
    try:
        return " ".join(process.cmdline()).startswith(titles)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


class Run:
    """A PPO run as a process of its own, and the times at which its steps ended."""

    def __init__(self, root: Path, nodes: Nodes, path: Path) -> None:
        config = load_config(path)
        self.folder, self.prompts_per_step = config.run_dir, config.ppo.prompts_per_step
        self.max_staleness = config.ppo.max_staleness
        self.step_ends: list[tuple[float, int]] = []
        self.codes: list[int] = []
        self._root, self._nodes, self._path = root, nodes, path
        self._over = threading.Event()

    def start(self, *options: str) -> None:
        env = dict(os.environ) | {"RAY_ADDRESS": self._nodes.address}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [str(COMMAND), "ppo", "-c", str(self._path), *options],
                env=env, cwd=self._root, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def end(self, number: int | None = None) -> None:
        """Wait for the process, after this signal if there is one."""
        if number is not None:
            self.process.send_signal(number)
        try:
            self.codes.append(self.process.wait(WHOLE_SECONDS))
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Broken(f"the run did not end:\n{self.last_words()}") from None

    def status(self) -> dict[str, Any]:
        """Empty before there is one."""
        with contextlib.suppress(rlhf_ray.RlhfRayError):
            return rlhf_ray.status(self.folder)
        return {}

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> None:
        end = time.monotonic() + WHOLE_SECONDS
        while not what(now := self.status()):
            if self.process.poll() is not None:
                raise Broken(f"the run ended with code {self.process.returncode}:\n{self.last_words()}")
            if time.monotonic() > end:
                raise Broken(f"not whole after {WHOLE_SECONDS:.0f} s: {now}\n{self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        return self._log.read_text()[-6000:]

    @property
    def _log(self) -> Path:
        return self._root / f"{self._path.stem}.log"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note when steps end, for the block, at the end of which the process is gone."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def _watch(self) -> None:
        path, seen = self.folder / "metrics.jsonl", None
        while not self._over.wait(0.01):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if (stat := path.stat()) and seen != (seen := (stat.st_ino, stat.st_size)):
                    with path.open("rb") as file:
                        file.seek(max(0, stat.st_size - 20_000))
                        step = int(json.loads(file.read().splitlines()[-1])["step"])
                    if not self.step_ends or step != self.step_ends[-1][1]:
                        self.step_ends.append((time.time(), step))


class Broken(Exception):
    """The run has not kept a promise."""


def _kills(
    root: Path, nodes: Nodes, models: tuple[Path, Path], number: int, roles: list[str], seed: int, seconds: float
) -> dict[str, Any]:
    path = _config(root, "killed", *models, generators=2)
    run, draw, kills, broken = Run(root, nodes, path), random.Random(seed), [], None
    order = [roles[i % len(roles)] for i in range(number)]
    draw.shuffle(order)
    ends = time.monotonic() + seconds
    run.start()
    with run.watched():
        try:
            run.wait_for(lambda now: _is_whole(now) and now["step"] > 0)
            while order and time.monotonic() < ends:
                time.sleep(draw.uniform(1, 6))
                number_now = 2 if draw.random() < SHARE_OF_TWO else 1
                now, order = order[:number_now], order[number_now:]
                print(f"killing {' and '.join(now)}", file=sys.stderr, flush=True)
                kills.append(_kill(run, nodes, now, draw))
                order += (Counter(now) - Counter(kills[-1]["roles"])).elements()  # what there was none of, later again
                print(json.dumps(kills[-1]), file=sys.stderr, flush=True)
            steps = _finish(run)
        except Broken as error:
            broken, steps = str(error), None
    return _kill_summary(run, kills, number, steps, broken)


def _config(
    root: Path, name: str, *models: Path, generators: int, steps: int = FOR_EVER, together: bool = False
) -> Path:
    """The run's file, and its function beside it. ``together``: all but the generators are on the head."""
    (root / "chaos_scorer.py").write_text(
        "def brevity(completion_ids, **kwargs):\n    return [-len(ids) / 10 for ids in completion_ids]\n"
    )
    return write_config(
        root, name, *models,
        top={
            "scorers": [
                {"kind": "served", "name": "reward"},
                {"kind": "function", "name": "brevity", "function": "chaos_scorer:brevity", "max_restarts": 1000},
            ]
        },
        serve={"num_cpus": 0.25 if together else OWN_NODE},
        generator={"count": generators, "num_cpus": OWN_NODE, "max_restarts": 1000},
        reference={"count": 1, "num_cpus": 0.25 if together else OWN_NODE, "max_restarts": 1000},
        learner={"ranks": 2, "lr": 1e-4, "max_restarts": 1000},
        ppo={"steps": steps, "checkpoint_every": 20, "max_prompt_tries": 10},
    )  # fmt: skip


def _kill(run: Run, nodes: Nodes, roles: list[str], draw: random.Random) -> dict[str, Any]:
    """Kill one of each role, and wait until the run is whole again."""
    before = run.status()
    alive = {role: nodes.of_role(role) for role in TITLES}
    old: dict[str, list[psutil.Process]] = {}
    began = after = time.time()
    struck, died = [], []
    for role in roles:
        if struck:
            time.sleep(draw.uniform(0, 2))
        if (dead := _strike(run, nodes, role, draw)) is not None:  # what one kill took along, the next cannot find
            struck.append(role)
            died.append(dead)
            after = time.time()
            if dead in alive:
                old[dead] = alive[dead]

    def whole(now: dict[str, Any]) -> bool:
        """A status that was written after each role had its processes again."""
        nonlocal after
        for role in list(old):
            there = set(nodes.of_role(role))
            if len(there) >= len(old[role]) and there - set(old[role]):
                after = time.time()
                del old[role]
        return not old and _is_whole(now) and now["at"] > after and _are_replaced(died, before, now)

    run.wait_for(whole)
    role = struck[0] if len(struck) == 1 else TWO_AT_ONCE
    return {"role": role, "roles": struck, "step": before["step"], "at": began, "seconds": time.time() - began}


def _strike(run: Run, nodes: Nodes, role: str, draw: random.Random) -> str | None:
    """Kill one of a role; which role died with it, None where there was none."""
    if role == "driver":
        run.end(signal.SIGKILL)
        run.codes.pop()
        run.start("--resume")
    elif role == "node":
        return nodes.lose_one(draw)
    else:
        there = sorted(nodes.of_role(role), key=lambda process: process.pid)
        if not there:
            return None
        draw.choice(there).kill()
    return role


def _is_whole(now: dict[str, Any]) -> bool:
    pools = [now[pool] for pool in ("generators", "references") if now.get(pool)]
    scorers = list((now.get("scorers") or {}).values())
    return (
        now.get("running", False)
        and len(pools) == 2
        and all(pool["up"] == 1 for pool in scorers)
        and all(pool["up"] == pool["wanted"] == len(pool["workers"]) for pool in pools)
        and now["replicas"] == {"RUNNING": 1}
    )


def _are_replaced(roles: list[str], before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether this status tells of a new worker where one was killed."""
    if "driver" in roles or (len(roles) > 1 and "learner" in roles):
        return bool(now["at"] > before["at"])  # all workers begin again, and count their names anew
    pools = [f"{role}s" for role in roles if f"{role}s" in ("generators", "references")]
    return all({w["name"] for w in now[p]["workers"]} != {w["name"] for w in before[p]["workers"]} for p in pools)


def _finish(run: Run) -> int:
    """Stop the run as by Ctrl-C, and have it finish a few steps later; returns its steps."""
    whole_at = run.status()["step"]
    run.wait_for(lambda now: now["step"] > whole_at + 1)  # the stop must not count as the last kill's stall
    run.end(signal.SIGINT)
    steps = run.status()["step"] + STEPS_TO_END
    run.start("--resume", "--set", f"ppo.steps={steps}")
    run.end()
    return int(steps)


def _promises(run: Run, steps: int) -> dict[str, Any]:
    summary, ledger = read_summary(run.folder), newest_ledger(run.folder)
    trained = [i for first, last in ledger["trained"] for i in range(first, last + 1)]
    given_up = ledger["quarantined"]
    return {
        "steps": steps,
        "status": summary["status"],
        "lost": summary.get("lost"),
        "trained_twice": summary.get("trained_twice"),
        "quarantined": given_up,
        "within_the_staleness_bound": all(
            row["staleness_max"] <= run.max_staleness for row in read_lines(run.folder / "metrics.jsonl")
        ),
        "every_prompt_trained_once": len(trained) == steps * run.prompts_per_step
        and sorted(trained + given_up) == list(range(len(trained) + len(given_up))),
        "exit_codes": run.codes,
    }


def _is_kept(promises: dict[str, Any]) -> bool:
    return (
        promises["status"] == "finished"
        and promises["lost"] == promises["trained_twice"] == 0
        and promises["every_prompt_trained_once"]
        and promises["within_the_staleness_bound"]
        and promises["exit_codes"][-1] == 0
    )


def _kill_summary(
    run: Run, kills: list[dict[str, Any]], number: int, steps: int | None, broken: str | None
) -> dict[str, Any]:
    times = [at for at, _ in run.step_ends]
    intervals = list(itertools.pairwise(times))
    median = statistics.median(end - begin for begin, end in intervals) if intervals else 0.0
    by_role: dict[str, Any] = {}
    for kill in kills:
        whole = kill["at"] + kill["seconds"]
        longest = max((end - begin for begin, end in intervals if end > kill["at"] and begin < whole), default=0.0)
        kill["stall"] = longest - median
    for role in sorted({kill["role"] for kill in kills}):
        of_role = [kill for kill in kills if kill["role"] == role]
        by_role[role] = {"kills": len(of_role)} | {
            f"{what}_{name}": round(of([kill[what] for kill in of_role]), 2)
            for what in ("seconds", "stall")
            for name, of in (("median", statistics.median), ("worst", max))
        }
    made = sum(len(kill["roles"]) for kill in kills)
    summary = {"asked": number, "made": made, "seconds_between_steps": median, "roles": by_role, "kills": kills}
    promises = _promises(run, steps) if steps is not None else {}
    if broken is None and made < number:
        broken = f"only {made} of {number} kills had time; raise --minutes"
    return summary | promises | {"broken": broken or (None if _is_kept(promises) else "see above")}


def _elastic(root: Path, nodes: Nodes, *models: Path) -> dict[str, Any]:
    scaled = Run(root, nodes, _config(root, "scaled", *models, generators=1, together=True))
    scaled.start()
    with scaled.watched():
        scaled.wait_for(lambda now: _is_whole(now) and now["step"] > 0)
        at_steps = []
        for generators in (3, 1):
            subprocess.run([str(COMMAND), "scale", str(scaled.folder), "--generators", str(generators)], check=True,
                           stdout=sys.stderr)  # fmt: skip
            scaled.wait_for(
                lambda now, n=generators: now["generators"]["wanted"] == n and _is_whole(now) and _all_worked(now)
            )
            at_steps.append(scaled.status()["step"])
        steps = _finish(scaled)
    fixed = Run(root, nodes, _config(root, "fixed", *models, generators=1, steps=steps, together=True))
    fixed.start()
    with fixed.watched():
        fixed.end()
    same = newest_ledger(scaled.folder) == newest_ledger(fixed.folder)
    promises = [_promises(run, steps) for run in (scaled, fixed)]
    return {
        "whole_at_steps": at_steps,
        "scaled": promises[0],
        "fixed": promises[1],
        "same_ledger": same,
        "broken": None if same and all(map(_is_kept, promises)) else "see above",
    }


def _all_worked(now: dict[str, Any]) -> bool:
    return all(worker["done"] for worker in now["generators"]["workers"])


if __name__ == "__main__":
    sys.exit(main())

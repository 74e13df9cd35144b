"""What a process leaves behind, looked at without Ray: a real process, and its log files named as Ray names them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.actors import evidence
from rlhf_ray.actors.evidence import examine
from rlhf_ray.actors.pulse import Place

PROGRAM = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=2)
def oversleep():
    print("ready", flush=True)
    time.sleep(600)
print(":job_id:01000000")
for number in range(9):
    print("line", number, "x" * 300)
oversleep()
"""


class Sleeper:
    """A process that sleeps, and where it is."""

    def __init__(self, folder: Path) -> None:
        with (folder / "worker-a-01.out").open("w") as out, (folder / "worker-a-01.err").open("w") as err:
            self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=out, stderr=err)
        self.place = Place(node_id="n", address="here", pid=self.process.pid, logs=str(folder / "worker-a-*"))
        while "ready" not in (folder / "worker-a-01.out").read_text():
            assert self.process.poll() is None


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Sleeper]:
    sleeper = Sleeper(tmp_path)
    yield sleeper
    sleeper.process.kill()
    sleeper.process.wait()


def test_a_dead_process_leaves_the_last_lines_of_its_log_shortened(sleeper: Sleeper) -> None:
    found = examine(sleeper.place, hung=False)
    assert [line[:7] for line in found.log] == ["line 6 ", "line 7 ", "line 8 ", "ready"]
    assert {len(line) for line in found.log[:-1]} == {200}
    assert found.stacks == ""
    assert sleeper.process.poll() is None, "only what hangs is ended"


def test_a_process_that_hangs_tells_what_it_is_at_and_is_ended(sleeper: Sleeper) -> None:
    assert "in oversleep" in examine(sleeper.place, hung=True).stacks
    assert sleeper.process.wait(20) == -signal.SIGKILL


def test_a_process_that_is_stopped_tells_nothing_and_is_ended(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "STACKS_SECONDS", 0.5)
    sleeper.process.send_signal(signal.SIGSTOP)
    assert examine(sleeper.place, hung=True).stacks == ""
    assert sleeper.process.wait(20) == -signal.SIGKILL


def test_one_that_is_gone_and_has_no_log_leaves_nothing(tmp_path: Path, sleeper: Sleeper) -> None:
    sleeper.process.kill()
    sleeper.process.wait()
    found = examine(sleeper.place._replace(logs=str(tmp_path / "none")), hung=True)
    assert (found.log, found.stacks) == ((), "")


def test_shared_memory_that_is_full_is_named(sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, said in ((2_000_000, "the node's /dev/shm is full (2 MB of 1000 MB free)"), (500_000_000, "")):
        usage = SimpleNamespace(total=1_000_000_000, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert examine(sleeper.place, hung=False).full_shm == said

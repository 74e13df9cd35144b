"""Workers that share a training do the same at the same step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

A_WORKER = """
import sys, torch
from rlhf_ray.roles.trl_training import _as_the_first_worker
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
print([_as_the_first_worker(mine, torch.device("cpu")) for mine in (rank == 0, rank == 1)])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_workers_give_a_notice_when_the_first_one_does(tmp_path: Path) -> None:
    """Where clocks differ, one would wait for ever for the other's share of the mean loss."""
    workers = [
        subprocess.Popen([sys.executable, "-c", A_WORKER, rank, str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        assert [worker.communicate(timeout=200)[0] for worker in workers] == [b"[True, False]\n"] * 2
    finally:
        for worker in workers:
            worker.kill()

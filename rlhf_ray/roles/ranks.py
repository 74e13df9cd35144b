"""The learner's ranks: processes that share a policy's weights and the rows of each batch.

Every rank is given the whole batch, which is small, and computes its own rows; the weights, which are not small, are
sharded. So advantages are taken over the whole batch on each rank, and all ranks decide alike.
"""

from __future__ import annotations

import socket
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import Store

from rlhf_ray.models.policy import PolicyModel
from rlhf_ray.models.sharding import shard

T = TypeVar("T")


class Ranks:
    """What one rank sees of them. Every method that talks to the others must be called by all of them, in one order.

    Example: a learner that is alone is ``Ranks()``, and each call returns what it was given.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.on_this_node = 1
        """Ranks that share this machine's cores."""

    @classmethod
    def joined(cls, store: Store, *, rank: int, size: int, device: torch.device) -> Ranks:
        """Join the others; returns when all are there.

        Args:
            store: that all of them reach.
            device: of this rank: NCCL between GPUs, gloo on CPUs.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        ranks = cls()
        ranks.rank, ranks.size = rank, size
        hosts = ranks.gather(socket.gethostname())
        ranks.on_this_node = hosts.count(hosts[rank])
        return ranks

    @property
    def first(self) -> bool:
        """Whether this rank speaks and writes for all of them."""
        return self.rank == 0

    def shard(self, policy: PolicyModel, device: torch.device) -> None:
        """Spread a policy's weights over the ranks, in place. A rank that is alone keeps it as it is: FSDP would copy
        each layer to itself.
        """
        if self.size > 1:
            shard(policy, init_device_mesh(device.type, (self.size,)))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of every rank's; without gradient."""
        if self.size > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor)
        return tensor.detach()

    def gather(self, value: T) -> list[T]:
        """Every rank's, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

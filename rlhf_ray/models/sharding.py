"""A policy whose weights are spread over ranks (FSDP2): each keeps a slice of every parameter, of its gradient and of
its optimiser state, and has a layer whole only while it computes it.

A slice is of dimension 0, as ``torch.chunk`` cuts it; the last ranks may have less, or nothing.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rlhf_ray.models.policy import PolicyModel


def shard(policy: PolicyModel, mesh: DeviceMesh) -> None:
    """Spread the weights over the ranks of a 1-D mesh, in place: the layers one by one, all else together.

    Gradients are summed over the ranks, not averaged: each rank's loss is its share of the whole batch's.
    """
    blocks = policy.language_model._no_split_modules or ()
    trunks = [trunk for trunk in (policy.language_model.base_model, policy.critic) if trunk is not None]
    layers = [module for trunk in trunks for module in trunk.modules() if type(module).__name__ in blocks]
    for module in (*layers, policy):
        # Said outright, since FSDP would leave the outermost group whole after a forward without gradient, and what a
        # checkpoint and the optimiser go by, the slices, would be out of sight.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces, not even by 1


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, all of which must ask for it; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, as a view; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

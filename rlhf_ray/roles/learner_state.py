"""A learner on disk: each rank writes the slices that it holds, and any number of ranks read them.

    learner/rank-000/     tensors.safetensors, state.json, COMPLETE
            rank-001/     the same tensors' next slices

A tensor is the slices of all ranks one after the other, along dimension 0; what is not sharded is rank 0's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_ray.checkpoint import TENSORS_FILE, check_complete, load_state, save_checkpoint
from rlhf_ray.errors import InputError
from rlhf_ray.models.sharding import own_slice
from rlhf_ray.roles.ranks import Ranks


class LearnerCopy:
    """This rank's part of a learner as it was at one step; the learner may step on before it is written.

    Args:
        before: an earlier copy that is written. Its memory is taken over where shapes are the same: on fresh memory a
            copy takes some ten times as long.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        ranks: Ranks,
        *,
        before: LearnerCopy | None = None,
    ) -> None:
        held: Mapping[str, Tensor] = {} if before is None else before._tensors
        own = {name: own_slice(t) for name, t in tensors.items() if ranks.first or isinstance(t, DTensor)}
        self._tensors: dict[str, Tensor] = {
            name: _copied(tensor.detach(), held.get(name)) for name, tensor in own.items()
        }
        self._state = {**state, "ranks": ranks.size}
        self._rank = ranks.rank

    def write(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the disk is full, or fails.
        """
        save_checkpoint(_part(folder, self._rank), tensors=self._tensors, state=self._state)


class SavedLearner:
    """What ``LearnerCopy`` wrote on all ranks, to be read on any number of them."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            InputError: a part is missing or damaged.
        """
        check_complete(_part(folder, 0))
        self.state = load_state(_part(folder, 0))
        self._folder = folder
        self._parts = [_part(folder, rank) for rank in range(self.state["ranks"])]
        for part in self._parts[1:]:
            check_complete(part)

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fill tensors, sharded over this run's ranks or not, with what was saved under their names.

        Raises:
            InputError: one is missing or has another shape; nothing is filled then.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(part / TENSORS_FILE, "pt")) for part in self._parts]
            names = [set(file.keys()) for file in files]
            holders = {name: [file for file, n in zip(files, names, strict=True) if name in n] for name in into}
            for name, tensor in into.items():
                if _shape(holders[name], name) != list(tensor.shape):
                    raise InputError(
                        f"the checkpoint {self._folder} is of another model: it has no {name} of {list(tensor.shape)}; "
                        "resume with the model and learner settings that it was written with"
                    )
            for name, tensor in into.items():
                slices = [file.get_tensor(name) for file in holders[name]]
                _fill(tensor, slices[0] if len(slices) == 1 else torch.cat(slices))

    def names(self) -> list[str]:
        """Of all tensors."""
        with safe_open(self._parts[0] / TENSORS_FILE, "pt") as file:
            return list(file.keys())


def _copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """On the CPU, contiguous."""
    if into is None or (into.shape, into.dtype) != (tensor.shape, tensor.dtype):
        into = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    return into.copy_(tensor)


def _shape(files: Sequence[Any], name: str) -> list[int] | None:
    """Of the whole tensor; None where there is none."""
    shapes = [file.get_slice(name).get_shape() for file in files]
    if len(shapes) < 2:
        return list(shapes[0]) if shapes else None
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


@torch.no_grad()
def _fill(tensor: Tensor, saved: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(saved)
        return
    mesh = tensor.device_mesh
    slices = saved.chunk(mesh.size())
    if (rank := mesh.get_local_rank()) < len(slices):
        tensor.to_local().copy_(slices[rank])


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:03d}"

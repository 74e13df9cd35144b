"""The wire form of a policy in the object store: numpy arrays, which a reader on that node maps without a copy.

Torch tensors would be copied by Ray, and bfloat16 has no numpy type, so it travels as int16 bits. A parameter that
shares its memory with another (a tied ``lm_head``) travels once and is named again on arrival.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from rlhf_ray.types import Weights


def pack_weights(weights: Weights) -> dict[str, Any]:
    """CPU tensors → ``{"arrays": {name: array}, "bfloat16": [names], "aliases": {name: first name}}``."""
    arrays: dict[str, Any] = {}
    bfloat16: list[str] = []
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        if tensor.dtype == torch.bfloat16:
            bfloat16.append(name)
            tensor = tensor.view(torch.int16)
        arrays[name] = tensor.numpy()
    return {"arrays": arrays, "bfloat16": bfloat16, "aliases": aliases}


def unpack_weights(packed: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of ``pack_weights``: views of read-only shared memory, to be copied from and dropped."""
    halves = set(packed["bfloat16"])
    with warnings.catch_warnings():
        # "The given NumPy array is not writable": it must not be; the engine copies out of it.
        warnings.simplefilter("ignore", UserWarning)
        tensors = {name: torch.from_numpy(array) for name, array in packed["arrays"].items()}
    for name in halves:
        tensors[name] = tensors[name].view(torch.bfloat16)
    for name, first in packed["aliases"].items():
        tensors[name] = tensors[first]
    return tensors

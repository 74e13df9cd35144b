"""Files of tensors as the safetensors library reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_ray import tensors_file
from rlhf_ray.tensors_file import write_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def some_of_each() -> dict[str, torch.Tensor]:
    """Odd numbers of each width, a scalar, an empty one, a transposed one, and names that JSON must escape."""
    tensors = {f"of {dtype}": (torch.randn(3, 5) * 50).to(dtype) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(0.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        'a "name" of ℵ\n': torch.ones(1, dtype=torch.int8),
    }


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_the_library_reads_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    tensors = some_of_each()
    digest = write_tensors(tmp_path / "t", tensors)
    assert digest == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()
    assert_same(load_file(tmp_path / "t"), tensors)


def test_the_file_is_as_long_as_the_librarys_own(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_of_each().items()}
    write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_pieces_of_any_size_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    tensors = some_of_each()
    whole = write_tensors(tmp_path / "whole", tensors)
    monkeypatch.setattr(tensors_file, "PIECE_BYTES", piece)
    assert write_tensors(tmp_path / "pieces", tensors) == whole
    assert_same(load_file(tmp_path / "pieces"), tensors)


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """Readers map the file into memory, and some processors refuse to read a number across its width."""
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5, dtype=torch.float64), "c": torch.ones(1)}
    write_tensors(tmp_path / "t", tensors)
    with safe_open(tmp_path / "t", "pt") as file:
        for name in tensors:
            assert file.get_tensor(name).data_ptr() % tensors[name].itemsize == 0


def test_a_parameter_is_written_as_its_value(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"weight": torch.nn.Parameter(torch.ones(2))})
    assert torch.equal(load_file(tmp_path / "t")["weight"], torch.ones(2))


def test_no_tensors_make_a_file_that_can_be_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {})
    assert load_file(tmp_path / "t") == {}

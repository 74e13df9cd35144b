"""A checkpoint is whole or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_ray.checkpoint import (
    MARKER,
    TENSORS_FILE,
    check_complete,
    latest_checkpoint,
    load_checkpoint,
    mark_complete,
    prune,
    save_checkpoint,
)
from rlhf_ray.errors import InputError

TENSORS = {
    "weight": torch.tensor([1.5, -2.25]),
    "half": torch.tensor([0.1], dtype=torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
STATE = {"version": 7, "nested": {"ids": [1, 2]}, "nothing": None}


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors=TENSORS, state=STATE)
    tensors, state = load_checkpoint(tmp_path / "c")
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_checkpoint_may_hold_state_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors={}, state=STATE)
    assert load_checkpoint(tmp_path / "c") == ({}, STATE)


def test_a_folder_without_marker_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors=TENSORS, state=STATE)
    (tmp_path / "c" / MARKER).unlink()
    with pytest.raises(InputError, match="not complete"):
        load_checkpoint(tmp_path / "c")


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors=TENSORS, state=STATE)
    path = tmp_path / "c" / TENSORS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tensors\.safetensors is missing or damaged"):
        load_checkpoint(tmp_path / "c")


def test_a_folder_that_others_wrote_is_checked_without_being_loaded(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "weights.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="not complete"):
        check_complete(tmp_path / "c")
    mark_complete(tmp_path / "c")
    check_complete(tmp_path / "c")
    (tmp_path / "c" / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"weights\.safetensors is missing or damaged"):
        check_complete(tmp_path / "c")


def test_saving_again_replaces_the_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors=TENSORS, state=STATE)
    save_checkpoint(tmp_path / "c", tensors={}, state={"version": 8})
    assert load_checkpoint(tmp_path / "c") == ({}, {"version": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_failing_write_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", tensors={}, state=STATE)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path / "c", tensors=TENSORS, state={"no JSON": object()})
    assert load_checkpoint(tmp_path / "c") == ({}, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_write_left_behind_is_in_nobodys_way(tmp_path: Path) -> None:
    """Killed before the rename, or between the two of them."""
    for left_over in ("c.tmp", "c.old"):
        save_checkpoint(tmp_path / left_over, tensors=TENSORS, state={"version": 1})
        mark_complete(tmp_path / left_over)
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path / "c", tensors=TENSORS, state=STATE)
    assert load_checkpoint(tmp_path / "c")[1] == STATE
    assert [folder.name for folder in tmp_path.iterdir()] == ["c"]


def test_the_latest_is_the_last_marked_one(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / f"step-{step:06d}", tensors={}, state={"step": step})
    (tmp_path / "step-000030" / MARKER).unlink()
    (tmp_path / "step-000040.tmp").mkdir()
    (tmp_path / "step-000040.tmp" / MARKER).write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000020"


def test_a_folder_of_parts_is_whole_only_once_all_its_parts_are(tmp_path: Path) -> None:
    step = tmp_path / "step-000010"
    save_checkpoint(step / "learner", tensors=TENSORS, state={})
    (step / "pipeline").mkdir()
    with pytest.raises(InputError, match="pipeline in it has no COMPLETE"):
        mark_complete(step)
    assert latest_checkpoint(tmp_path) is None
    save_checkpoint(step / "pipeline", tensors={}, state={})
    mark_complete(step)
    assert latest_checkpoint(tmp_path) == step


def test_pruning_keeps_the_last_whole_ones_and_anything_newer(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path / f"step-{step}", tensors={}, state={})
    (tmp_path / "step-2" / MARKER).unlink()  # an interrupted write, older than what is kept
    (tmp_path / "step-5" / MARKER).unlink()  # perhaps being written right now
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4", "step-5"]


def test_pruning_removes_nothing_while_nothing_is_whole(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    prune(tmp_path, keep=1)
    assert (tmp_path / "step-1").is_dir()

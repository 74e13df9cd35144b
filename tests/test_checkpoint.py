"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
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
    marked_checkpoints,
    prune,
    save_checkpoint,
    set_aside_after,
)
from rlhf_ray.errors import CheckpointError, InputError

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


# Damage


def save_step(root: Path, step: int) -> Path:
    """A checkpoint as a run writes it: folders that each have their own marker, then its own."""
    folder = root / f"step-{step:06d}"
    for rank in range(2):
        save_checkpoint(folder / "learner" / f"rank-{rank:03d}", tensors=TENSORS, state={"version": step})
    mark_complete(folder / "learner")
    save_checkpoint(folder / "pipeline", tensors={}, state={"step": step})
    mark_complete(folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def two_steps(tmp_path: Path) -> tuple[Path, Path]:
    return save_step(tmp_path, 10), save_step(tmp_path, 20)


def test_a_manifest_cut_at_any_byte_is_named_and_the_checkpoint_before_it_taken(
    two_steps: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = two_steps
    manifests = [path for path in files_of(newer) if path.name == MARKER]
    assert len(manifests) == 5
    for manifest in manifests:
        content = manifest.read_bytes()
        inner = manifest.parent != newer  # its own hash stands in the manifest above it
        for length in range(len(content) - (not inner)):  # of the outermost the final line break is no loss
            manifest.write_bytes(content[:length])
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="rlhf_ray"):
                assert latest_checkpoint(newer.parent) == older, (manifest, length)
            (warning,) = caplog.messages
            assert f"{newer} is passed over: {manifest}" in warning
        manifest.write_bytes(content)
    assert latest_checkpoint(newer.parent) == newer


def test_any_flipped_bit_or_cut_in_any_file_is_noticed(two_steps: tuple[Path, Path]) -> None:
    older, newer = two_steps
    draw = random.Random(0)
    for path in files_of(newer):
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            assert latest_checkpoint(newer.parent) == older, path
            path.write_bytes(content[: draw.randrange(len(content) - 1)])
            assert latest_checkpoint(newer.parent) == older, path
        path.unlink()
        assert latest_checkpoint(newer.parent) == older, path
        path.write_bytes(content)
    assert latest_checkpoint(newer.parent) == newer


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"state.json": 1}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_called_damaged(tmp_path: Path, content: bytes) -> None:
    save_checkpoint(tmp_path / "c", tensors={}, state=STATE)
    (tmp_path / "c" / MARKER).write_bytes(content)
    with pytest.raises(InputError, match=r"COMPLETE is damaged \(.*\); resume from an earlier checkpoint"):
        check_complete(tmp_path / "c")


def test_where_all_are_damaged_there_is_none(two_steps: tuple[Path, Path]) -> None:
    for folder in two_steps:
        (folder / "pipeline" / "state.json").write_text("{}")
    root = two_steps[0].parent
    assert latest_checkpoint(root) is None
    assert marked_checkpoints(root) == list(two_steps), "they are still there to be looked at"


def test_a_damaged_checkpoint_that_was_passed_over_does_not_have_the_next_ones_pruned(
    two_steps: tuple[Path, Path],
) -> None:
    older, newer = two_steps
    root = older.parent
    (newer / "pipeline" / "state.json").write_text("{}")
    set_aside_after(older)
    assert [folder.name for folder in sorted(root.iterdir())] == ["step-000010", "step-000020.damaged"]
    next_one = save_step(root, 15)
    prune(root, keep=1)
    assert [folder.name for folder in sorted(root.iterdir())] == ["step-000015", "step-000020.damaged"]
    assert latest_checkpoint(root) == next_one
    save_step(root, 25)
    prune(root, keep=1)
    assert [folder.name for folder in root.iterdir()] == ["step-000025"]


# A full disk


@pytest.mark.parametrize(
    ("tensors", "state"),
    [({"weight": torch.zeros(4096)}, STATE), ({}, {"long": "x" * 10_000})],
    ids=["tensors", "state"],
)
def test_a_disk_that_takes_no_more_is_named_with_the_remedy_and_nothing_half_written_is_left(
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    state: dict[str, object],
    largest_file: Callable[[int], AbstractContextManager[None]],
) -> None:
    save_checkpoint(tmp_path / "c", tensors={}, state=STATE)
    with largest_file(4096), pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "c", tensors=tensors, state=state)
    assert str(caught.value).startswith(f"{tmp_path / 'c'} could not be written (")
    assert str(caught.value).endswith("free space on its disk, or set output_dir to a larger one")
    assert load_checkpoint(tmp_path / "c") == ({}, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_marker_that_cannot_be_written_leaves_the_folder_unmarked(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "state.json").write_text("{}")
    with largest_file(10), pytest.raises(CheckpointError, match="could not be written"):
        mark_complete(tmp_path / "c")
    with pytest.raises(InputError, match="not complete"):
        check_complete(tmp_path / "c")


def test_the_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("no space")))
    assert isinstance(error, CheckpointError)
    assert str(error) == "no space"

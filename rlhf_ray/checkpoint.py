"""Checkpoints that are whole or not there: write under a temporary name, fsync, rename, then the marker.

    step-000010/             a checkpoint of a run: folders that each have their own marker, then its own marker
      learner/               a folder of each rank: tensors.safetensors, state.json, COMPLETE; its own COMPLETE
      pipeline/              state.json, COMPLETE
      COMPLETE               written last

``COMPLETE`` holds the SHA-256 of what stands beside it. Tensors are safetensors and the rest is JSON: reading a
checkpoint never runs code. The newest one that is whole by its hashes is the one to go on from; a damaged one is named
and passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlhf_ray.errors import CheckpointError, InputError
from rlhf_ray.tensors_file import write_tensors

log = logging.getLogger("rlhf_ray.checkpoint")

MARKER = "COMPLETE"
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"

_TEMPORARY = ".tmp"
_REPLACED = ".old"
_SET_ASIDE = ".damaged"


def save_checkpoint(folder: Path, *, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``folder``, in place of what may be there, and mark it complete.

    Args:
        tensors: dense, on any device.
        state: what JSON can hold.

    Raises:
        CheckpointError: the disk is full, or fails; nothing half-written is left.
    """
    with _disk_failures_named(folder), replaced_folder(folder) as temporary:
        digests = {TENSORS_FILE: write_tensors(temporary / TENSORS_FILE, tensors)} if tensors else {}
        (temporary / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    mark_complete(folder, digests)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_checkpoint`` was given, on the CPU.

    Raises:
        InputError: no marker, or a file that is not the one that was marked.
    """
    check_complete(folder)
    tensors = load_file(folder / TENSORS_FILE) if (folder / TENSORS_FILE).is_file() else {}
    return tensors, load_state(folder)


def load_state(folder: Path) -> dict[str, Any]:
    """The state alone, of a checkpoint that has been checked."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


def check_complete(folder: Path) -> None:
    """Read every file that the marker names, and in folders inside it every file that theirs name.

    Raises:
        InputError: no marker, one that is damaged, or a file that is not the one that was marked.
    """
    for name, digest in _marked_files(folder).items():
        path = folder / name
        try:
            whole = path.is_file() and _sha256(path) == digest
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); resume from an earlier checkpoint") from error
        if not whole:
            raise InputError(f"{path} is missing or damaged (its SHA-256 differs); resume from an earlier checkpoint")
        if path.name == MARKER:
            check_complete(path.parent)


def _marked_files(folder: Path) -> dict[str, str]:
    """Name → SHA-256 of what the marker of ``folder`` names."""
    marker = folder / MARKER
    if not marker.is_file():
        raise InputError(f"the checkpoint {folder} is not complete: it has no file {MARKER}; resume from another one")
    try:
        digests = json.loads(marker.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{marker} is damaged ({error}); resume from an earlier checkpoint") from error
    names_files = isinstance(digests, dict) and digests and all(isinstance(d, str) for d in digests.values())
    if not names_files:
        raise InputError(f"{marker} is damaged (it names no files); resume from an earlier checkpoint")
    return dict(digests)


def mark_complete(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Say that all of ``folder`` is written: readers trust the marker alone.

    A folder inside it counts by its own marker; one that has none is an error, since it is not whole.

    Args:
        known: name → SHA-256 of files that need not be read for it.

    Raises:
        InputError: a folder inside has no marker.
        CheckpointError: the disk is full, or fails.
    """
    digests: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        part = path / MARKER if path.is_dir() else path
        if not part.is_file():
            raise InputError(f"{folder} cannot be marked complete: {path} in it has no {MARKER}")
        if part != folder / MARKER:
            name = str(part.relative_to(folder))
            digests[name] = known.get(name) or _sha256(part)
    temporary = folder / f".{MARKER}{_TEMPORARY}"
    with _disk_failures_named(folder):
        temporary.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        _fsync(temporary)
        temporary.rename(folder / MARKER)
        _fsync(folder)


def marked_checkpoints(root: Path) -> list[Path]:
    """The folders in ``root`` that are marked complete, by name; none of their files is read."""
    if not root.is_dir():
        return []
    return sorted(
        folder
        for folder in root.iterdir()
        if (folder / MARKER).is_file() and folder.suffix not in (_TEMPORARY, _REPLACED, _SET_ASIDE)
    )


def latest_checkpoint(root: Path) -> Path | None:
    """The last folder in ``root``, by name, that is whole: every file of it is read. None if there is none.

    A warning names each damaged one that is passed over, and what is wrong with it.
    """
    for folder in reversed(marked_checkpoints(root)):
        try:
            check_complete(folder)
        except InputError as error:
            log.warning("%s is passed over: %s", folder, error)
        else:
            return folder
    return None


def set_aside_after(start: Path) -> None:
    """Take the checkpoints that are newer than ``start`` out of the way of a run that goes on from it.

    They are damaged: counted as the newest ones, they would have the run's own pruned away. They keep their content
    under another name until the run is past them.
    """
    for folder in marked_checkpoints(start.parent):
        if folder.name > start.name:
            aside = folder.with_name(folder.name + _SET_ASIDE)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune(root: Path, keep: int) -> None:
    """Remove all but the ``keep`` last complete checkpoints, and what older interrupted writes have left."""
    kept = marked_checkpoints(root)[-keep:]
    if not kept:
        return
    for folder in root.iterdir():
        if folder.is_dir() and folder not in kept and folder.name < kept[-1].name:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                log.warning("%s is no longer needed and could not be removed: %s", folder, error)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty temporary folder that takes the place of ``folder`` when the block ends without an error.

    Its files are on disk before it gets the name. What had the name before is removed last.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(folder.name + suffix) for suffix in (_TEMPORARY, _REPLACED))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _fsync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _disk_failures_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written ({error}); free space on its disk, or set output_dir to a larger one"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

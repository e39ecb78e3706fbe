"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong run.

A checkpoint is a directory ``step-00000010`` with ``<name>.safetensors`` files, ``state.json``, whatever the
caller adds, and ``manifest.json`` with the size and SHA-256 of every one of them. It is written under a name
that begins with a dot, brought to the disk, and renamed; so it is whole or absent. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mulligan.errors import UserError
from mulligan.files import fsync_path, hash_file, is_alive, reason, strict_json
from mulligan.state import (
    load_model_tensors,
    model_tensors,
    pack_optimizer,
    rng_state,
    set_rng_state,
    unpack_optimizer,
)

__all__ = [
    "Checkpoint",
    "hash_file",
    "list_checkpoints",
    "load_checkpoint",
    "load_model_tensors",
    "model_tensors",
    "pack_optimizer",
    "read_checkpoint",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "unpack_optimizer",
]

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP = re.compile(r"step-(\d{8,})")
# saving: not yet whole; deleting: no longer whole; replaced: whole, and put aside while the same step is saved anew
_HIDDEN = re.compile(r"\.(saving|deleting|replaced)-(\d+)-(step-(\d{8,}))")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: what :func:`save_checkpoint` was given, the tensors on the CPU."""

    step: int
    path: Path
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


# --- saving ---------------------------------------------------------------------------------------------


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    files: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``root/step-<step>`` so that at every instant the newest complete checkpoint survives a kill.

    Only one process may save into ``root`` at a time. What a killed one left behind is cleared away.

    Args:
        root: made when absent.
        step: a step that was saved before is replaced.
        tensors: ``{"model": {...}}`` becomes ``model.safetensors``; any device and layout.
        state: JSON-able; floats keep every bit, tuples come back as lists.
        keep: how many checkpoints up to this step stay; later steps are not touched.
        files: called with the unfinished directory, to write further files or folders into it.

    Returns:
        The checkpoint's directory.

    Raises:
        UserError: a full disk or another OSError (what existed is then untouched and nothing of the new
            checkpoint stays), or a state that is not strict JSON, such as one with a NaN.
    """
    if keep < 1 or step < 0:
        raise UserError(f"a checkpoint needs keep >= 1 and step >= 0, not keep={keep}, step={step}")
    name = f"step-{step:08d}"
    final, aside = root / name, root / f".saving-{os.getpid()}-{name}"
    text = strict_json(dict(state), f"{final}/{STATE}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_leavings(root)
        aside.mkdir()
        for key, group in tensors.items():
            save_file(_writable(group), aside / f"{key}.safetensors")
        (aside / STATE).write_text(text, encoding="utf-8")
        if files is not None:
            files(aside)
        _write_manifest(aside, step, list(tensors))
        _put_in_place(aside, final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final}: cannot save: {reason(error)}; earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already unless something failed
    try:
        _clear_leavings(root)  # the former save of this step
        _prune(root, step, keep)
    except OSError as error:
        raise UserError(f"{final} is saved, but an older one cannot be deleted: {reason(error)}") from error
    return final


def _writable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors demands."""
    out: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        out[name] = plain
    return out


def _write_manifest(path: Path, step: int, names: list[str]) -> None:
    """Hash every file, write the manifest last, and bring all of it to the disk."""
    entries = sorted(path.rglob("*"))
    files = {
        str(e.relative_to(path)): {"bytes": e.stat().st_size, "sha256": hash_file(e)} for e in entries if e.is_file()
    }
    body = {"format": FORMAT, "step": step, "tensors": names, "files": files}
    manifest = path / MANIFEST
    manifest.write_text(json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n", encoding="utf-8")
    for entry in (*entries, manifest, path):
        fsync_path(entry)


def _digest(body: Mapping[str, Any]) -> str:
    """The manifest's hash of its own content, so that a flipped bit in a hash is not taken for a damaged file."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _put_in_place(aside: Path, final: Path) -> None:
    """Rename the finished directory to its name.

    A directory cannot be renamed onto a full one, so a former save of the step first gets a ``.replaced`` name.
    A kill between the two renames leaves it there, where :func:`list_checkpoints` finds it.
    """
    former = _hidden("replaced", final)
    replaces = final.exists()
    if replaces:
        final.rename(former)
    try:
        aside.rename(final)
    except OSError:
        if replaces:
            former.rename(final)
        raise
    fsync_path(final.parent)


def _hidden(kind: str, path: Path) -> Path:
    return path.with_name(f".{kind}-{os.getpid()}-{path.name}")


def _delete(path: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a half-deleted one is never taken for a checkpoint."""
    doomed = path.rename(_hidden("deleting", path))
    fsync_path(path.parent)
    shutil.rmtree(doomed)


def _prune(root: Path, step: int, keep: int) -> None:
    """Delete all but the last ``keep`` checkpoints up to ``step``.

    A directory without a manifest is neither counted nor deleted: it is not ours, or it is evidence.
    """
    older = [path for s, path in list_checkpoints(root) if s <= step and (path / MANIFEST).exists()]
    for path in older[:-keep]:
        _delete(path)


def _clear_leavings(root: Path) -> None:
    """Remove what killed writers left, and give back its name to a checkpoint that was about to be replaced."""
    for path in sorted(root.glob(".*")):
        match = _HIDDEN.fullmatch(path.name)
        if not match or is_alive(int(match[2])):
            continue
        if match[1] == "replaced" and not (root / match[3]).exists():
            path.rename(root / match[3])
            fsync_path(root)
        else:
            shutil.rmtree(path)


# --- loading --------------------------------------------------------------------------------------------


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """``(step, directory)`` of every checkpoint in ``root``, by ascending step, verified or not.

    Empty when ``root`` is absent. The directory of a step whose replacement was cut short begins with a dot.

    Raises:
        UserError: ``root`` cannot be read.
    """
    found: dict[int, Path] = {}
    try:
        names = sorted(root.iterdir(), reverse=True) if root.exists() else []
    except OSError as error:
        raise UserError(f"{root}: cannot list checkpoints: {reason(error)}") from error
    for path in names:  # "step-..." sorts after ".replaced-...", so in reverse it comes first and wins
        if match := _STEP.fullmatch(path.name):
            found[int(match[1])] = path
        elif (match := _HIDDEN.fullmatch(path.name)) and match[1] == "replaced":
            found.setdefault(int(match[4]), path)
    return sorted(found.items())


def load_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint in ``root``, or None when there is none at all.

    Every hash is verified before anything is loaded. A damaged newest checkpoint is an error, never a silent
    step back to an earlier one: whoever resumes should know what was lost.

    Raises:
        UserError: the damaged or missing file and, when an earlier checkpoint is intact, which directory to
            delete in order to go on from it.
    """
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        return None
    newest = checkpoints[-1][1]
    try:
        return read_checkpoint(newest)
    except UserError as error:
        in_the_way = [str(newest)]
        for _, path in reversed(checkpoints[:-1]):
            if _is_intact(path):
                raise UserError(f"{error}; to go on from {path} (intact), delete {', '.join(in_the_way)}") from error
            in_the_way.append(str(path))
        raise UserError(f"{error}; no earlier checkpoint in {root} is intact") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and load the checkpoint in one directory.

    Raises:
        UserError: the first file that is missing, damaged or unreadable.
    """
    manifest = _verified(path)
    tensors = {name: load_file(path / f"{name}.safetensors") for name in manifest["tensors"]}
    return Checkpoint(manifest["step"], path, tensors, json.loads((path / STATE).read_text(encoding="utf-8")))


def _is_intact(path: Path) -> bool:
    try:
        _verified(path)
    except UserError:
        return False
    return True


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a directory all of whose files have the recorded size and hash."""
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                raise UserError(f"{file} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(f"{file} is damaged: {file.stat().st_size} bytes in place of {entry['bytes']}")
            if hash_file(file) != entry["sha256"]:
                raise UserError(f"{file} is damaged: its hash is not the one in {MANIFEST}")
        except OSError as error:
            raise UserError(f"{file}: cannot read: {reason(error)}") from error
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing, so {path.name} is no complete checkpoint") from error
    except OSError as error:
        raise UserError(f"{file}: cannot read: {reason(error)}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{file} is damaged: {reason(error)}") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise UserError(f"{file} is damaged: it does not match its own hash")
    if manifest["format"] != FORMAT:
        raise UserError(f"{file} has format {manifest['format']}; this version of Mulligan reads format {FORMAT}")
    if not path.name.endswith(f"step-{manifest['step']:08d}"):
        raise UserError(f"{file} is of step {manifest['step']}; the directory was renamed")
    return manifest

"""Files that are whole or absent: strict JSON, content hashes, and writes that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulligan.errors import UserError


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strict_json(value: Any, what: str, *, indent: int | None = None) -> str:
    """``value`` as JSON that reads back equal, in the given key order; floats keep every bit.

    Tuples become lists. Nothing else is converted: json alone would write NaN (which is not JSON) and
    would turn the key ``1`` into ``"1"``.

    Args:
        what: how an error names the whole value, for example a file name.

    Raises:
        UserError: a non-finite float, a key that is not a string, or a type that JSON lacks; the message
            names the place, such as ``metrics.jsonl: kl is nan``.
    """
    problem = _not_json(value, "")
    if problem:
        raise UserError(f"{what}: {problem}")
    return json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)


def _not_json(value: Any, place: str) -> str | None:
    """What is wrong with the first part of ``value`` that JSON cannot hold, or None."""
    if value is None or isinstance(value, str | int):  # bool is an int
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place or 'value'} is {value}; only finite numbers are kept"
    if isinstance(value, list | tuple):
        kinds = set(map(type, value))
        # Tokens and log-probs are most of a log: looked at one by one here they took a third of its time.
        if kinds <= {int, str} or (kinds == {float} and all(map(math.isfinite, value))):
            return None
        return next((p for i, v in enumerate(value) if (p := _not_json(v, f"{place}[{i}]"))), None)
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{place or 'value'} has the key {key!r}; keys must be strings"
            if problem := _not_json(item, f"{place}.{key}" if place else key):
                return problem
        return None
    return f"{place or 'value'} is a {type(value).__name__}; JSON holds numbers, strings, lists and dicts"


def fsync_path(path: Path) -> None:
    """Bring a file's bytes, or a directory's entries, to the disk.

    Raises:
        OSError: as the system says; a full disk may show here first.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """An error's cause in one line, without the errno and the path that ``str(OSError)`` adds."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file by writing its sibling ``.<name>.<pid>`` and renaming that, so it is whole or as before.

    Args:
        path: the file; its directory is made when absent.
        write: called once with the sibling's path.

    Raises:
        UserError: the disk is full, or another OSError; the message names ``path``.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        fsync_path(aside)
        aside.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # it is gone after the rename
            aside.unlink()


def is_alive(pid: int) -> bool:
    """Whether another process of this number runs on this machine. This process itself does not count."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""What a user's own Python file defines: the user's code, run as it is."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from mulligan.errors import UserError, nearest


def load_from_file(key: str, text: str) -> Any:
    """What ``./file.py:name`` names; the file is run as Python.

    Args:
        key: the setting that names it, for messages.

    Raises:
        UserError: no such file or name, or the file fails.
    """
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser()
    if not file or not name.isidentifier():
        raise UserError(f"{key}: {text!r} is no './file.py:function'")
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"mulligan_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{key}: {path} fails: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UserError(f"{key}: {path} has no '{name}'{nearest(name, own)}")
    return getattr(module, name)

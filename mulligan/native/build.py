"""Building the C++ beside this file: once, by the machine's own compiler, into the user's cache.

They are plain C functions on the numbers of tensors, so that they build in seconds and need nothing but a compiler.
What is kept is found again by its source, the compiler and the processor, since it is compiled for this one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from mulligan.errors import UserError

KEY = "model.kernels"  # the setting that asks for them, for messages
DTYPES = (torch.float32, torch.bfloat16)
_FOLDER = Path(__file__).parent
_SOURCES = ("decode.cpp", "trees.cpp")
# No -ffast-math: NaN has to arrive where it is reported, and it would change how the whole process rounds tiny numbers.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-shared")


@cache
def library() -> ctypes.CDLL:
    """The functions; built where they are not there yet.

    Raises:
        UserError: there is no compiler, it fails, or there is nowhere to keep what it makes.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise UserError(f"{KEY}: there is no C++ compiler (c++, g++ or clang++, or CXX)")
    command = [*compiler.split(), *_FLAGS, *_openmp()]
    known = [each.read_text() for each in sorted(_FOLDER.glob("*.cpp")) + sorted(_FOLDER.glob("*.h"))]
    known += [*command, _run([*compiler.split(), "--version"]), platform.machine(), _processor()]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mulligan"
    file = home / f"kernels-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.so"
    try:
        if not file.exists():
            home.mkdir(parents=True, exist_ok=True)
            # Beside it and then renamed: another process may be at the same.
            with tempfile.TemporaryDirectory(dir=home) as folder:
                made = Path(folder) / file.name
                _run([*command, *(str(_FOLDER / name) for name in _SOURCES), "-o", str(made)])
                made.replace(file)
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise UserError(f"{KEY}: {file}: {error.strerror or error}") from error


def _openmp() -> list[str]:
    """Of what threads are made: torch's own runtime where it brings one, since two keep each other waiting."""
    if platform.system() != "Linux":
        return ["-fopenmp-simd"]
    return ["-fopenmp", *map(str, sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"{KEY}: {command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        raise UserError(f"{KEY}: {command[0]} fails: {lines[0] if lines else error}") from error
    return done.stdout

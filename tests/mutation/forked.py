"""Tests against a changed package, each in a forked child: nothing is ever written into the tree.

The parent imports the heavy libraries once, and of the package nothing. A child gets the changed modules from
an import hook, imports the package and the tests anew, and runs pytest in its own process.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mulligan"
HEAVY = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.granite.modeling_granite",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_fast",
    "pydantic.fields",
    "rich.console",
    "safetensors.torch",
    "tokenizers",
    "typer",
)
Changed = Mapping[str, CodeType]  # name of a module -> what it is in the child


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended. ``exit`` is pytest's exit status (0: all passed, 1: a test failed, 2 to 5: something
    else is wrong), minus a signal's number, or None: the time limit was reached."""

    exit: int | None
    output: str

    @property
    def killed(self) -> bool:
        """Whether anything told the changed package from the right one."""
        return self.exit != 0

    @property
    def failed(self) -> list[str]:
        """The ids of the tests that failed."""
        lines = (line.split(" - ")[0].split() for line in self.output.splitlines())
        return [words[1] for words in lines if len(words) == 2 and words[0] in ("FAILED", "ERROR")]


def preload() -> None:
    """Imports what every child needs, on one thread, so that forking is safe."""
    for name in HEAVY:
        importlib.import_module(name)
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # Neither random nor shrunk: a child says only whether some test fails. Nothing is stored.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", database=None, phases=phases, derandomize=True, deadline=None)
    hypothesis.settings.load_profile("mutation")
    assert PACKAGE not in sys.modules, "a child would see the parent's modules"
    gc.freeze()  # what is here already is no garbage: no child need look through it


def module_of(file: Path) -> str:
    """``mulligan/learner/update.py`` -> ``mulligan.learner.update``."""
    parts = file.resolve().relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def attempt(changed: Changed, tests: Sequence[str], limit: float) -> Outcome:
    """Runs the tests, up to the first that fails, with some modules changed.

    Args:
        tests: files, folders or node ids, in the order in which they run.
        limit: seconds.
    """
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            _child(changed, tests, file.fileno())
        exit = _wait(pid, time.monotonic() + limit)
        file.seek(0)
        return Outcome(exit, file.read().decode(errors="replace"))


def _wait(pid: int, deadline: float) -> int | None:
    done, status = 0, 0
    try:
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None
    finally:
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _child(changed: Changed, tests: Sequence[str], output: int) -> NoReturn:
    status = 70  # none of pytest's
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        import pytest

        class Ahead:
            """pytest may rewrite the asserts of a package that brings a plugin, and then loads it from the disk: the
            changed modules have to be found before that."""

            def pytest_load_initial_conftests(self) -> None:
                sys.meta_path.insert(0, Finder(changed))

        # The libraries that the parent imported are those of whose plugins pytest would have liked to rewrite asserts.
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*options, f"--rootdir={ROOT}", *tests], plugins=[Ahead()]))
    except BaseException:  # it must not go up into the parent's own code, of which this is a copy
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Finder(MetaPathFinder):
    """Gives the changed modules; every other is found as always."""

    def __init__(self, changed: Changed) -> None:
        self.changed = changed

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        code = self.changed.get(fullname)
        if code is None:
            return None
        return spec_from_file_location(fullname, code.co_filename, loader=_Loader(fullname, code))


class _Loader(SourceFileLoader):
    """Runs code that is on no disk, and so leaves no byte code behind either."""

    def __init__(self, fullname: str, code: CodeType) -> None:
        super().__init__(fullname, code.co_filename)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code

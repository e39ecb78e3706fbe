"""The verifier's worker: a process that imports, warms up, is closed in (``sandbox.py``) and then answers orders.

It runs as a script, so that it can keep ``mulligan/__init__.py`` and with it torch out of a process that has to be
small and quick to start. Orders and answers are frames on one socket: four bytes of length, then JSON. Whatever else
the code in here prints goes to /dev/null.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Everything that a worker may be asked to run. A module may have a `warm()`, which is called once before the worker is
# closed in and has to reach whatever the function imports or opens later.
FUNCTIONS: dict[str, str] = {
    "judge": "mulligan.verify.judge:judge",
    "gym": "mulligan.tasks.gym_score:score",
}

# Once closed in, nothing can be imported, and sympy imports parts of itself where it first needs them. These packages
# are imported whole; the others want numpy, torch or pytest, which take more memory than a worker has.
_SYMPY = (
    "assumptions calculus codegen combinatorics concrete discrete functions geometry integrals logic matrices ntheory "
    "physics.units polys series sets simplify solvers tensor vector"
)
_UNWANTED = re.compile(r"\.(tests?|benchmarks|testutil)(\.|$)|_doc$")  # the last build documentation when imported
_WATCH_SECONDS = 0.5
_HEADER = 4  # bytes
_MESSAGE = 200  # characters of an error's text


def main() -> None:
    """Arguments: the number of the socket, the parent's process id."""
    channel, parent = int(sys.argv[1]), int(sys.argv[2])
    order = read_frame(lambda size: os.read(channel, size))
    sys.path[:] = order["path"]
    package = Path(order["package"])
    _bare_package("mulligan", package)

    from mulligan.verify import sandbox

    sandbox.die_with_parent(parent)
    if channel != sandbox.CHANNEL:
        os.dup2(channel, sandbox.CHANNEL)
        os.close(channel)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(256 * 2**10)
    threading.Thread(target=_watch, args=(sandbox.CHANNEL, parent, order["memory"]), daemon=True).start()
    try:
        function = _load(order["function"], package)
        on = sandbox.lock(order["memory"])
    except Exception as error:
        _answer({"error": _told(error)})
        os._exit(1)
    _answer({"ready": True, "layers": on})
    while True:
        try:
            job = read_frame(lambda size: os.read(sandbox.CHANNEL, size))
        except EOFError:
            os._exit(0)
        sandbox.refused.clear()
        _answer(_run(function, job) | {"job": job["job"], "refused": sandbox.refused[:8], "peak_memory": _peak()})


def read_frame(read: Callable[[int], bytes], limit: int = 2**31) -> Any:
    """One frame's JSON.

    Args:
        read: gives at most as many bytes as it is asked for, none when the other side is gone.
        limit: of the length in bytes.

    Raises:
        EOFError: the other side is gone.
        ValueError: this is no frame.
    """
    size = int.from_bytes(_exactly(read, _HEADER), "big")
    if size > limit:
        raise ValueError(f"a frame of {size} bytes")
    return json.loads(_exactly(read, size))


def frame(message: Mapping[str, Any]) -> bytes:
    """A message as bytes. JSON in ASCII, so that lone surrogates pass."""
    text = json.dumps(message).encode("ascii")
    return len(text).to_bytes(_HEADER, "big") + text


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        part = read(min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _answer(message: Mapping[str, Any]) -> None:
    left = memoryview(frame(message))
    while left:
        left = left[os.write(3, left) :]


def _run(function: Callable[..., Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """``value``, or ``failure`` and whether another worker may do better (``again``)."""
    try:
        value = function(**job["arguments"])
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if value is None:
            return {"failure": "no result", "again": False}
        json.dumps(value)
        return {"value": value}
    except MemoryError:
        return {"failure": "out of memory", "again": True}
    except RecursionError:  # what it interrupted may have been left half done
        return {"failure": "too deeply nested", "again": True}
    except BaseException as error:  # math-verify's own timeout is one, and so is sys.exit
        return {"failure": _told(error), "again": not isinstance(error, Exception)}


def _told(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())[:_MESSAGE]
    except BaseException:  # a message that cannot be made
        text = ""
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _load(function: str, package: Path) -> Callable[..., Any]:
    """A function of the form ``module:name``, warm."""
    place, _, attribute = function.partition(":")
    warnings.simplefilter("ignore")
    parent = place.rpartition(".")[0]
    if parent.startswith("mulligan.") and parent not in sys.modules:
        _bare_package(parent, package.joinpath(*parent.split(".")[1:]))
    module = importlib.import_module(place)
    if hasattr(module, "warm"):
        module.warm()
    if "sympy" in sys.modules:
        _import_all("sympy", _SYMPY.split())
    gc.collect()
    gc.freeze()
    return getattr(module, attribute)


def _bare_package(name: str, path: Path) -> None:
    """A package without its ``__init__``, which would import torch."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def _import_all(library: str, packages: Sequence[str]) -> None:
    for package in packages:
        found = importlib.import_module(f"{library}.{package}")
        for module in pkgutil.walk_packages(found.__path__, f"{found.__name__}."):
            if not _UNWANTED.search(module.name):
                try:
                    importlib.import_module(module.name)
                except Exception:  # it wants an optional package, so it is not reached either
                    continue


def _watch(channel: int, parent: int, memory: int) -> None:
    """End this process when the parent is gone, and on macOS when it has grown too large.

    It is there for code that loops in Python; in C code that holds the interpreter it does not run, and there the
    kernel ends the worker with its parent (Linux) or when its CPU time is spent.
    """
    poll = select.poll()
    poll.register(channel, 0)  # nothing but that the other side hung up
    while True:
        hung_up = poll.poll(1000 * _WATCH_SECONDS)
        if hung_up or os.getppid() != parent or (sys.platform == "darwin" and _peak() > memory):
            os._exit(0)


def _peak() -> int:
    """Bytes. On Linux it starts from the parent's own peak, which is why the parent measures by itself there."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()

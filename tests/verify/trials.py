"""What workers are made to do in the tests of pool and sandbox: `run` is sent to them in place of a judge."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None)
# Looked up here, since the audit hook refuses it later; the calls themselves pass by it.
CALLS = {name: getattr(LIBC, name) for name in ("fork", "mkdir", "kill", "execv", "ptrace", "socketpair", "dup")}
PAIR = (ctypes.c_int * 2)()
MEMSET = ctypes.memset
_calls = itertools.count(1)


def run(what: str, **keywords: Any) -> Any:
    return globals()[what](**keywords)


def echo(value: Any) -> Any:
    return value


def facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "environment": dict(os.environ),
        "torch": "torch" in sys.modules,
        "path": sys.path,
        "hash": hash("a verdict"),
    }


def spin() -> None:
    while True:
        pass


def spin_in_c() -> int:
    return 7 ** (7**12) % 10  # one call of C code that neither returns nor lets another thread run


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


def fail(kind: str) -> None:
    raise {"value": ValueError, "exit": SystemExit, "base": BaseException, "deep": RecursionError}[kind]("on purpose")


def unspeakable() -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise ValueError

    raise Rude


def grow(megabytes: int) -> int:
    return len(bytearray(b"x") * (megabytes * 2**20))


def keep(megabytes: int) -> int:
    kept.append(bytearray(b"x") * (megabytes * 2**20))
    return os.getpid()


kept: list[bytearray] = []


def die(code: int) -> None:
    os._exit(code)


def use(seconds: float) -> None:
    next(_calls)
    time.sleep(seconds)


def die_unless_fresh() -> str:
    if next(_calls) > 1:
        os._exit(7)
    return "fresh"


def hang_unless_fresh() -> str:
    if next(_calls) > 1:
        spin()
    return "fresh"


def segfault() -> None:
    MEMSET(0, 0, 1)


def chatter() -> str:
    for _ in range(1000):
        print("{}" * 1000)
    print("x" * 10**6, file=sys.stderr)
    os.write(1, b"\xff" * 10**6)
    return "said"


def garbage(text: str) -> None:
    os.write(3, text.encode("latin-1"))


def half_a_frame() -> None:
    os.write(3, b"\0\0\1\0{")
    os._exit(0)


def trickle() -> None:
    """A long answer byte by byte, so that there is always something to read."""
    os.write(3, b"\0\xff\xff\xff")
    while True:
        os.write(3, b"[")


def answer_twice() -> str:
    """Another answer goes out before its own, which is then left lying for the next job."""
    text = b'{"job": 1, "value": "early", "again": false, "refused": [], "peak_memory": 0}'
    os.write(3, len(text).to_bytes(4, "big") + text)
    return "own"


def attempt(action: str) -> str:
    """``done``, or the error that Python gave."""
    try:
        ACTIONS[action]()
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        return type(error).__name__
    return "done"


def _connect() -> None:
    with socket.socket() as one:
        one.connect(("127.0.0.1", 9))


def _system() -> None:
    if os.system("true") != 0:
        raise OSError


ACTIONS = {
    "read a file": lambda: Path("/etc/passwd").read_bytes(),
    "write a file": lambda: Path("/tmp/mulligan-sandbox-trial").write_text("x"),
    "list a folder": lambda: list(Path("/").iterdir()),
    "make a folder": lambda: Path("/tmp/mulligan-sandbox-trial-folder").mkdir(),
    "remove": lambda: Path("/tmp/mulligan-nothing-of-that-name").unlink(),
    "rename": lambda: Path("/tmp/mulligan-nothing-of-that-name").rename("/tmp/mulligan-other"),
    "connect": _connect,
    "run a program": lambda: subprocess.run(["/bin/true"], check=True),
    "system": _system,
    "fork": lambda: os._exit(0) if os.fork() == 0 else None,
    "kill the parent": lambda: os.kill(os.getppid(), 0),
    "import": lambda: __import__("colorsys"),
    "load a library": lambda: ctypes.CDLL("libm.so.6"),
    "raise its limits": lambda: __import__("resource").setrlimit(7, (1000, 1000)),
    "start a thread": lambda: threading.Thread(target=int).start(),
    "evaluate": lambda: eval("1 + 1"),  # what sympy's parser does
    "change its folder": lambda: os.chdir("/tmp"),
}


def call_the_kernel(name: str) -> int:
    """A system call behind Python's back that would succeed outside a sandbox: what it gives, -1 for failure."""
    arguments: dict[str, tuple[Any, ...]] = {
        "fork": (),
        "mkdir": (b"/tmp/mulligan-sandbox-trial-folder", 0o700),
        "kill": (os.getppid(), 0),
        "execv": (b"/bin/true", None),
        "ptrace": (0, 0, 0, 0),
        "socketpair": (1, 1, 0, PAIR),
        "dup": (1,),
    }
    result = CALLS[name](*arguments[name])
    if name == "fork" and result == 0:
        os._exit(0)
    return result

"""Runs the command line in forks and kills them at an exact place. A program of its own, so that torch is imported
once, and so that forking has no threads to break.

``python kill_at.py MODEL``, a directory. Each line on stdin is a request, each line on stdout its answer, both JSON:

    {"cwd": ..., "argv": [...], "kill": {...} | null, "after": seconds | null, "signal": "SIGKILL"}
    {"code": -9, "late": seconds from the signal to the end | null, "output": ...}

``kill`` names a function, a call of it and a signal: the process sends itself the signal in that call, before the
function does its work or afterwards. ``after`` is ``signal`` from outside at that time.

Rewards are the toss of a coin that depends on prompt and response alone: a model of random weights solves nothing,
and without rewards there would be no updates to compare.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mulligan.evalcli
import mulligan.report.curve
import mulligan.train
from mulligan import cli
from mulligan.models.loading import load_model
from mulligan.tasks.chain import Chain
from mulligan.types import Grade, Problem, Verdict

PHASES = {"step": "one_step", "evaluate": "_evaluate", "save": "save_state"}  # functions of mulligan.train


def coin(self: Chain, problem: Problem, response: str) -> Grade:
    """A verdict out of thin air, but always the same one; a quarter of all responses pass."""
    heads = hashlib.blake2b(f"{problem.prompt}\n{response}".encode()).digest()[0] < 64
    verdict = Verdict.PASS if heads else Verdict.FAIL
    return Grade(verdict=verdict, reward=float(heads), answer=response[:3], process_correct=heads, steps=1)


def arm(kill: dict[str, Any], tell: int) -> None:
    """Wraps the named function, and those that say which phase of which step it is called in."""
    here: dict[str, Any] = {"phase": None, "step": None, "calls": 0}

    def marks(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(session: Any, *args: Any, **more: Any) -> Any:
            here.update(phase=phase, step=session.step + (phase == "step"), calls=0)
            try:
                return function(session, *args, **more)
            finally:
                here["phase"] = None

        return inner

    for phase, name in PHASES.items():
        setattr(mulligan.train, name, marks(phase, getattr(mulligan.train, name)))
    module, path = kill["target"].split(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def deadly(*args: Any, **more: Any) -> Any:
        due = False
        if (here["phase"], here["step"]) == (kill["phase"], kill["step"]):
            here["calls"] += 1
            due = here["calls"] == kill["call"]
        out = function(*args, **more) if kill["afterwards"] or not due else None
        if due:
            os.write(tell, repr(time.monotonic()).encode())
            os.kill(os.getpid(), signal.Signals[kill["signal"]])
        return out if kill["afterwards"] or not due else function(*args, **more)

    setattr(owner, name, deadly)


def child(request: dict[str, Any], output: int, tell: int) -> None:
    """Never returns."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code: Any = 0
    try:
        os.chdir(request["cwd"])
        warnings.simplefilter("error")
        for reseed in (random.seed, np.random.seed, torch.seed):  # what a new process would have
            reseed()
        Chain.verify = coin  # type: ignore[method-assign]
        if request["kill"]:
            arm(request["kill"], tell)
        sys.argv = ["mulligan", *request["argv"]]
        cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Forks, waits, and tells how it ended."""
    output = Path(request["cwd"]) / "output.txt"
    read, write = os.pipe()
    begun = time.monotonic()
    with output.open("w") as file:
        pid = os.fork()
        if not pid:
            child(request, file.fileno(), write)
    os.close(write)
    after, sent = request["after"], None
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if after is not None and time.monotonic() - begun >= after:
            os.kill(pid, signal.Signals[request["signal"]])
            after, sent = None, time.monotonic()
        time.sleep(0.005)
    now, told = time.monotonic(), os.read(read, 100).decode()
    sent = float(told) if told else sent
    os.close(read)
    return {
        "code": os.waitstatus_to_exitcode(ended[1]),
        "late": None if sent is None else now - sent,
        "output": output.read_text(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_model(sys.argv[1])  # transformers compiles a thousand patterns at the first one; the forks have them then
    for line in sys.stdin:
        answer = serve(json.loads(line))
        print(json.dumps(answer), flush=True)

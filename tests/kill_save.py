"""Kills savers and checks what they leave. A program of its own, so that forking has no threads to break.

Run as ``python kill_save.py DIRECTORY KILLS``: killed before each system call in turn, then so often at random.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mulligan.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def save(root: Path, step: int, mark: int) -> None:
    tensors = {"model": {"w": torch.full((500,), mark), "b": torch.tensor(mark)}, "optimizer": {"m": torch.zeros(3)}}
    save_checkpoint(root, step, tensors, {"mark": mark}, files=lambda path: (path / "extra").mkdir())


def in_child(work: Callable[[], None]) -> int:
    """The pid of a fork that does ``work`` and leaves with 0, or with 1 when it raises."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as error:
        print("the saver failed:", repr(error), flush=True)
        os._exit(1)
    os._exit(0)


def mark_of(root: Path) -> int:
    """Loads the newest checkpoint, whole or with an error, and checks that its parts belong together."""
    checkpoint = load_checkpoint(root)
    assert checkpoint is not None, "no checkpoint survived"
    mark = checkpoint.state["mark"]
    assert torch.equal(checkpoint.tensors["model"]["w"], torch.full((500,), mark))
    return mark


def die_at(call: int, work: Callable[[], None]) -> None:
    """Do ``work`` but exit on the spot before its ``call``-th system call that Python reports."""
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event == "open" or event.startswith(("os.", "shutil.")):
            if count == call:
                os._exit(9)
            count += 1

    sys.addaudithook(hook)
    work()


def every_call(root: Path, before: list[int], step: int) -> None:
    """A save of ``step`` over the checkpoints ``before``, cut short at each call in turn."""
    for call in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        for old in before:
            save(root, old, old)
        child = in_child(lambda call=call: die_at(call, lambda: save(root, step, 77)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        assert mark_of(root) in (before[-1], 77)
        save(root, step + 1, 78)
        assert mark_of(root) == 78
        assert not list(root.glob(".*")), "leavings"
        if code == 0:
            assert call > 20, "the hook saw too few calls to mean anything"
            return
    raise AssertionError("the save never ended")


def random_times(root: Path, kills: int) -> None:
    """SIGKILL at a random moment of a loop that saves every step three times; what was acknowledged must be there."""
    save(root, 0, 0)
    known = 0
    rng = random.Random(0)
    for _ in range(kills):
        read, write = os.pipe()

        def saver(known: int = known, write: int = write) -> None:
            for mark in range(known + 1, known + 1000):
                save(root, mark // 3, mark)
                os.write(write, b".")

        begun = time.perf_counter()
        child = in_child(saver)
        for _ in range(rng.randint(1, 4)):
            known += len(os.read(read, 1))
        took = time.perf_counter() - begun
        time.sleep(rng.uniform(0, took))  # about one to four saves later, on a busy machine too
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        mark = mark_of(root)
        assert mark >= known, "an acknowledged checkpoint is lost"
        assert len(list_checkpoints(root)) <= 3
        known = mark


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a killed process loses nothing that the system has; without it this takes seconds
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    every_call(folder / "calls", [1, 2], 3)
    every_call(folder / "calls", [1], 1)
    random_times(folder / "times", kills)

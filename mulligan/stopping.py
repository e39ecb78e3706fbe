"""SIGTERM and Ctrl-C as an exception that never lands where a step is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was asked to end. A BaseException, so that no ``except Exception`` swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopper:
    """Raises :class:`Stopped` at once, or at the end of a shielded stretch.

    A handler that is only polled between steps comes too late on a machine that is taken away; one that
    raises anywhere may leave weights and step counter apart. So: anywhere, but for the shielded stretches.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending: int | None = None
        self._raised: int | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._depth:
            self._pending = number
        else:
            self._depth += 1  # a second signal must not cut short what the first one started
            self._raised = number
            raise Stopped(number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT inside; puts the former handlers back afterwards."""
        former = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def shield(self) -> None:
        """From here on a signal waits."""
        self._depth += 1

    def unshield(self) -> None:
        """The end of a shielded stretch: a signal that waited is raised now."""
        self._depth -= 1
        if self._depth == 0 and self._pending is not None:
            number, self._pending = self._pending, None
            self._handle(number, None)

    def check(self) -> None:
        """Raises once more what was raised and never arrived: Python drops what a destructor or a callback of the
        garbage collector raises, and a handler may run inside one."""
        if self._raised is not None:
            raise Stopped(self._raised)

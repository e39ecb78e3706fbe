"""The sampler protocol. A sampler draws tokens; it knows nothing of tasks' truth, credit or methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from mulligan.types import Completion, Request

# Called once for each request when all its n samples are done; what it returns is sampled too.
OnDone = Callable[[Request, Sequence[Completion]], Iterable[Request]]


@runtime_checkable
class Sampler(Protocol):
    """Draws completions for requests, in any order and any batches it likes.

    The random number of token t of a sample is a pure function of (its seed, t), with t counted from the
    start of the *response* (prefix included), so batching cannot change it.
    """

    def run(self, requests: Sequence[Request], on_done: OnDone) -> None:
        """Samples all requests and all that ``on_done`` asks for in turn.

        Raises:
            UserError: a context plus prefix that leaves no room for a single new token.
        """
        ...

"""Where a training step's time goes: sampling, verifying, packing, forward, backward, optimizer, logging, the rest.

    python benchmarks/profile_step.py [--steps 8] [--works demo,qwen] [--json]

prints one table (``--json``: one object a row with ``work``, ``ratio``, the share of the step, and ``goal``); about a
minute. Nothing in the library is changed for it: this file puts clocks around whole functions, and a clock stops while
another one inside of it runs, so that every moment counts once. What no clock covers stands in the last line of its
group. The goal is that at most 5 % of a step are neither sampling nor training (packing, forward, backward, optimizer).

Evaluations and checkpoints belong to no step. An earlier version of the library is profiled by its path:

    git archive REVISION | tar x -C /tmp/before && PYTHONPATH=/tmp/before python benchmarks/profile_step.py
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from workload import WORDS, Work, make_model

import mulligan.learner.update as update
import mulligan.rollout as rollout
import mulligan.train as train
from mulligan.config import validate
from mulligan.log import RunLog
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.session import Session, prepare
from mulligan.stopping import Stopper

GOAL = 0.05
WARM_UP = 2  # steps that are not counted
# What is clocked: an object, its function's name, the phase. A name that a version lacks is passed over: its time is
# then the surrounding function's.
Span = tuple[Any, str, str]
INSIDE = ("sampling", "packing", "forward", "backward", "optimizer")
OUTSIDE = ("verifying", "logging", "problems", "text", "rows", "other")
MEANING = {
    "sampling": "prefill, decode and drawing tokens",
    "packing": "rows to trees or padded batches",
    "forward": "log-probs and loss, streams too",
    "backward": "",
    "optimizer": "clipping and the update",
    "verifying": "the task's verdicts and rewards",
    "logging": "metrics, sample records, writing them",
    "problems": "drawing problems, passes and their orders",
    "text": "decoding responses",
    "rows": "select, credit, masks",
    "other": "whatever else a step does",
}


REWARD = """def even(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]
"""


class Quiet:
    """A reporter that says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Clock:
    """Exclusive seconds by phase: while an inner phase runs the outer one stands still."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _lap(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a kernel's time belongs to who started it
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def around(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*given: Any, **named: Any) -> Any:
            with self.phase(phase):
                return function(*given, **named)

        return clocked


@contextmanager
def clocked(clock: Clock, spans: list[Span]) -> Iterator[None]:
    """Clocks around these functions until the end of the block."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, phase in spans:
            if not hasattr(owner, name):
                continue
            before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, clock.around(getattr(owner, name), phase))
        yield
    finally:
        for owner, name, function in reversed(before):
            if function is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, function)


def spans_of(session: Session, log: RunLog) -> list[Span]:
    """The functions of a step, by phase."""
    learner: Any = update.Learner
    return [
        (EmbeddedSampler, "run", "sampling"),
        (type(session.task), "grade", "verifying"),
        (update, "pack", "packing"),
        (update, "layouts", "packing"),
        (update, "micro_batches", "packing"),
        (learner, "_item", "packing"),
        (update, "score", "forward"),
        (learner, "_micro_batch", "forward"),
        (learner, "fill_streams", "forward"),
        (torch.Tensor, "backward", "backward"),
        (torch.autograd, "grad", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (session.learner.optimizer, "step", "optimizer"),
        (session.learner.optimizer, "zero_grad", "optimizer"),
        (update._Tally, "add", "logging"),
        (train, "rollout_metrics", "logging"),
        (train, "mechanism_metrics", "logging"),
        (log, "metrics", "logging"),
        (log, "samples", "logging"),  # the records are made while it writes them
        (train, "rollout", "problems"),
        (rollout._Climb, "advance", "problems"),
        (rollout._Climb, "receive", "problems"),
        (rollout, "make_samples", "text"),
        (train, "assign", "rows"),
    ]


def demo(folder: Path, more: dict[str, Any]) -> Session:
    """`make demo`'s steps: GRPO on the looped pico base."""
    return prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(folder / "ours"),
                "model": {"name": "pico", **more},
                "sampling": {"prompts": 16},
                "optimizer": {"learning_rate": 4e-4},
            }
        )
    )


def qwen(folder: Path, more: dict[str, Any]) -> Session:
    """Random weights, texts of one token a word, and a reward that half of the responses get."""
    work = Work(name="profile", goal=1.0)
    make_model(work, folder / "model")
    (folder / "reward.py").write_text(REWARD)
    data, rng = folder / "data", random.Random(0)
    data.mkdir()
    for split, count in (("train", 4 * work.prompts), ("dev", 1), ("test", 1)):
        texts = [" ".join(str(rng.randrange(WORDS)) for _ in range(work.prompt)) for _ in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(folder / "ours"),
                "model": {"name": str(folder / "model"), **more},
                "task": {
                    "name": "jsonl",
                    "path": str(data),
                    "instruction": "",
                    "rewards": [f"{folder / 'reward.py'}:even"],
                },
                "sampling": {"prompts": work.prompts, "max_new_tokens": work.new},
                "optimizer": {"learning_rate": 1e-6},
            }
        )
    )


WORKS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], Session]]] = {
    "demo": ("GRPO on pico, 16 x 8", demo),
    "qwen": ("GRPO on 1.1M Qwen3, 32 x 8, 16-token prompts, 64 new", qwen),
}


def profile(
    build: Callable[[Path, dict[str, Any]], Session], steps: int, kernels: bool = False
) -> list[dict[str, float]]:
    """Seconds of each step by phase."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        session, stopper = build(Path(name), {"kernels": True} if kernels else {}), Stopper()
        with RunLog(Path(name) / "ours") as log:
            for step in range(WARM_UP + steps):
                clock = Clock()
                with clocked(clock, spans_of(session, log)), clock.phase("other"):
                    train.one_step(session, log, Quiet(), stopper)
                if step >= WARM_UP:
                    found.append({phase: clock.seconds[phase] for phase in (*INSIDE, *OUTSIDE)})
    return found


def rows_of(work: str, steps: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each phase, and one for all that is neither sampling nor training."""
    whole = [sum(step.values()) for step in steps]

    def row(name: str, phases: tuple[str, ...], goal: float | None) -> dict[str, Any]:
        parts = [sum(step[phase] for phase in phases) for step in steps]
        return {
            "work": f"{work}: {name}",
            "ratio": sum(parts) / sum(whole),
            "goal": goal,
            "seconds": statistics.median(parts),
        }

    return [
        *(row(phase, (phase,), None) for phase in (*INSIDE, *OUTSIDE)),
        row("outside sampling and training", OUTSIDE, GOAL),
        row("the step", (*INSIDE, *OUTSIDE), None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="after some that warm up")
    parser.add_argument("--works", default=",".join(WORKS), help="which of the columns")
    parser.add_argument("--kernels", action="store_true", help="with model.kernels")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    columns: dict[str, list[dict[str, Any]]] = {}
    for key in chosen.works.split(","):
        if key not in WORKS:
            raise SystemExit(f"--works: '{key}' is none of {', '.join(WORKS)}")
        work, build = WORKS[key]
        columns[work] = rows_of(work, profile(build, chosen.steps, chosen.kernels))
        if chosen.json:
            for row in columns[work]:
                print(json.dumps(row), flush=True)
    if chosen.json:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("phase")
    for work in columns:
        table.add_column(f"{work}: s", justify="right")
        table.add_column("share", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("what")
    for several in zip(*columns.values(), strict=True):
        name = several[0]["work"].rpartition(": ")[2]
        cells = [cell for row in several for cell in (f"{row['seconds']:.4f}", f"{row['ratio']:.1%}")]
        goal = f"<= {several[0]['goal']:.0%}" if several[0]["goal"] else ""
        table.add_row(name, *cells, goal, MEANING.get(name, ""))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

"""How a GRPO step grows: time and peak memory of sampling and training against length, group size and vocabulary.

    python benchmarks/growth.py [--axes length,group,vocabulary] [--repeats 5] [--out DIR] [--json]

prints one table (``--json``: one object a curve with ``work``, ``ratio``, ``goal``), about five minutes on one core;
``--out`` saves ``growth.png``. One thing is changed at a time, of a Qwen3 of 2 layers, 128 wide, with random weights:

    length      1 prompt x 4 responses of 64 to 4,096 tokens, 503 words
    group       4 prompts x 2 to 64 responses of 64 tokens, 503 words
    vocabulary  4 prompts x 8 responses of 32 tokens, 128 to 151,936 words

*Sampling* is a step's rollout, grading and all; *training* is what follows it: rows, streams, forward, backward and
optimizer. Seconds are medians of steps in which all points of an axis take turns, after one step that warms up. Memory
is the peak above what stood there before the phase (weights and the optimizer's state), of one more step. Training
reads at most 16,384 tokens at a time, the default, so its memory ends growing where a batch has more.

``exponent`` is the slope of a straight line through log(value) against log(size), by least squares over all points;
``at the end`` is the same over the largest three, where fixed costs count least, and is what ``ratio`` holds. Its goal
is an upper bound: 2 for seconds against length, where attention is, and else 1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from profile_step import Quiet
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar
from workload import Work, make_model

from mulligan.config import validate
from mulligan.log import RunLog
from mulligan.session import Session, prepare
from mulligan.stopping import Stopper
from mulligan.train import one_step

BASE = Work(name="growth", goal=1.0, layers=2, prompts=4)
AXES: dict[str, list[tuple[int, Work]]] = {
    "length": [(n, replace(BASE, prompts=1, samples=4, new=n)) for n in (64, 128, 256, 512, 1024, 2048, 4096)],
    "group": [(n, replace(BASE, samples=n)) for n in (2, 4, 8, 16, 32, 64)],
    "vocabulary": [(n, replace(BASE, new=32, vocabulary=n)) for n in (128, 512, 2048, 8192, 32_768, 151_936)],
}
LABELS = {"length": "response length (tokens)", "group": "group size (responses)", "vocabulary": "vocabulary (tokens)"}
FIXED = {  # what the panels say of the rest
    "length": "1 prompt x 4 responses, 503 words",
    "group": "4 prompts, responses of 64 tokens, 503 words",
    "vocabulary": "4 prompts x 8 responses of 32 tokens",
}
PARTS = {"sampling": "#0072B2", "training": "#D55E00"}  # blue and vermilion, which every eye tells apart
MARKERS = {"sampling": "o", "training": "s"}
QUANTITIES = {"seconds": "time of a step (s)", "megabytes": "peak extra memory (MB)"}
GOALS = {("seconds", "length"): 2.0}  # else 1
LAST = 3  # points at the end
REWARD = '''"""A number of its own for nearly every text, so that every group has a signal."""

import zlib


def spread(completions, **columns):
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]
'''


@dataclass
class Curve:
    """One quantity of one part against one axis."""

    axis: str
    part: str
    quantity: str
    sizes: list[int]
    values: list[list[float]] = field(default_factory=list)  # of each size, every repeat

    @property
    def medians(self) -> list[float]:
        return [statistics.median(each) for each in self.values]

    @property
    def goal(self) -> float:
        return GOALS.get((self.quantity, self.axis), 1.0)

    def exponent(self, last: int | None = None) -> float:
        """Over all points, or the largest few."""
        return exponent(self.sizes[-(last or 0) :], self.medians[-(last or 0) :])

    def row(self) -> dict[str, Any]:
        return {
            "work": f"{self.part}, {self.quantity} against {LABELS[self.axis]}",
            "ratio": self.exponent(LAST),
            "goal": self.goal,
            "exponent": self.exponent(),
            "sizes": self.sizes,
            self.quantity: self.medians,
            "least": [min(each) for each in self.values],
            "most": [max(each) for each in self.values],
        }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line through log(value) against log(size).

    >>> round(exponent([1, 2, 4], [5, 20, 80]), 6)
    2.0
    """
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


# ---- a step and its phases ------------------------------------------------------------------------------------------


class Watch(Quiet):
    """A reporter that keeps a step's seconds, and on demand its peaks of memory in MB."""

    def __init__(self, memory: bool) -> None:
        self.memory = memory
        self.found: dict[str, float] = {}
        self.before = 0.0

    def phase(self, name: str, done: int, total: int) -> None:
        if self.memory:
            if name == "updating":
                self.found["sampling"] = peak() - self.before
            self.before = fresh_peak()

    def stepped(self, step: int, metrics: dict[str, float]) -> None:
        if self.memory:
            self.found["training"] = peak() - self.before
        else:
            self.found["sampling"] = metrics["time/rollout"]
            self.found["training"] = metrics["time/assign"] + metrics["time/update"]


def fresh_peak() -> float:
    """Lets the peak begin again at what is held now, which it returns, in MB."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    with suppress(OSError, AttributeError):  # what was freed but kept would be used again unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise SystemExit(
            "peak memory is read from /proc, which this system lacks; on CUDA it is the device's"
        ) from None
    return status("VmRSS")


def peak() -> float:
    """MB at most since the last fresh peak."""
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else status("VmHWM")


def status(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


@contextmanager
def session_of(work: Work, kernels: bool = False) -> Iterator[tuple[Session, RunLog]]:
    """A run whose every step does this work."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), random.Random(0)
        make_model(work, folder / "model")
        (folder / "reward.py").write_text(REWARD)
        prompts = [" ".join(str(rng.randrange(work.words)) for _ in range(work.prompt)) for _ in range(66)]
        data = folder / "data"
        data.mkdir()
        for split, texts in {"train": prompts[:64], "dev": prompts[64:65], "test": prompts[65:]}.items():
            (data / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        run = {
            "steps": 10_000,
            "out": str(folder / "run"),
            "model": {"name": str(folder / "model"), "kernels": kernels},
            "task": {
                "name": "jsonl",
                "path": str(data),
                "instruction": "",
                "rewards": [f"{folder / 'reward.py'}:spread"],
            },
            "method": {"name": "grpo", "group_size": work.samples},
            "sampling": {
                "prompts": work.prompts,
                "max_new_tokens": work.new,
                "max_rows": work.prompts * work.samples,
            },
            "log": {"samples": False},
        }
        with RunLog(folder / "run") as log:
            yield prepare(validate(run)), log


def step(session: Session, log: RunLog, *, memory: bool = False) -> dict[str, float]:
    """Seconds, or MB, of sampling and of training."""
    watch: Any = Watch(memory)
    one_step(session, log, watch, Stopper())
    return watch.found


def measure(axis: str, points: Sequence[tuple[int, Work]], repeats: int, kernels: bool = False) -> list[Curve]:
    """All curves against one axis."""
    curves = {(q, p): Curve(axis, p, q, [n for n, _ in points]) for q in QUANTITIES for p in PARTS}
    with ExitStack() as stack:
        sessions = [stack.enter_context(session_of(work, kernels)) for _, work in points]
        for session in sessions:
            step(*session)
        for curve in curves.values():
            curve.values = [[] for _ in points]
        for turn in range(repeats + 1):
            for i, session in enumerate(sessions):
                last = turn == repeats
                for part, value in step(*session, memory=last).items():
                    curves["megabytes" if last else "seconds", part].values[i].append(value)
    return list(curves.values())


# ---- what is shown --------------------------------------------------------------------------------------------------


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A panel for each quantity and axis, both scales logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure(figsize=(4.6 * len(axes), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(QUANTITIES), len(axes), squeeze=False, sharey="row", sharex="col")
    for curve in curves:
        row, column = list(QUANTITIES).index(curve.quantity), axes.index(curve.axis)
        panel = panels[row, column]
        low, high = zip(*((min(each), max(each)) for each in curve.values), strict=True)
        color = PARTS[curve.part]
        panel.fill_between(curve.sizes, low, high, color=color, alpha=0.2, linewidth=0)
        label = f"{curve.part}: exponent {curve.exponent():.2f} (largest {LAST}: {curve.exponent(LAST):.2f})"
        panel.plot(curve.sizes, curve.medians, color=color, marker=MARKERS[curve.part], linewidth=2, label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(curve.sizes, [f"{n:,}" for n in curve.sizes], rotation=30, ha="right", rotation_mode="anchor")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if row == 0:
            panel.set_title(FIXED[curve.axis], fontsize=11)
        if column == 0:
            panel.set_ylabel(QUANTITIES[curve.quantity], fontsize=12)
        if row == len(QUANTITIES) - 1:
            panel.set_xlabel(LABELS[curve.axis], fontsize=12)
    for panel in panels.flat:
        panel.legend(loc="upper left", fontsize=9.5, frameon=True, framealpha=0.9, edgecolor="none")
    for row in panels:  # room for the legends above the curves
        low, high = row[0].get_ylim()
        row[0].set_ylim(low, high * (high / low) ** 0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def table_of(curves: Sequence[Curve]) -> Table:
    table = Table("of", "against", "from", "to", "exponent", "at the end", "goal")
    for curve in curves:
        unit = "s" if curve.quantity == "seconds" else "MB"
        ends = [f"{value:.3g} {unit} at {size:,}" for value, size in zip(curve.medians, curve.sizes, strict=True)]
        fits = [f"{curve.exponent():.2f}", f"{curve.exponent(LAST):.2f}", f"<= {curve.goal:g}"]
        table.add_row(f"{curve.part}, {curve.quantity}", LABELS[curve.axis], ends[0], ends[-1], *fits)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="which of them")
    parser.add_argument("--points", type=int, help="of each axis the smallest so many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a directory for growth.png")
    parser.add_argument("--kernels", action="store_true", help="with model.kernels")
    parser.add_argument("--json", action="store_true", help="one JSON object a curve")
    chosen = parser.parse_args()
    wrong = [axis for axis in chosen.axes.split(",") if axis not in AXES]
    if wrong or (chosen.points or 2) < 2 or chosen.repeats < 1:
        parser.error(f"axes are {', '.join(AXES)}; a line wants 2 points, and a point 1 repeat")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    curves: list[Curve] = []
    for axis in chosen.axes.split(","):
        found = measure(axis, AXES[axis][: chosen.points], chosen.repeats, chosen.kernels)
        curves += found
        if chosen.json:
            for curve in found:
                print(json.dumps(curve.row()), flush=True)
    if not chosen.json:
        Console(width=140).print(table_of(curves))
    if chosen.out:
        draw(curves, chosen.out / "growth.png")


if __name__ == "__main__":
    main()

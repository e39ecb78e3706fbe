"""What a step of every method costs beside a step of GRPO: tokens, seconds by phase, peak memory.

    python benchmarks/method_costs.py [--base pico] [--methods rltt,srpo,...] [--rounds 5] [--json]
    python benchmarks/method_costs.py --base pico-qwen3      the same without the methods that need loops
    python benchmarks/method_costs.py --none-pass            LTE alone, over tasks that it fails more and more often

Each prints one table (``--json``: one object a row with ``work``, ``ratio``, ``goal``) in about five minutes, two for
the last. Steps of all methods take turns, a step of GRPO before every fourth; each is on the same problems and the same
weights as GRPO's of its round, since the learning rate is so small that every update is lost in rounding. So methods
that sample alike sample the same tokens. Seconds are medians over the rounds of the ratio to the last step of GRPO;
tokens are ratios of sums. Of a schedule the first phase is measured: the warm-up of DSRL.

Columns: ``sampled`` tokens of any kind, diagnoses and second rounds too; ``prefilled`` prompts and prefixes, each
distinct one once a refill; ``forward`` tokens that the learner ran with or without a gradient, unique ones where rows
share a beginning (``--flat``: padded ones); ``scored`` those without a gradient, beside all that GRPO ran; ``rows``
that were trained; seconds of the phases of ``metrics.jsonl`` and of the whole step; ``memory``, the peak above what the
process held before the step. ``goal`` bounds the ratio that it names.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from profile_step import Quiet
from rich.console import Console
from rich.table import Table

import mulligan.learner.update as update
from mulligan.config import validate
from mulligan.errors import UserError
from mulligan.learner.packing import Batch
from mulligan.log import RunLog
from mulligan.methods import PRESETS
from mulligan.schedule import constant
from mulligan.session import Session, prepare
from mulligan.stopping import Stopper
from mulligan.train import one_step
from mulligan.types import Metrics

GRPO = "grpo"
SUMS = ("srpo+rltt", "lte+rltt")  # beside every method by its name
GOALS = {"rltt": ("step", 1.15), "dsrl, first": ("update", 0.6), "srpo": ("sampled a row", 1.0)}
TOKENS = ("sampled", "prefilled", "forward", "scored", "rows")
SECONDS = ("rollout", "assign", "update", "step")
BLOCK = 4  # methods between two steps of GRPO
UNMOVED = 1e-30  # a learning rate: what it adds to a weight is lost in rounding
LEVELS = range(1, 7)  # of chain, the more the longer


@dataclass(slots=True)
class Cost:
    """Of one step."""

    tokens: dict[str, float]
    seconds: dict[str, float]
    none_pass: float


class Runner:
    """A method's session; steps of it can be repeated."""

    def __init__(self, name: str, session: Session, log: RunLog) -> None:
        self.name, self.session, self.log = name, session, log
        self.costs: list[Cost] = []
        self.ratios: list[dict[str, float]] = []  # of seconds, a round each
        self.memory: float | None = None  # bytes

    def step(self, round_: int) -> Cost:
        """One step, the same for every method of a round but for what the method does."""
        session, sampler = self.session, self.session.sampler
        session.step = round_
        session.memory["cursor"] = round_ * session.run.sampling.prompts
        session.memory.commit()
        prefilled, sampled = sampler.stats["prefill_tokens"], _total(session)
        seen: dict[str, Metrics] = {}
        reporter: Any = Told(seen)
        with counting() as counts:
            begun = time.perf_counter()
            one_step(session, self.log, reporter, Stopper())
            seconds = time.perf_counter() - begun
        record = seen["record"]
        return Cost(
            tokens={
                "sampled": _total(session) - sampled,
                "prefilled": sampler.stats["prefill_tokens"] - prefilled,
                "forward": counts["forward"],
                "scored": counts["scored"],
                "rows": record["update/rows"],
            },
            seconds={"step": seconds, **{phase: record[f"time/{phase}"] for phase in SECONDS[:-1]}},
            none_pass=record["rollout/none_pass"],
        )


class Told(Quiet):
    """A reporter that keeps a step's numbers."""

    def __init__(self, seen: dict[str, Metrics]) -> None:
        self.seen = seen

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.seen["record"] = metrics


def _total(session: Session) -> float:
    return session.memory.get("totals", {"total/tokens": 0})["total/tokens"]


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """Counts the tokens that the learner runs through a model; ``scored``: those without a gradient."""
    counts, plain = {"forward": 0.0, "scored": 0.0}, update.score

    def counted(model: Any, batch: Batch, **more: Any) -> Any:
        counts["forward"] += batch.tokens.numel()
        counts["scored"] += 0 if torch.is_grad_enabled() else batch.tokens.numel()
        return plain(model, batch, **more)

    update.score = counted
    try:
        yield counts
    finally:
        update.score = plain


def peak_memory(work: Callable[[], object]) -> float | None:
    """Bytes that the work needs at most beside what is held before; None where the system does not say."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return float(torch.cuda.max_memory_allocated() - before)
    with suppress(OSError, AttributeError):  # memory that was freed but kept would be used again unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    except OSError:
        work()
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def open_session(
    method: str, folder: Path, base: str, kernels: bool, task: dict[str, Any], prompts: int, share: bool
) -> Session:
    return prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(folder),
                "model": {"name": base, "kernels": kernels},
                "task": {"name": "chain", **task},
                "method": {"name": method},
                "sampling": {"prompts": prompts},
                "optimizer": {"learning_rate": UNMOVED, "share_prefixes": share},
            }
        )
    )


def every_method() -> list[str]:
    """All names but those of published presets, which bring temperatures, group sizes and updates of their own. GRPO is
    among them: how far its ratios are from 1 is how far the others' may be off."""
    return [*(name for name in PRESETS if not name.endswith("-published")), *SUMS]


def open_runners(
    names: Sequence[str],
    base: str,
    stack: ExitStack,
    say: Callable[[str], None],
    prompts: int,
    share: bool = True,
    kernels: bool = False,
    **task: Any,
) -> list[Runner]:
    """A runner for each row; methods that the base cannot do are told and left out."""
    out = []
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for name in names:
        run = folder / f"{len(out)}"
        try:
            session = open_session(name, run, base, kernels, task, prompts, share)
        except UserError as error:
            say(f"left out: {error}")
            continue
        first, *then = session.schedule.methods
        session.schedule = constant(first)  # what follows a warm-up is a method with a row of its own
        out.append(Runner(f"{name}, first" if then else name, session, stack.enter_context(RunLog(run))))
    return out


def measure(grpo: Runner, runners: Sequence[Runner], rounds: int, say: Callable[[str], None]) -> None:
    """Fills in every runner's costs; round 0 warms up and finds the peak memory."""
    grpo.step(0)
    for runner in (grpo, *runners):
        runner.memory = peak_memory(lambda runner=runner: runner.step(0))
    for round_ in range(1, rounds + 1):
        begun = time.perf_counter()
        for start in range(0, len(runners), BLOCK):
            beside = grpo.step(round_)
            for runner in runners[start : start + BLOCK]:
                cost = runner.step(round_)
                runner.costs.append(cost)
                runner.ratios.append({k: cost.seconds[k] / beside.seconds[k] for k in SECONDS})
        grpo.costs.append(beside)
        say(f"round {round_} of {rounds}: {time.perf_counter() - begun:.0f} s")


def row_of(runner: Runner, grpo: Runner) -> dict[str, Any]:
    """A row of the table of costs: all ratios to GRPO, of GRPO itself 1."""
    totals = {k: sum(c.tokens[k] for c in runner.costs) for k in TOKENS}
    theirs = {k: sum(c.tokens[k] for c in grpo.costs) for k in TOKENS}
    ratios = {k: _ratio(totals[k], theirs[k]) for k in TOKENS}
    ratios["scored"] = _ratio(totals["scored"], theirs["forward"])  # GRPO scores nothing by itself
    ratios |= {k: statistics.median(r[k] for r in runner.ratios) if runner.ratios else 1.0 for k in SECONDS}
    ratios["sampled a row"] = _ratio(totals["sampled"] * theirs["rows"], theirs["sampled"] * totals["rows"])
    ratios["memory"] = _ratio(runner.memory or 0.0, grpo.memory or 0.0)
    of, goal = GOALS.get(runner.name, ("step", None))
    return {
        "work": f"{runner.name} beside {GRPO}: {of}",
        "ratio": ratios[of],
        "goal": goal,
        "ratios": ratios,
        "tokens": {k: v / len(runner.costs) for k, v in totals.items()},
        "seconds": {k: statistics.median(c.seconds[k] for c in runner.costs) for k in SECONDS},
        "memory": runner.memory,
    }


def _ratio(ours: float, theirs: float) -> float | None:
    return ours / theirs if theirs else None


def costs(
    names: Sequence[str],
    base: str,
    rounds: int,
    prompts: int,
    share: bool,
    kernels: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of the table of costs, GRPO's first."""
    with ExitStack() as stack:
        (grpo,) = open_runners([GRPO], base, stack, say, prompts, share, kernels)
        runners = open_runners(names, base, stack, say, prompts, share, kernels)
        measure(grpo, runners, rounds, say)
        return [row_of(runner, grpo) for runner in (grpo, *runners)]


def costs_table(rows: Sequence[dict[str, Any]], base: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("sampled", "prefilled", "forward", "scored", "rows", *SECONDS, "memory", "sampled a row")
    for column in (f"{base}: ratio to GRPO", *columns, "goal"):
        table.add_column(column, justify="left" if column.startswith(base) else "right")
    first = rows[0]
    own = [f"{first['tokens'][k]:,.0f}" for k in TOKENS] + [f"{first['seconds'][k]:.3f} s" for k in SECONDS]
    memory = f"{first['memory'] / 2**20:.0f} MiB" if first["memory"] else ""
    table.add_row("grpo, a step", *own, memory, f"{first['tokens']['sampled'] / first['tokens']['rows']:.1f}", "")
    for row in rows[1:]:
        cells = [f"{row['ratios'][k]:.2f}" if row["ratios"][k] is not None else "" for k in columns]
        name, _, of = row["work"].partition(f" beside {GRPO}: ")
        table.add_row(name, *cells, f"{of} <= {row['goal']:g}" if row["goal"] else "")
    return table


def none_pass(base: str, rounds: int, prompts: int, kernels: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of what LTE costs more than GRPO, a level of ``chain`` each, and of the fit through all of them.

    The extra is ``c`` times the share of prompts that no sample solves; c is what a second round costs beside a first.
    """
    rows = []
    for level in LEVELS:
        with ExitStack() as stack:
            grpo, lte = open_runners([GRPO, "lte"], base, stack, say, prompts, kernels=kernels, level=level)
            measure(grpo, [lte], rounds, say)
        share = statistics.mean(c.none_pass for c in lte.costs)
        row = row_of(lte, grpo)
        sampled, seconds = row["ratios"]["sampled"] - 1, row["ratios"]["step"] - 1
        rows.append({"work": f"lte, chain level {level}", "share": share, "sampled": sampled, "seconds": seconds})
    out = []
    for what in ("sampled", "seconds"):
        shares, extra = [r["share"] for r in rows], [r[what] for r in rows]
        slope = sum(x * y for x, y in zip(shares, extra, strict=True)) / sum(x * x for x in shares)
        for row in rows:
            row[f"{what} fitted"] = slope * row["share"]
        correlation = statistics.correlation(shares, extra)
        work = f"lte, extra {what} for a none-pass share of 1; correlation"
        out.append({"work": work, "ratio": slope, "goal": None, "correlation": correlation})
    return [{**row, "ratio": 1 + row["sampled"], "goal": None} for row in rows] + out


def none_pass_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("work", "none-pass", "extra sampled tokens", "c x share", "extra seconds", "c x share")
    for column in columns:
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in rows:
        if "share" in row:
            keys = ("share", "sampled", "sampled fitted", "seconds", "seconds fitted")
            table.add_row(row["work"], *(f"{row[k]:.3f}" for k in keys))
        else:
            table.add_row(
                row["work"].replace("; correlation", ""), f"c = {row['ratio']:.3f}", f"r = {row['correlation']:.3f}"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pico", help="the model of all rows; what needs loops is left out without")
    parser.add_argument("--methods", help="names and sums, separated by commas; all when left out")
    parser.add_argument("--none-pass", action="store_true", help="LTE over levels in place of all methods")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="problems a step")
    parser.add_argument("--kernels", action="store_true", help="with model.kernels")
    parser.add_argument("--flat", action="store_true", help="no prefixes are shared, by no method")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    err = Console(stderr=True)

    def say(text: str) -> None:
        err.print(text, highlight=False)

    if chosen.none_pass:
        rows = none_pass(chosen.base, chosen.rounds, chosen.prompts, chosen.kernels, say)
    else:
        names = chosen.methods.split(",") if chosen.methods else every_method()
        rows = costs(names, chosen.base, chosen.rounds, chosen.prompts, not chosen.flat, chosen.kernels, say)
    if chosen.json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    Console(width=170).print(none_pass_table(rows) if chosen.none_pass else costs_table(rows, chosen.base))


if __name__ == "__main__":
    main()

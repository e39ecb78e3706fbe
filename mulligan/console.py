"""What a person sees: a progress bar on a terminal, plain lines without one, and the story at the end."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from mulligan.evaluate import Evaluation, Outcome
from mulligan.session import Session
from mulligan.types import Metrics


class ConsoleReporter:
    """Tells a training run's story on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.session: Session | None = None
        self.before: tuple[Metrics, list[Outcome]] | None = None
        self.after: tuple[Metrics, list[Outcome]] | None = None
        self.accuracy: float | None = None
        self._seconds: list[float] = []
        self._last = time.monotonic()
        self._shown = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=None, facts="")

    def started(self, session: Session, resumed: bool) -> None:
        self.session = session
        run = session.run
        parameters = sum(p.numel() for p in session.learner.model.parameters())
        self.console.print(
            f"{run.method.name} on {run.task.name}: {run.model.name} ({parameters / 1e6:.2f}M parameters), "
            f"{run.sampling.prompts} problems a step, {run.steps} steps, seed {run.seed}",
            markup=False,
            soft_wrap=True,
        )
        for note in (*session.task.notes(), *session.precision, *session.learner.notes()):
            self.console.print(note, markup=False, highlight=False, soft_wrap=True)
        self.console.print(
            f"results in {run.directory}" + (f", going on from step {session.step}" if resumed else ""),
            markup=False,
            soft_wrap=True,
        )
        self._bar.update(self._task, total=run.steps, completed=session.step)
        if self.console.is_terminal:
            self._bar.start()
        self._last = time.monotonic()

    def phase(self, name: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=f"{name}{f' {done}/{total}' if total > 1 else ''}")

    def stepped(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        self._seconds = [*self._seconds, now - self._last][-20:]
        self._last = now
        assert self.session is not None
        left = (self.session.run.steps - step) * sum(self._seconds) / len(self._seconds)
        spent = sum(v for k, v in metrics.items() if k.startswith("time/"))
        drawn = metrics["rollout/samples"] * metrics["rollout/length"]
        accuracy = "" if self.accuracy is None else f" held-out {self.accuracy:.2f}"
        facts = f"reward {metrics['rollout/reward']:.2f}{accuracy} {drawn / spent:,.0f} tok/s {_clock(left)} left"
        self._bar.update(self._task, completed=step, facts=facts)
        last = step == self.session.run.steps
        if not self.console.is_terminal and (last or step == 1 or now - self._shown > 5):
            self._shown = now
            self.console.print(f"step {step}/{self.session.run.steps} {facts}", soft_wrap=True)

    def evaluated(self, step: int, evaluation: Evaluation, numbers: Metrics) -> None:
        assert self.session is not None
        self.accuracy = numbers["pass@1"]
        told = (numbers, evaluation.examples())
        if step == 0:
            self.before = told
        else:  # the last one stays
            self.after = told
        self.console.print(f"step {step}: held-out accuracy {interval(numbers)}", soft_wrap=True)
        self._last = time.monotonic()

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def interval(numbers: Metrics) -> str:
    """``0.31 [0.28, 0.35]``."""
    return f"{numbers['pass@1']:.3f} [{numbers['pass@1_low']:.3f}, {numbers['pass@1_high']:.3f}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def tell_result(console: Console, reporter: ConsoleReporter, curve: Path) -> None:
    """Before and after, two rollouts of each, where things lie, and what to try next."""
    session = reporter.session
    assert session is not None
    if reporter.before and reporter.after:
        told = {"before": reporter.before[0], "after": reporter.after[0]}
        table = Table(title="held-out problems", title_justify="left", box=None, padding=(0, 2, 0, 0))
        few = min(8, session.run.eval.samples)
        for column in ("", "accuracy [95 %]", f"none of {few}", "steps right", "tokens"):
            table.add_column(column, justify="left" if not column else "right")
        for name, n in told.items():
            steps = f"{n['process_correct']:.3f}" if "process_correct" in n else "-"
            table.add_row(name, interval(n), f"{n['none_pass']:.3f}", steps, f"{n['length']:.0f}")
        console.print()
        console.print(table)
        gain = told["after"]["pass@1"] - told["before"]["pass@1"]
        console.print(f"{gain * 100:+.1f} points", style="bold")
        for old, new in zip(reporter.before[1], reporter.after[1], strict=True):
            console.print(_rollouts(session, old, new))
    directory = session.run.directory
    console.print(f"run    {directory}", markup=False, soft_wrap=True)
    console.print(f"curve  {curve}", markup=False, soft_wrap=True)
    console.print("\nTry next:", style="bold")
    chain = session.run.task.name == "chain"
    replay = f"mulligan replay {directory} --step {session.step} --method nsr    # the same samples, other credit"
    for line in (
        f"mulligan eval {directory} --split test --samples 8",
        "mulligan train --method srpo task.level=4    # longer chains, resets" if chain else "mulligan methods",
        *([replay] if session.run.log.samples else []),
        f"mulligan export {directory} --to my-model",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True, highlight=False)


def _rollouts(session: Session, old: Outcome, new: Outcome) -> Panel:
    text = Text()
    for name, sample in (("before", old), ("after", new)):
        text.append(f"{name:7}", style="dim")
        steps = session.task.of(sample.problem).split_steps(sample.text)
        wrong = sample.grade.first_wrong_step
        for number, step in enumerate(steps, 1):
            text.append(step, style="bold red underline" if number == wrong else "")
        verdict = str(sample.grade.verdict)
        where = f", first wrong step {wrong}" if wrong else ""
        text.append(f"  {verdict}{where}\n", style="green" if sample.passed else "red")
    text.append(f"gold   {new.problem.answer}", style="dim")
    return Panel(text, title=Text(new.problem.prompt[:200]), title_align="left")

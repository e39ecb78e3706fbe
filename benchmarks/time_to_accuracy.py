"""Seconds of training until 80 % of held-out `chain` problems are solved: TRL against ours, from the plain pico base.

    python benchmarks/time_to_accuracy.py [--seeds 9] [--rates 4e-4,6e-4,3e-4,9e-4,2e-4,1.3e-3] [--json]

prints one table (``--json``: one object with ``work``, ``ratio``, ``goal``); about 20 minutes of one quiet core. Wants
TRL: pip install 'mulligan[trl]'.

Both start from the same directory and read the same training problems in the same steps, 16 prompts x 8 responses of at
most 128 tokens at temperature 1, rewarded by the same code, one update a step with the same AdamW and clipping. After
every step the weights of each are put into one and the same evaluator: the first 128 problems of the test split, 4
samples each at temperature 1 (what ``make demo`` reports, of another split), with the same random numbers every time.
Evaluations are on nobody's clock. The time is that of all steps up to the first evaluation at 80 % or more.

The learning rate is tuned for each over the same grid, with three seeds that are not measured: the rate that needs the
fewest steps in all three together, and of equal ones that with the higher accuracies there. A race is given up where
the longest of the best rate had arrived already, so the middle ones come first.

TRL runs with the fastest of its settings (``peer_trl.py``). Seeds are 0, 1, 2, ...: none is picked. In every race the
steps of the two alternate, so that a busy machine is busy for both.

Where the two learn differently: TRL divides by the standard deviation with n - 1 and adds 1e-4, we with n and 1e-6, so
its advantages are 0.935 of ours, which Adam sees through the clipped norm alone. Loss (clipped, token mean over the
whole step), KL (none) and all else are equal. We skip the rows whose advantage is 0, since their gradient is 0 too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peer_trl import Order, Ours, Setting, best_setting, check_work, hush, need_trl, our_optimizer, train_trl
from rich.console import Console
from rich.table import Table

from mulligan.config import validate
from mulligan.evaluate import evaluate
from mulligan.models.loading import LoadedModel, load_model, save_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.session import Session, prepare
from mulligan.tasks import build_task
from mulligan.texts import Texts

GOAL = 2.0
TARGET = 0.8
BASE, TASK, LEVEL = "pico-qwen3", "chain", 4
PROMPTS, SAMPLES, NEW = 16, 8, 128
EVERY = 1  # steps between evaluations
PROBLEMS, EVAL_SAMPLES = 128, 4
MOST = 40  # steps, after which a run has failed to arrive
RATES = (4e-4, 6e-4, 3e-4, 9e-4, 2e-4, 1.3e-3)
TUNING_SEEDS = (1000, 1001, 1002)


@dataclass
class Course:
    """How one training went."""

    most: int = MOST
    seconds: list[float] = field(default_factory=list)  # of each step
    accuracies: dict[int, float] = field(default_factory=dict)  # by steps done

    @property
    def steps(self) -> int:
        return len(self.seconds)

    @property
    def last(self) -> float:
        """The newest accuracy."""
        return list(self.accuracies.values())[-1] if self.accuracies else 0.0

    @property
    def arrived(self) -> bool:
        return self.last >= TARGET

    @property
    def over(self) -> bool:
        return self.arrived or self.steps >= self.most

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: steps until it arrived, then accuracy."""
        return (self.steps if self.arrived else float("inf"), -self.last)


class Examiner:
    """One evaluator for both sides: a model of its own that takes on their weights."""

    def __init__(self, folder: Path) -> None:
        loaded = load_model(str(folder))
        self.model, self.task = loaded.model, build_task(TASK, {"level": LEVEL})
        self.texts = Texts(self.task, loaded.tokenizer)
        self.sampler = EmbeddedSampler(
            self.model, loaded.tokenizer, max_new_tokens=NEW, max_rows=PROBLEMS * EVAL_SAMPLES
        )

    def accuracy(self, weights: torch.nn.Module) -> float:
        self.model.load_state_dict(weights.state_dict())
        found = evaluate(
            self.task, self.texts, self.sampler, samples=EVAL_SAMPLES, split="test", problems=PROBLEMS, chunk=PROBLEMS
        )
        return found.numbers()["pass@1"]


def save_base(folder: Path) -> LoadedModel:
    """The base as a directory that both sides load."""
    base = load_model(BASE)
    base.tokenizer.split_special_tokens = False  # TRL puts no BOS before a prompt unless it is spelled out there
    save_model(base.model, base.tokenizer, folder)
    return base


def our_session(model: Path, out: Path, rate: float, seed: int) -> Session:
    """Our run."""
    return prepare(
        validate(
            {
                "steps": MOST,
                "seed": seed,
                "out": str(out),
                "model": {"name": str(model), "kernels": not torch.cuda.is_available()},
                "task": {"name": TASK, "level": LEVEL},
                "method": {"name": "grpo", "group_size": SAMPLES},
                "sampling": {"prompts": PROMPTS, "max_new_tokens": NEW},
                "optimizer": our_optimizer(rate),
                "log": {"samples": False},
            }
        )
    )


def trl_order(model: Path, examiner: Examiner, rate: float, seed: int) -> Order:
    """The same for TRL: the training problems that our run reads, in its order."""
    task, texts = examiner.task, examiner.texts
    problems = [task.problem("train", index) for index in range(MOST * PROMPTS)]
    prompts = [str(texts.tokenizer.bos_token) + task.prompt(problem) for problem in problems]
    for problem, read in zip(problems, texts.tokenizer(prompts)["input_ids"], strict=True):
        if tuple(read) != texts.prompt(problem):
            raise SystemExit(f"TRL would read {problem.uid} otherwise than we do: {read}, {texts.prompt(problem)}")

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [task.grade(problems[n], [text])[0].reward for n, text in zip(number, completions, strict=True)]

    return Order(
        model=model,
        prompts=prompts,
        columns={"number": list(range(len(problems)))},
        reward=reward,
        width=PROMPTS,
        samples=SAMPLES,
        new=NEW,
        rate=rate,
        seed=seed,
    )


def race(
    folder: Path,
    examiner: Examiner,
    setting: Setting,
    rates: tuple[float, float],
    seed: int,
    every: int = EVERY,
    most: tuple[int, int] = (MOST, MOST),
) -> tuple[Course, Course]:
    """TRL's training and ours, step beside step until each has arrived.

    Args:
        rates: TRL's and ours.
        every: steps between evaluations.
        most: steps of each.
    """
    theirs, mine = Course(most[0]), Course(most[1])
    order = trl_order(folder / "model", examiner, rates[0], seed)
    out = folder / f"ours-{rates[1]:g}-{seed}"
    ours = Ours(our_session(folder / "model", out, rates[1], seed), out)

    def note(course: Course, seconds: float, model: torch.nn.Module) -> bool:
        course.seconds.append(seconds)
        if course.steps % every == 0:
            course.accuracies[course.steps] = examiner.accuracy(model)
        return course.over

    def step() -> None:
        if not mine.over:
            note(mine, ours.step(), ours.session.learner.model)

    def pair(seconds: float, model: torch.nn.Module) -> bool:
        step()
        return note(theirs, seconds, model)

    check_work(train_trl(order, setting, most[0], pair, folder / "trl"), order, theirs.steps)
    while not mine.over:
        step()
    ours.close(PROMPTS * SAMPLES)
    return theirs, mine


def tune(
    folder: Path, examiner: Examiner, setting: Setting, rates: Sequence[float], say: Callable[[str], None]
) -> tuple[float, float]:
    """The best rates of the grid, TRL's and ours."""
    best: list[tuple[tuple[float, float], float]] = [((float("inf"), 0.0), rates[0])] * 2
    most = (MOST, MOST)  # steps in which the best rates have arrived with every seed
    for rate in rates:
        races = [race(folder, examiner, setting, (rate, rate), seed, EVERY, most) for seed in TUNING_SEEDS]
        ends = list(most)
        for who in range(2):
            courses = [each[who] for each in races]
            rank = (sum(c.rank[0] for c in courses), sum(c.rank[1] for c in courses))
            if rank < best[who][0]:
                best[who] = (rank, rate)
                ends[who] = min(MOST, max(c.steps for c in courses))
        most = (ends[0], ends[1])
        for seed, courses in zip(TUNING_SEEDS, races, strict=True):
            say(f"rate {rate:g}, seed {seed}: TRL {told(courses[0])}, ours {told(courses[1])}")
    for whose, (_, rate) in zip(("TRL's", "our"), best, strict=True):
        if rate in (min(rates), max(rates)) and len(rates) > 1:
            say(f"{whose} best rate {rate:g} is at the grid's end: a wider grid may have a better one")
    return best[0][1], best[1][1]


def told(course: Course) -> str:
    """In words."""
    return f"{course.last:.3f} after {course.steps} steps, {sum(course.seconds):.1f} s"


def measure(say: Callable[[str], None], seeds: int = 9, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """The row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_base(folder / "model")
        examiner = Examiner(folder / "model")
        before = examiner.accuracy(base.model)
        say(f"{BASE} on {TASK}, level {LEVEL}: {before:.3f} of the held-out problems")
        setting = best_setting(trl_order(folder / "model", examiner, RATES[0], TUNING_SEEDS[0]), folder / "search", say)
        chosen = tune(folder, examiner, setting, rates, say)
        races = []
        for seed in range(seeds):
            races.append(race(folder, examiner, setting, chosen, seed))
            say(f"seed {seed}: TRL {told(races[-1][0])}, ours {told(races[-1][1])}")
    ratios = [sum(theirs.seconds) / sum(mine.seconds) for theirs, mine in races]
    pairs = [a / b for theirs, mine in races for a, b in zip(theirs.seconds, mine.seconds, strict=False)]
    out: dict[str, Any] = {
        "work": f"to {TARGET:.0%} of {TASK} (level {LEVEL}) from {BASE}, {PROMPTS} x {SAMPLES}",
        "ratio": statistics.median(ratios),
        "goal": GOAL,
        "ratios": ratios,
        "step_ratio": statistics.median(pairs),  # of single steps: what speed alone makes
        "accuracy_before": before,
        "trl_setting": str(setting),
    }
    for who, rate, courses in zip(("trl", "our"), chosen, zip(*races, strict=True), strict=True):
        out |= {
            f"{who}_rate": rate,
            f"{who}_seconds": [sum(c.seconds) for c in courses],
            f"{who}_steps": [c.steps for c in courses],
            f"{who}_arrived": [c.arrived for c in courses],
            f"{who}_accuracies": [list(c.accuracies.items()) for c in courses],
        }
    return out


def print_table(row: dict[str, Any], console: Console) -> None:
    """A line a seed, then the medians."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"{row['work']}, {row['accuracy_before']:.3f} before")
    for name in ("seed", "TRL s", "ours s", "ratio", "TRL steps", "our steps", "goal"):
        table.add_column(name, justify="right")

    def seconds(who: str, seed: int) -> str:
        return f"{'' if row[f'{who}_arrived'][seed] else '> '}{row[f'{who}_seconds'][seed]:.1f}"

    for seed, ratio in enumerate(row["ratios"]):
        steps = [str(row[f"{who}_steps"][seed]) for who in ("trl", "our")]
        table.add_row(str(seed), seconds("trl", seed), seconds("our", seed), f"{ratio:.2f}", *steps, "")
    middle = {key: statistics.median(row[key]) for key in ("trl_seconds", "our_seconds", "trl_steps", "our_steps")}
    table.add_row(
        "median",
        f"{middle['trl_seconds']:.1f}",
        f"{middle['our_seconds']:.1f}",
        f"{row['ratio']:.2f}",
        f"{middle['trl_steps']:g}",
        f"{middle['our_steps']:g}",
        f"{row['goal']:g}",
    )
    console.print(table)
    console.print(
        f"rates: TRL {row['trl_rate']:g}, ours {row['our_rate']:g}; a step of TRL takes {row['step_ratio']:.2f} times "
        f"as long as ours; TRL {row['trl_setting']}",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="tuned over, with commas")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args()
    try:
        rates = [float(rate) for rate in arguments.rates.split(",")]
    except ValueError:
        raise SystemExit(f"--rates: '{arguments.rates}' are no numbers with commas between them") from None
    if arguments.seeds < 1 or min(rates) <= 0:
        raise SystemExit("--seeds must be at least 1 and every rate above 0")
    need_trl()
    hush()
    err = Console(stderr=True)
    row = measure(lambda text: err.print(text, highlight=False), arguments.seeds, rates)
    if arguments.json:
        print(json.dumps(row), flush=True)
    else:
        print_table(row, Console(width=140))


if __name__ == "__main__":
    main()

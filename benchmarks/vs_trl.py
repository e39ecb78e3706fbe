"""A whole GRPO step of TRL against one of ours: same model directory, prompts, rewards, group size and lengths.

    python benchmarks/vs_trl.py [--rows 0,1,2,3,4] [--pairs 5] [--json]

prints one table (``--json``: one object a row with ``work``, ``ratio``, ``goal``). Wants TRL:
pip install 'mulligan[trl]'. Steps of the two alternate in one process, so that a busy machine is busy for both; the
ratio is the median over the pairs of time(TRL) / time(ours), with the least and the largest beside it. Rows 0 to 3 take
two to twelve minutes each of one quiet core; row 4 is the time to an accuracy, a table of its own
(``time_to_accuracy.py``).

TRL runs with the fastest of the settings that are tried first (``peer_trl.py`` says which, and what was tried by hand):
completions a forward pass, precision, attention, cache. Ours is looked for in the same way: precision (of row 3 alone),
``model.kernels``, ``model.compile``, the size of the learner's passes. What comes before the first step is on nobody's
clock. Both sides have float32 master weights, the same fused AdamW and the same clipping, and one update a step over
all rows. The run ends where either sampled or trained another number of rows, where TRL's responses are of another
length than ours beyond chance (4 standard errors), or where the optimizers differ.

``least s`` is the machine's own limit: the floating-point operations that a step cannot avoid, divided by the fastest
matrix product measured in the same run. Each weight of the layers is multiplied once a token in sampling (2 operations)
and three times in learning (6), a prompt's tokens counting once a group, not once a response; attention takes 4
operations a layer, channel and token looked at in sampling and 12 in learning; the head works on response tokens alone.
``at its shapes`` divides the same operations by what the model's own matrix products reach, of as many rows as decode
(sampling) or a micro-batch (learning) has: what is left beyond it is attention, normalisation, all that is no product.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peer_trl import Order, Ours, best_setting, check_work, hush, need_trl, our_optimizer, synchronise, train_trl
from rich.console import Console
from rich.table import Table
from workload import WORDS, Work, make_model

from mulligan.config import validate
from mulligan.models.loading import load_model
from mulligan.session import prepare

RATE = 1e-6
ROWS = (
    Work(name="1.1M, 16-token prompts, 64 new", goal=1.5),
    Work(name="1.1M, 16-token prompts, mean 64, at most 256 new", goal=3.0, new=256, mean=64),
    Work(name="1.1M, 512-token prompts, 64 new", goal=5.0, prompt=512),
    Work(name="8.4M, 16-token prompts, 64 new", goal=3.0, width=320, layers=6, precisions=("float32", "bfloat16")),
)
REWARD = '''"""Half of the completions are right, whoever writes them."""


def even(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]
'''


@dataclass(frozen=True)
class Own:
    """How we are run."""

    sampling: str = "float32"  # precision of the weights that sample
    learning: str = "float32"  # and of the learner's passes
    kernels: bool = False
    compiled: bool = False
    micro_batch: int = 2048  # tokens of a pass of the learner

    def __str__(self) -> str:
        words = [word for word in ("kernels", "compiled") if getattr(self, word)] or ["neither kernels nor compiled"]
        return (
            f"sampling {self.sampling}, learning {self.learning}, {', '.join(words)}, "
            f"passes of {self.micro_batch:,} tokens"
        )


def even(completions: list[str], **columns: Any) -> list[float]:
    """As the file above, for TRL."""
    return [float(len(text) % 2 == 0) for text in completions]


def prompts_of(work: Work, count: int) -> list[str]:
    """Random words, one token each."""
    rng = random.Random(0)
    return [" ".join(str(rng.randrange(WORDS)) for _ in range(work.prompt)) for _ in range(count)]


def our_run(work: Work, folder: Path, own: Own, name: str) -> Ours:
    """A run over the same prompts and rewards; ``name`` is that of its directory."""
    out = folder / name
    (folder / "reward.py").write_text(REWARD)
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts_of(work, 4 * work.prompts)]
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "test.jsonl").write_text(json.dumps({"prompt": "1 2 3"}) + "\n")
    (data / "dev.jsonl").write_text(json.dumps({"prompt": "4 5 6"}) + "\n")
    session = prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(out),
                "model": {
                    "name": str(folder / "model"),
                    "compute_dtype": own.learning,
                    "kernels": own.kernels,
                    "compile": own.compiled,
                },
                "task": {
                    "name": "jsonl",
                    "path": str(data),
                    "instruction": "",
                    "rewards": [f"{folder / 'reward.py'}:even"],
                },
                "method": {"name": "grpo", "group_size": work.samples},
                "sampling": {
                    "prompts": work.prompts,
                    "max_new_tokens": work.new,
                    "max_rows": work.prompts * work.samples,
                    "dtype": own.sampling,
                },
                "optimizer": {**our_optimizer(RATE), "tokens_per_micro_batch": own.micro_batch},
                "log": {"samples": False},
            }
        )
    )
    return Ours(session, out)


def best_own(work: Work, folder: Path, say: Callable[[str], None]) -> Own:
    """The fastest of our settings, found as TRL's is: one choice after another, by the fastest of three steps."""
    best, least = Own(), math.inf
    choices: list[dict[str, Any]] = [{}, {"compiled": True}, {"micro_batch": 4096}]
    if not torch.cuda.is_available():
        choices.insert(1, {"kernels": True})
    if "bfloat16" in work.precisions:
        choices[1:1] = [{"sampling": "bfloat16"}, {"learning": "bfloat16"}]
    for number, choice in enumerate(choices):
        own = replace(best, **choice)
        ours = our_run(work, folder, own, f"search-{number}")
        seconds = min(ours.step() for _ in range(3))
        ours.close(work.prompts * work.samples)
        say(f"ours, {own}: {seconds:.2f} s")
        if seconds <= least:
            best, least = own, seconds
    return best


# ---- the machine's limit --------------------------------------------------------------------------------------------


def product_rate(m: int, k: int, n: int, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Floating-point operations a second of [m, k] x [k, n], the best of some tries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        synchronise()
        begun = time.perf_counter()
        a @ b
        synchronise()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * m * k * n / best


def ceiling(dtype: torch.dtype) -> float:
    """Of the fastest of some square products."""
    sizes = (512, 1024, 2048, 8192) if torch.cuda.is_available() else (512, 1024, 2048)
    return max(product_rate(size, size, size, dtype) for size in sizes)


@dataclass(frozen=True)
class Least:
    """Operations that a step cannot avoid."""

    sampling: float
    learning: float


def least_operations(work: Work, model: torch.nn.Module, lengths: list[int]) -> Least:
    """Counted as the text above says.

    Args:
        lengths: of some responses; their mean stands for a step's.
    """
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head - model.get_input_embeddings().weight.numel()
    rows, count = work.prompts * work.samples, len(lengths)
    new = rows * sum(lengths) / count
    products = body * work.prompts * work.prompt + (body + head) * new
    # Token i of a prompt looks at i tokens, and one of a response at its prompt too.
    seen = work.prompts * work.prompt**2 / 2 + rows * sum(work.prompt * n + n * n / 2 for n in lengths) / count
    looks = work.layers * work.width * seen
    return Least(sampling=2 * products + 4 * looks, learning=6 * products + 12 * looks)


def limits(work: Work, model: torch.nn.Module, lengths: list[int], own: Own) -> dict[str, float]:
    """Seconds that a step takes at least, and the numbers that they follow from."""
    least = least_operations(work, model, lengths)
    kinds = [getattr(torch, name) for name in (own.sampling, own.learning)]
    tops = [ceiling(kind) for kind in kinds]
    rows = work.prompts * work.samples
    wide = (work.width, 3 * work.width)
    rates = [product_rate(m, *wide, kind) for m, kind in zip((rows, own.micro_batch), kinds, strict=True)]
    return {
        "least_seconds": least.sampling / tops[0] + least.learning / tops[1],
        "seconds_at_its_shapes": least.sampling / rates[0] + least.learning / rates[1],
        "gflop_sampling": least.sampling / 1e9,
        "gflop_learning": least.learning / 1e9,
        "gflops_ceiling_sampling": tops[0] / 1e9,
        "gflops_ceiling_learning": tops[1] / 1e9,
        "gflops_own_sampling": rates[0] / 1e9,
        "gflops_own_learning": rates[1] / 1e9,
    }


# ---- a row ----------------------------------------------------------------------------------------------------------


def check_lengths(theirs: list[int], total: int, count: int) -> None:
    """Whether both sampled responses of the same length, as far as chance allows.

    Args:
        theirs: TRL's, each.
        total: tokens of our responses.
        count: our responses.
    """
    gap = statistics.mean(theirs) - total / count
    allowed = 4 * statistics.pstdev(theirs) * math.sqrt(1 / len(theirs) + 1 / count)
    if abs(gap) > allowed:
        raise SystemExit(f"TRL's responses are {gap:+.2f} tokens longer than ours; chance allows {allowed:.2f}")


def measure(work: Work, pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_model(work, folder / "model")
        order = Order(
            model=folder / "model",
            prompts=prompts_of(work, 4 * work.prompts),
            reward=even,
            width=work.prompts,
            samples=work.samples,
            new=work.new,
            rate=RATE,
        )
        setting = best_setting(order, folder / "search", say)
        own = best_own(work, folder, say)
        ours, steps = our_run(work, folder, own, "ours"), pairs + 1
        theirs: list[float] = []
        mine: list[float] = []

        def pair(seconds: float, _: Any) -> bool:
            theirs.append(seconds)
            mine.append(ours.step())
            return False

        done = train_trl(order, setting, steps, pair, folder / "trl")
        last = ours.close(work.prompts * work.samples)
        check_work(done, order, steps)
        check_lengths(done.lengths, last["total/tokens"], last["total/samples"])
        model = load_model(str(folder / "model")).model
        ratios = sorted(a / b for a, b in zip(theirs[1:], mine[1:], strict=True))  # the first of each warms up
        return {
            "work": work.name,
            "ratio": statistics.median(ratios),
            "goal": work.goal,
            "ratio_least": ratios[0],
            "ratio_largest": ratios[-1],
            "trl_seconds": statistics.median(theirs[1:]),
            "our_seconds": statistics.median(mine[1:]),
            **limits(work, model, done.lengths, own),
            "parameters": parameters,
            "trl_length": statistics.mean(done.lengths),
            "our_length": last["total/tokens"] / last["total/samples"],
            "trl_setting": str(setting),
            "our_setting": str(own),
        }


def print_steps(rows: list[dict[str, Any]], console: Console) -> None:
    """The table of steps, and where its limits come from."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = ("work", "TRL s", "ours s", "ratio", "range", "goal", "least s", "at its shapes s", "lengths")
    for name in names:
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        table.add_row(
            row["work"],
            f"{row['trl_seconds']:.2f}",
            f"{row['our_seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_least']:.2f}-{row['ratio_largest']:.2f}",
            f"{row['goal']:g}",
            f"{row['least_seconds']:.2f}",
            f"{row['seconds_at_its_shapes']:.2f}",
            f"{row['trl_length']:.1f} / {row['our_length']:.1f}",
        )
    console.print(table)
    for row in rows:
        console.print(
            f"{row['work']}: TRL {row['trl_setting']}; ours {row['our_setting']}. Least: "
            f"{row['gflop_sampling']:.0f} GFLOP / {row['gflops_ceiling_sampling']:.0f} GFLOP/s + "
            f"{row['gflop_learning']:.0f} / {row['gflops_ceiling_learning']:.0f}; at its shapes "
            f"{row['gflops_own_sampling']:.0f} and {row['gflops_own_learning']:.0f} GFLOP/s",
            highlight=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="0,1,2,3,4", help="which rows of the table; 4: time to an accuracy")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    arguments = parser.parse_args()
    chosen = arguments.rows.split(",")
    if unknown := [row for row in chosen if row not in list("01234")]:
        raise SystemExit(f"--rows: there is no row '{unknown[0]}'; they are 0 to 4")
    if arguments.pairs < 1:
        raise SystemExit(f"--pairs is {arguments.pairs}, but must be at least 1")
    need_trl()
    hush()
    err, out = Console(stderr=True), Console(width=140)

    def say(text: str) -> None:
        err.print(text, highlight=False)

    rows = []
    for index in sorted(int(row) for row in chosen if row != "4"):
        rows.append(measure(ROWS[index], arguments.pairs, say))
        if arguments.json:
            print(json.dumps(rows[-1]), flush=True)
    if rows and not arguments.json:
        print_steps(rows, out)
    if "4" in chosen:
        import time_to_accuracy

        row = time_to_accuracy.measure(say)
        if arguments.json:
            print(json.dumps(row), flush=True)
        else:
            time_to_accuracy.print_table(row, out)


if __name__ == "__main__":
    main()

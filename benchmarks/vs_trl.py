"""A whole GRPO step of TRL against one of ours: same model directory, prompts, rewards, group size and lengths.

    python benchmarks/vs_trl.py [--rows 0,2] [--pairs 5] [--json]

prints one table (``--json``: one object a row with ``work``, ``ratio``, ``goal``). Wants TRL. Steps of the two
alternate in one process, so that a busy machine is busy for both; the ratio is the median over the pairs of
time(TRL) / time(ours). TRL runs with the fastest of the settings that are tried first: batch size, cache and precision.

Beside it stands the machine's own limit: the floating-point operations that a step cannot avoid, divided by the fastest
matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from workload import WORDS, Work, make_model

from mulligan.config import validate
from mulligan.log import RunLog, read_metrics
from mulligan.session import Session, prepare
from mulligan.stopping import Stopper
from mulligan.train import one_step

LEARNING_RATE = 1e-6
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


TRL_LENGTHS: list[int] = []


def even(completions: list[str], **columns: Any) -> list[float]:
    """As the file above, for TRL; it notes how much was sampled."""
    TRL_LENGTHS.extend(map(len, columns["completion_ids"]))
    return [float(len(text) % 2 == 0) for text in completions]


@dataclass(frozen=True)
class Setting:
    """How TRL is run."""

    batch: int = 256  # completions a forward pass; the rest is accumulated
    cache: str | None = None
    precision: str = "float32"


class Quiet:
    """Our reporter, which says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def prompts_of(work: Work, count: int) -> list[str]:
    """Random words, one token each."""
    rng = random.Random(0)
    return [" ".join(str(rng.randrange(WORDS)) for _ in range(work.prompt)) for _ in range(count)]


def our_session(work: Work, folder: Path) -> Session:
    """A run over the same prompts and rewards."""
    (folder / "reward.py").write_text(REWARD)
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts_of(work, 4 * work.prompts)]
    rows = work.prompts * work.samples
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "test.jsonl").write_text(json.dumps({"prompt": "1 2 3"}) + "\n")
    (data / "dev.jsonl").write_text(json.dumps({"prompt": "4 5 6"}) + "\n")
    return prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(folder / "ours"),
                "model": {"name": str(folder / "model")},
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
                    "max_rows": rows,
                },
                "optimizer": {"learning_rate": LEARNING_RATE, "betas": [0.9, 0.999]},
                "log": {"samples": False},
            }
        )
    )


def trl_trainer(work: Work, folder: Path, setting: Setting, steps: int, after: Callable[[float], None]) -> Any:
    """TRL's trainer on the same prompts and rewards.

    Args:
        after: is called behind every step with its seconds; its own time is not TRL's.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after(time.perf_counter() - self.begun)

    return GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=even,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=work.prompts * work.samples // setting.batch,
            num_generations=work.samples,
            max_completion_length=work.new,
            cache_implementation=setting.cache,
            bf16=setting.precision == "bfloat16",
            model_init_kwargs={"dtype": "float32"},  # master weights; bfloat16 is by autocast
            temperature=1.0,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=steps,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts_of(work, 4 * work.prompts)}),
        callbacks=[Clock()],
    )


def train_trl(work: Work, folder: Path, setting: Setting, steps: int, after: Callable[[float], None]) -> None:
    """Runs TRL for some steps."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl_trainer(work, folder, setting, steps, after)
        trainer.train()


def best_setting(work: Work, folder: Path, say: Callable[[str], None]) -> Setting:
    """The fastest of TRL's settings, by the second of two steps."""
    found: dict[Setting, float] = {}
    candidates = [Setting(b, c, p) for p, b, c in itertools.product(work.precisions, (256, 64), (None, "static"))]
    for setting in candidates:
        times: list[float] = []
        try:
            train_trl(work, folder, setting, 2, times.append)
        except Exception as error:  # a setting that this release or machine cannot do is not its best one
            say(f"TRL cannot run {setting}: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}")
            continue
        found[setting] = times[-1]
        say(f"TRL {setting}: {times[-1]:.2f} s")
    return min(found, key=lambda setting: found[setting])


def ceiling(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of the fastest of some matrix products."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        for _ in range(4):
            begun = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def least_operations(work: Work, parameters: int, length: float) -> float:
    """What a step cannot avoid: sampling each token once (2 operations a weight), and forward and backward over the
    group's unique tokens (6)."""
    tokens = work.prompts * (work.prompt + work.samples * length)
    return 8.0 * parameters * tokens


def measure(work: Work, pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_model(work, folder / "model")
        session = our_session(work, folder)
        setting = best_setting(work, folder, say)
        theirs: list[float] = []
        ours: list[float] = []
        lengths: list[float] = []
        stopper = Stopper()
        with RunLog(folder / "ours") as log:

            def mine(seconds: float) -> None:
                theirs.append(seconds)
                begun = time.perf_counter()
                one_step(session, log, Quiet(), stopper)
                ours.append(time.perf_counter() - begun)

            TRL_LENGTHS.clear()
            train_trl(work, folder, setting, pairs + 1, mine)
            lengths = [record["rollout/length"] for record in read_metrics(folder / "ours" / "metrics.jsonl")]
        theirs, ours = theirs[1:], ours[1:]  # the first of each warms up
        limit = least_operations(work, parameters, statistics.mean(lengths)) / ceiling()
        return {
            "work": work.name,
            "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
            "goal": work.goal,
            "trl_seconds": statistics.median(theirs),
            "our_seconds": statistics.median(ours),
            "least_seconds": limit,
            "parameters": parameters,
            "trl_length": statistics.mean(TRL_LENGTHS),
            "our_length": statistics.mean(lengths),
            "trl_setting": f"batch {setting.batch}, {setting.cache or 'dynamic'} cache, {setting.precision}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="0,1,2,3", help="which rows of the table")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    err = Console(stderr=True)
    rows = []
    for index in map(int, arguments.rows.split(",")):
        row = measure(ROWS[index], arguments.pairs, lambda text: err.print(text, highlight=False))
        rows.append(row)
        if arguments.json:
            print(json.dumps(row), flush=True)
    if arguments.json:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("work", "TRL s", "ours s", "ratio", "goal", "least s", "lengths", "TRL's best setting"):
        table.add_column(column, justify="left" if column in ("work", "TRL's best setting") else "right")
    for row in rows:
        table.add_row(
            row["work"],
            f"{row['trl_seconds']:.2f}",
            f"{row['our_seconds']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['goal']:g}",
            f"{row['least_seconds']:.2f}",
            f"{row['trl_length']:.1f} / {row['our_length']:.1f}",
            row["trl_setting"],
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

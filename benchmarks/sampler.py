"""Sampling against transformers: tokens a second of the embedded sampler, ``generate()`` and continuous batching.

    python benchmarks/sampler.py [--repeats 5] [--threads 1] [--json]

All three sample from one model in one process and take turns, so that a busy machine is busy for all. A ratio is the
median over the turns of time(peer) / time(ours) for a token. ``generate()`` runs with the best of its caches, on
the batches that our ``max_rows`` allows, and continuous batching with the best of three sizes of its batch; both are
tried once before. ``generate()`` prefills every sample's prompt; continuous batching shares whole blocks of prompts.

The memory limit is the time that the least bytes of decoding need: in every step all weights, and the keys and values
of the live rows, once, at the bandwidth of summing an array far larger than the caches, measured between the turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging
from workload import EOS, PAD, Work, make_model, make_prompts

from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.seeds import seed_of
from mulligan.types import Problem, Request

SPREAD = Work(name="mean 64, at most 256 new", goal=1.0, new=256, mean=64)
WORKS = (
    (Work(name="exactly 64 new", goal=1.0), 256),
    (replace(SPREAD, name=f"{SPREAD.name}, 64 places"), 64),
    (replace(SPREAD, name=f"{SPREAD.name}, 256 places"), 256),
    (Work(name="512-token prompts, 64 new", goal=1.0, prompt=512), 256),
)
PAGE = 32  # tokens of a block of continuous batching's cache
BATCH_TOKENS = (32, 64, 128)  # what continuous batching is tried with, tokens of one forward
MEASURED = 64 * 2**20  # float32 numbers that are summed for the bandwidth


@dataclass(frozen=True)
class Turn:
    """What one sampler did in one turn."""

    seconds: float
    lengths: list[int]  # own tokens of each response, EOS included

    @property
    def rate(self) -> float:
        return sum(self.lengths) / self.seconds


class Bench:
    """One work, and everybody who does it."""

    def __init__(self, work: Work, places: int, folder: Path) -> None:
        self.work, self.places = work, places
        self.parameters = make_model(work, folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = make_prompts(work)
        self.rows = [prompt for prompt in self.prompts for _ in range(work.samples)]

    def ours(self, turn: int) -> Turn:
        sampler = EmbeddedSampler(self.model, self.tokenizer, max_new_tokens=self.work.new, max_rows=self.places)
        requests = []
        for i, prompt in enumerate(self.prompts):
            problem = Problem(task="benchmark", split="test", index=i, prompt="", answer="")
            seeds = tuple(seed_of(turn, i, k) for k in range(self.work.samples))
            requests.append(Request(problem=problem, group=i, n=self.work.samples, context=prompt, seeds=seeds))
        lengths: list[int] = []
        begun = time.perf_counter()
        sampler.run(requests, lambda _, done: lengths.extend(len(each.tokens) for each in done) or ())
        return Turn(time.perf_counter() - begun, lengths)

    def generate(self, turn: int, cache: str | None) -> Turn:
        torch.manual_seed(turn)
        lengths: list[int] = []
        begun = time.perf_counter()
        for start in range(0, len(self.rows), self.places):
            ids = torch.tensor(self.rows[start : start + self.places])
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.work.new,
                cache_implementation=cache,
            )
            lengths += own_lengths(out[:, ids.shape[1] :])
        return Turn(time.perf_counter() - begun, lengths)

    def continuous(self, turn: int, tokens: int) -> Turn:
        torch.manual_seed(turn)
        # By default it takes most of the machine's memory, and more rows at once than its attention over all of their
        # keys (the CPU has no paged one) is fast with.
        blocks = tokens * (math.ceil((self.work.prompt + self.work.new) / PAGE) + 1)
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=tokens)
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=self.work.new, eos_token_id=EOS, pad_token_id=PAD
        )
        inputs = [list(row) for row in self.rows]
        begun = time.perf_counter()
        out = self.model.generate_batch(
            inputs=inputs, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        seconds = time.perf_counter() - begun
        lengths = [len(each.generated_tokens) for each in out.values()]
        if len(lengths) != len(self.rows):
            raise RuntimeError(f"{len(lengths)} of {len(self.rows)} responses came back")
        return Turn(seconds, lengths)

    def least_bytes(self, lengths: list[int]) -> float:
        """Bytes that decoding must read: weights, and each row's keys and values, once a step with all places full."""
        config = self.model.config
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        # The embedding is looked up, so only the rest of the weights is read; a token's step follows the one before it.
        weights = 4 * (self.parameters - config.vocab_size * config.hidden_size)
        steps = max(max(lengths), sum(lengths) / self.places) - 1
        states = sum((n - 1) * self.work.prompt + n * (n - 1) / 2 for n in lengths) * token
        return steps * weights + states


def own_lengths(tokens: torch.Tensor) -> list[int]:
    """Tokens of each row up to its first EOS, that one included."""
    ended = (tokens == EOS).cumsum(-1) - (tokens == EOS).long() > 0
    return (~ended).sum(-1).tolist()


def bandwidth() -> float:
    """Bytes a second of reading memory: the best of three sums over an array larger than any cache."""
    numbers = torch.ones(MEASURED)
    best = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        numbers.sum()
        best = max(best, 4 * MEASURED / (time.perf_counter() - begun))
    return best


def measure(work: Work, places: int, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(work, places, Path(folder))
    tried: dict[str | None, float] = {cache: bench.generate(0, cache).rate for cache in (None, "static")}
    best = max(tried, key=lambda cache: tried[cache])
    peers: dict[str, Callable[[int], Turn]] = {"generate": lambda turn: bench.generate(turn, best)}
    missing, size = "", 0
    try:
        rate = {tokens: bench.continuous(0, tokens).rate for tokens in BATCH_TOKENS}
        size = max(rate, key=lambda tokens: rate[tokens])
        peers["continuous"] = lambda turn: bench.continuous(turn, size)
    except Exception as error:  # whatever it is that this release lacks on this machine is said in the table
        missing = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    bench.ours(0)
    turns: dict[str, list[Turn]] = {name: [] for name in ("ours", *peers)}
    speeds = []
    for turn in range(1, repeats + 1):
        turns["ours"].append(bench.ours(turn))
        for name, run in peers.items():
            turns[name].append(run(turn))
        speeds.append(bandwidth())
    if work.mean is None:
        wanted = len(bench.rows) * work.new
        for name, each in turns.items():
            assert all(sum(turn.lengths) == wanted for turn in each), f"{name} did not sample {wanted} tokens"
    speed = statistics.median(speeds)
    limit = [bench.least_bytes(turn.lengths) / speed / turn.seconds for turn in turns["ours"]]

    def ratio(name: str) -> float | None:
        if name not in turns:
            return None
        return statistics.median(ours.rate / peer.rate for ours, peer in zip(turns["ours"], turns[name], strict=True))

    rates = {name: statistics.median(turn.rate for turn in each) for name, each in turns.items()}
    return {
        "work": work.name,
        "parameters": bench.parameters,
        "places": places,
        "tokens_per_second": rates["ours"],
        "generate_tokens_per_second": rates["generate"],
        "generate_cache": best or "dynamic",
        "ratio": ratio("generate"),
        "goal": work.goal,
        "continuous_tokens_per_second": rates.get("continuous"),
        "continuous_ratio": ratio("continuous"),
        "continuous_batch_tokens": size,
        "continuous_missing": missing,
        "bytes_per_second": speed,
        "share_of_memory_limit": statistics.median(limit),
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="tokens a second")
    for name in ("work", "ours", "generate()", "ratio", "goal", "continuous", "ratio", "of the memory limit"):
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        continuous = row["continuous_tokens_per_second"]
        table.add_row(
            row["work"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['generate_tokens_per_second']:,.0f} ({row['generate_cache']})",
            f"{row['ratio']:.2f}",
            f"{row['goal']:.1f}",
            "none" if continuous is None else f"{continuous:,.0f} ({row['continuous_batch_tokens']})",
            "" if continuous is None else f"{row['continuous_ratio']:.2f}",
            f"{row['share_of_memory_limit']:.0%}",
        )
    console = Console()
    console.print(table)
    for missing in dict.fromkeys(row["continuous_missing"] for row in rows if row["continuous_missing"]):
        console.print(f"continuous batching does not run here: {missing}", markup=False)
    console.print(f"memory: {statistics.median(row['bytes_per_second'] for row in rows) / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own number by default")
    parser.add_argument("--only", type=int, nargs="*", help="rows of the table, from 0")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = []
    for i, (work, places) in enumerate(WORKS):
        if chosen.only is None or i in chosen.only:
            rows.append(measure(work, places, chosen.repeats))
            if chosen.json:
                print(json.dumps(rows[-1]), flush=True)
    if not chosen.json:
        show(rows)


if __name__ == "__main__":
    main()

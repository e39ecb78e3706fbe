"""The learner's forward and backward pass: rows as trees against rows padded side by side, in one run.

    python benchmarks/learner.py [--prompts 8] [--pairs 5] [--dtype float32] [--json]

A work is a batch of groups of 8 rows, scored and differentiated in micro-batches of the default budget. The two layouts
take turns, so that a busy machine is busy for both; a ratio is the median of the pairs' time(flat) / time(trees).
``chosen`` is what the learner takes by its cost model, which has to be the faster one. On CUDA where there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator

import torch
from device import best_device, seconds_of
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mulligan.learner.packing import Item, layouts, micro_batches, pack
from mulligan.learner.scoring import score
from mulligan.learner.sharing import layer_costs, shares_prefixes
from mulligan.learner.trees import Trees, plant_within
from mulligan.models.kernels import take_kernels
from mulligan.models.loading import load_model
from mulligan.models.norms import take_norms
from mulligan.models.rotary import take_rotary
from mulligan.types import Tokens

GROUP, BUDGET = 8, 16384
Layout = list[tuple[list[int], Trees | None]]
Draw = Callable[[int], Tokens]  # as many random tokens


def plain(prompt: int, new: int) -> Callable[[Draw], Iterator[Item]]:
    """A group: one prompt, 8 responses."""

    def group(draw: Draw) -> Iterator[Item]:
        context = draw(prompt)
        for _ in range(GROUP):
            yield item(context, draw(new), 0)

    return group


def reset(prompt: int, new: int) -> Callable[[Draw], Iterator[Item]]:
    """A group of 4 fresh responses and 4 that continue one of them, each from anywhere."""

    def group(draw: Draw) -> Iterator[Item]:
        context, parent = draw(prompt), draw(new)
        yield item(context, parent, 0)
        for _ in range(3):
            yield item(context, draw(new), 0)
        for _ in range(4):
            branch = sum(draw(8)) % (new - 1) + 1
            yield item(context, parent[:branch] + draw(new - branch), branch)

    return group


def item(context: Tokens, response: Tokens, branch: int) -> Item:
    """A row that is trained from its branch on."""
    return Item(context, response, torch.arange(len(response)) >= branch, 1.0)


WORKS = {
    "16 + 64": plain(16, 64),
    "128 + 64": plain(128, 64),
    "512 + 64": plain(512, 64),
    "512 + 256, 4 of 8 continued": reset(512, 256),
    "512 + 512": plain(512, 512),
}


def small_qwen() -> PreTrainedModel:
    """1.1M parameters, 128 wide, with random weights."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    take_norms(model)
    take_rotary(model)
    return model


def trained(model: PreTrainedModel, items: list[Item], layout: Layout) -> float:
    """Seconds for loss and gradient of all items."""

    def work() -> None:
        for part, trees in layout:
            batch = pack([items[i] for i in part], 0, model.device, trees)
            (-score(model, batch).logprobs[-1].mean()).backward()

    seconds = seconds_of(work, model.device)
    model.zero_grad(set_to_none=True)
    return seconds


def measured(name: str, model: PreTrainedModel, work: str, prompts: int, pairs: int) -> dict[str, object]:
    """A row of the table."""
    size, generator = model.config.vocab_size, random.Random(0)
    items = [i for _ in range(prompts) for i in WORKS[work](lambda n: tuple(generator.choices(range(3, size), k=n)))]
    grown: Layout = [*plant_within([i.context + i.response for i in items], BUDGET)]
    flat: Layout = [(part, None) for part in micro_batches([len(i) for i in items], BUDGET)]
    chosen = layouts(items, BUDGET, layer_costs(model))
    times = [(trained(model, items, flat), trained(model, items, grown)) for _ in range(pairs + 1)][1:]
    return {
        "work": f"{name}, {prompts} x {GROUP}, {work}",
        "padded": sum(len(part) * max(len(items[i]) for i in part) for part, _ in flat),
        "unique": sum(len(trees.tokens) for _, trees in grown if trees is not None),
        "flat_seconds": statistics.median(t for t, _ in times),
        "trees_seconds": statistics.median(t for _, t in times),
        "ratio": statistics.median(a / b for a, b in times),
        "chosen": "flat" if chosen[0][1] is None else "trees",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    parser.add_argument("--dtype", choices=dtypes, help="of the weights; default: float32, and bfloat16 on CUDA")
    parser.add_argument("--kernels", action="store_true", help="with model.kernels")
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    chosen = parser.parse_args()
    device = best_device()
    dtype = dtypes[chosen.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    table = Table("work", "padded tokens", "unique tokens", "flat s", "trees s", "flat / trees", "chosen")
    for name, model in {"1.1M Qwen3": small_qwen(), "looped pico": load_model("pico").model}.items():
        torch.nn.Module.to(model, device)
        for weight in model.parameters():  # not the buffers: rotary tables are never rounded
            weight.data = weight.data.to(dtype)
        if not shares_prefixes(model):
            raise SystemExit(f"{name} reads flat batches alone")
        if chosen.kernels:
            take_kernels(model)
        for work in WORKS:
            row = measured(name, model.train(), work, chosen.prompts, chosen.pairs)
            if chosen.json:
                print(json.dumps(row), flush=True)
            cells = [f"{value:.2f}" if isinstance(value, float) else f"{value}" for value in row.values()]
            table.add_row(*cells)
    if not chosen.json:
        Console(width=140).print(table)


if __name__ == "__main__":
    main()

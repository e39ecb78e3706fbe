"""What sampling cannot avoid: the bytes that it must read, and the operations of its matrix products.

A token's step follows the one before it, so every step reads all weights (but the embedding, which is looked up), and
the keys and values of the live rows: of its own tokens for each row, of its prompt once for all rows of a group.
Operations: 2 a weight and token, the head on response tokens alone, each prompt once for its group; in attention 4 for
each layer, channel of the heads, and token that is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Least:
    """The least of one run of the sampler."""

    bytes: float
    steps: int  # forward passes, prefill included
    operations: float

    @property
    def working_set(self) -> int:
        """Bytes that one step reads, on average."""
        return round(self.bytes / self.steps)


def least(model: Any, prompt: int, groups: Sequence[Sequence[int]], places: int) -> Least:
    """Of sampling groups of responses.

    Args:
        model: a dense decoder of transformers whose parameters have one dtype.
        prompt: tokens of each group's prompt.
        groups: of each group, its responses' lengths.
        places: rows decoded at once.
    """
    config = model.config
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - embedding.numel()
    if head is not embedding:
        body -= head.numel()
    lengths = [n for group in groups for n in group]
    fed = sum(n - 1 for n in lengths)  # the first token comes out of the prefill, the last one is not fed
    steps = 1 + max(max(lengths) - 1, -(-fed // places))
    own = sum(n * (n - 1) // 2 for n in lengths)  # fed token i sees i own tokens
    shared = sum(max(group) - 1 for group in groups) * prompt  # rows of a group at the same step
    number = head.element_size()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    seen = fed * prompt + own + len(groups) * prompt * (prompt + 1) // 2
    products = body * (len(groups) * prompt + fed) + head.numel() * sum(lengths)
    looks = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    return Least(
        bytes=float(number * (steps * (body + head.numel()) + token * (own + shared))),
        steps=steps,
        operations=2.0 * products + 4.0 * looks,
    )


def bandwidth(size: int, device: torch.device, seconds: float = 0.1) -> float:
    """Bytes a second of reading ``size`` bytes again and again: the best of a sum and a product with a vector.

    What fits in a cache is read from there, in decoding as here.
    """
    matrix = torch.ones(max(1, size // 4096), 1024, device=device)
    vector = torch.ones(1024, device=device)
    best = 0.0
    for read in (matrix.sum, lambda: matrix @ vector):
        end, turns = time.perf_counter() + seconds / 2, 0
        while turns < 3 or time.perf_counter() < end:
            begun = time.perf_counter()
            read()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 4 * matrix.numel() / (time.perf_counter() - begun))
            turns += 1
    return best

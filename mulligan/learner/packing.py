"""Rows to batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mulligan.types import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of context and response, padded on the right to W columns.

    Causal attention never looks to the right, so right padding needs no mask, and no row's numbers depend
    on how wide its batch is beyond rounding.
    """

    tokens: torch.Tensor  # int64 [B, W]
    at: torch.Tensor  # int64 [N, 2]: (b, column) whose hidden state predicts the scored token
    targets: torch.Tensor  # int64 [N]: the scored tokens, row by row
    row: torch.Tensor  # int64 [N]: which of the B rows each scored token is of
    temperature: torch.Tensor  # float32 [N]


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence to score: log-probs of the response tokens where ``wanted`` is true."""

    context: Tokens
    response: Tokens
    wanted: torch.Tensor  # bool [T]
    temperature: float

    def __len__(self) -> int:
        return len(self.context) + len(self.response)


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows times the longest length stays within the budget; rows of like length
    go together. A row longer than the budget gets a batch of its own.

    >>> micro_batches([3, 9, 4, 8], budget=10)
    [[0, 2], [3], [1]]
    """
    out: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if out and (len(out[-1]) + 1) * lengths[index] <= budget:
            out[-1].append(index)
        else:
            out.append([index])
    return out


def pack(items: Sequence[Item], pad: int, device: torch.device) -> Batch:
    """Lays the items out as one batch.

    Raises:
        ValueError: for an item without a context: its first token would have nothing to be predicted from.
    """
    width = max(len(item) for item in items)
    tokens = torch.full((len(items), width), pad, dtype=torch.long)
    at, targets, rows, temperatures = [], [], [], []
    for b, item in enumerate(items):
        if not item.context:
            raise ValueError("a row needs a context of at least one token; P(y) starts from BOS")
        response = torch.tensor(item.response, dtype=torch.long)
        start = len(item.context)
        tokens[b, :start] = torch.tensor(item.context, dtype=torch.long)
        tokens[b, start : len(item)] = response
        wanted = item.wanted.nonzero()[:, 0]
        at.append(torch.stack([torch.full_like(wanted, b), wanted + start - 1], dim=1))
        targets.append(response[wanted])
        rows.append(torch.full_like(wanted, b))
        temperatures.append(torch.full((len(wanted),), item.temperature))
    return Batch(
        tokens=tokens.to(device),
        at=torch.cat(at).to(device),
        targets=torch.cat(targets).to(device),
        row=torch.cat(rows).to(device),
        temperature=torch.cat(temperatures).to(device),
    )

"""Rows to batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mulligan.learner.trees import Costs, Trees, plant_within
from mulligan.models import flex
from mulligan.types import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of context and response, laid out flat or as trees.

    Flat: a row each, padded on the right to W columns. Causal attention never looks to the right, so right
    padding needs no mask, and no row's numbers depend on how wide its batch is beyond rounding.
    As trees: what rows share is there once, all of it in one row of W columns; padded to whole blocks of the attention
    kernel on a GPU, and not at all on the CPU.
    """

    tokens: torch.Tensor  # int64 [B, W]; B is 1 for trees
    at: torch.Tensor  # int64 [N, 2]: (b, column) whose hidden state predicts the scored token
    targets: torch.Tensor  # int64 [N]: the scored tokens, row by row
    row: torch.Tensor  # int64 [N]: which of the rows each scored token is of
    temperature: torch.Tensor  # float32 [N]
    tempered: bool  # some temperature is not 1
    layout: dict[str, torch.Tensor]  # what the forward pass takes beside the tokens: positions and mask of trees


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


def pack(items: Sequence[Item], pad: int, device: torch.device, trees: Trees | None = None) -> Batch:
    """Lays the items out as one batch.

    Args:
        trees: of the items' rows; None: flat.

    Raises:
        ValueError: for an item without a context: its first token would have nothing to be predicted from.
    """
    layout: dict[str, torch.Tensor] = {}
    if trees is None:
        tokens = torch.full((len(items), max(len(item) for item in items)), pad, dtype=torch.long)
    else:
        # Padding is behind the last tree, where nobody sees it.
        more = flex.padded(len(trees.tokens)) - len(trees.tokens) if flex.is_for(device) else 0
        tokens = torch.tensor([trees.tokens + [pad] * more])
        layout["position_ids"] = torch.cat([trees.positions(), torch.zeros(more, dtype=torch.long)])[None].to(device)
        layout["attention_mask"] = trees.branches().mask(device)
    at, targets, rows, temperatures = [], [], [], []
    for b, item in enumerate(items):
        if not item.context:
            raise ValueError("a row needs a context of at least one token; P(y) starts from BOS")
        row = torch.tensor(item.context + item.response)
        scored = item.wanted.nonzero()[:, 0] + len(item.context)
        if trees is None:
            tokens[b, : len(row)] = row
            at.append(torch.stack([torch.full_like(scored, b), scored - 1], dim=1))
        else:
            at.append(torch.stack([torch.zeros_like(scored), trees.columns(b)[scored - 1]], dim=1))
        targets.append(row[scored])
        rows.append(torch.full_like(scored, b))
        temperatures.append(torch.full((len(scored),), item.temperature))
    return Batch(
        tokens=tokens.to(device),
        at=torch.cat(at).to(device),
        targets=torch.cat(targets).to(device),
        row=torch.cat(rows).to(device),
        temperature=torch.cat(temperatures).to(device),
        tempered=any(item.temperature != 1.0 for item in items),
        layout=layout,
    )


def layouts(items: Sequence[Item], budget: int, costs: Costs | None = None) -> list[tuple[list[int], Trees | None]]:
    """The items' indices in batches of at most ``budget`` tokens, each with its trees; None: flat.

    Args:
        costs: of the model that will read them, for the cheaper of the two layouts; None: it can read the flat one
            alone.
    """
    flat = micro_batches([len(item) for item in items], budget)
    if costs is not None:
        grown = plant_within([item.context + item.response for item in items], budget)
        padded = [(len(part), max(len(items[i]) for i in part)) for part in flat]
        if sum(costs.of_trees(trees) for _, trees in grown) < sum(costs.of_flat(*sizes) for sizes in padded):
            return [*grown]
    return [(part, None) for part in flat]

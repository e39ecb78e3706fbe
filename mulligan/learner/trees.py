"""Rows that begin alike, as trees: what they share is there once.

Which rows share what follows from their tokens alone: a prompt, a prefix that a reset entered again, a text that stands
before every prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from mulligan.models.attention import Branches
from mulligan.types import Tokens

# A branching costs some more calls, and another part of the attention of every token below it. In tokens through all
# of a layer: measured at a width of 128 on a CPU; a wider layer gives them more than they cost.
_NODE, _BELOW = 16, 1 / 16

# Measured on a CPU, and only to choose between two right layouts:
_EFFICIENCY = 0.5  # of the attention kernel beside a matrix product
_CALL = 1e6  # operations that fit into the time in which one more block of attention is started
_JOIN = 64  # and into joining two parts of a softmax, for a channel of a query


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens that the same rows have, in front of where these part or end."""

    start: int  # the first of its tokens in the sequence
    end: int
    depth: int  # tokens of its rows before it
    parent: int | None  # among the nodes


@dataclass(frozen=True, slots=True)
class Trees:
    """The unique tokens of rows in one sequence of N, depth first."""

    tokens: list[int]  # [N]
    nodes: list[Node]  # by start
    ends: list[int]  # a row each: the node that it ends with

    def positions(self) -> torch.Tensor:
        """Each token's place in its rows: int64 [N]."""
        return torch.cat([torch.arange(n.depth, n.depth + n.end - n.start) for n in self.nodes])

    def columns(self, row: int) -> torch.Tensor:
        """Where the tokens of a row are: int64 [length of the row]."""
        path, at = [], self.ends[row]
        while at is not None:
            node = self.nodes[at]
            path.append(torch.arange(node.start, node.end))
            at = node.parent
        return torch.cat(path[::-1])

    def branches(self) -> Branches:
        """Which token attends to which."""
        last = [node.end for node in self.nodes]
        for i in range(len(self.nodes) - 1, -1, -1):
            parent = self.nodes[i].parent
            if parent is not None:
                last[parent] = max(last[parent], last[i])
        runs: list[tuple[int, int, int]] = []
        for node in self.nodes:
            length = node.end - node.start
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
            else:
                runs.append((node.start, length, 1))
        shared = [(n.start, n.end, to) for n, to in zip(self.nodes, last, strict=True) if to > n.end]
        return Branches(tuple(runs), tuple(shared))


@dataclass(frozen=True, slots=True)
class Costs:
    """What a layer's forward pass costs, in floating-point operations at the speed of a large matrix product."""

    token: float  # all of its projections, for a token
    width: int  # of all query heads together

    def of_flat(self, rows: int, length: int) -> float:
        """Rows of a batch, padded to one length."""
        return rows * length * self.token + self._attention(rows * length * length / 2) + _CALL

    def of_trees(self, trees: Trees) -> float:
        """A batch of trees."""
        branches = trees.branches()
        pairs = sum(length * length / 2 * count for _, length, count in branches.runs)
        pairs += sum((end - start) * (last - end) for start, end, last in branches.shared)
        joined = sum(last - end for _, end, last in branches.shared) * self.width * _JOIN
        calls = len(branches.runs) + 2 * len(branches.shared)
        return len(trees.tokens) * self.token + self._attention(pairs) + joined + calls * _CALL

    def _attention(self, pairs: float) -> float:
        return pairs * 4 * self.width / _EFFICIENCY


def plant(rows: Sequence[Tokens]) -> Trees:
    """Lays rows out as trees.

    They part where it pays: a few tokens that some rows happen to share are there as often as they are in the rows.

    Args:
        rows: of at least one token each.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    before = [0, *accumulate(len(rows[i]) for i in order)]  # tokens of the rows before, in this order
    trees = Trees([], [], [0] * len(rows))
    # Rows low to high of the order are alike for `depth` tokens, which are those of `parent` and above.
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)]
    while waiting:
        low, high, depth, parent = waiting.pop()
        first, count = rows[order[low]], high - low
        alike = common(first, rows[order[high - 1]])
        below = before[high] - before[low] - count * alike
        if not below or (alike - depth) * (count - 1) > _NODE + below * _BELOW:
            start = len(trees.tokens)
            trees.tokens.extend(first[depth:alike])
            trees.nodes.append(Node(start, len(trees.tokens), depth, parent))
            depth, parent = alike, len(trees.nodes) - 1
            while low < high and len(rows[order[low]]) == alike:  # what ends here comes first
                trees.ends[order[low]] = parent
                low += 1
        parts = list(_parts(rows, order, low, high, alike))
        waiting += [(a, b, depth, parent) for a, b in reversed(parts)]
    return trees


def _parts(rows: Sequence[Tokens], order: Sequence[int], low: int, high: int, at: int) -> Iterator[tuple[int, int]]:
    """Stretches of the order whose rows go on with the same token, or end."""
    start = low
    for i in range(low + 1, high + 1):
        if i == high or rows[order[i]][at : at + 1] != rows[order[start]][at : at + 1]:
            yield start, i
            start = i


def common(left: Tokens, right: Tokens) -> int:
    """How many tokens two rows begin with alike.

    >>> common((1, 2, 3), (1, 2, 4, 5))
    2
    """
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def plant_within(rows: Sequence[Tokens], budget: int) -> list[tuple[list[int], Trees]]:
    """The rows' indices in groups of at most ``budget`` unique tokens, each with its trees.

    What shares most goes together; what is too much for one group is cut. A row longer than the budget goes alone.
    """
    groups: list[list[int]] = []
    size, previous = 0, ()
    for i in sorted(range(len(rows)), key=lambda i: (rows[i], i)):
        more = len(rows[i]) - common(previous, rows[i])
        if groups and size + more <= budget:
            groups[-1].append(i)
            size += more
        else:
            groups.append([i])
            size = len(rows[i])
        previous = rows[i]
    return [cut for group in groups for cut in _cut(rows, group, budget)]


def _cut(rows: Sequence[Tokens], group: list[int], budget: int) -> Iterator[tuple[list[int], Trees]]:
    # A group was filled as if all that is alike were shared, so it may be a little too large.
    trees = plant([rows[i] for i in group])
    if len(trees.tokens) <= budget or len(group) == 1:
        yield group, trees
    else:
        yield from _cut(rows, group[: len(group) // 2], budget)
        yield from _cut(rows, group[len(group) // 2 :], budget)

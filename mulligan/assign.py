"""From a forest to trainable rows: select, streams, credit, for each term of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mulligan.context import CONTEXTS
from mulligan.errors import ContractError, nearest
from mulligan.method import Method
from mulligan.objective import START
from mulligan.texts import Texts
from mulligan.types import Forest, Row, Stream, Tokens

Fill = Callable[[Sequence[Row], Sequence[Stream], Callable[[Row, str], Tokens]], None]


def assign(method: Method, forest: Forest, texts: Texts, fill: Fill, max_new_tokens: int) -> list[Row]:
    """The rows of all terms, each with context, streams, advantages and mask.

    Args:
        fill: computes declared streams (``Learner.fill_streams``).

    Raises:
        ContractError: an advantage, reward or mask that is missing, misshapen or not finite; names the method.
    """
    out: list[Row] = []
    for index, term in enumerate(method.terms):
        rows = term.select(forest)

        def context_of(row: Row, name: str) -> Tokens:
            if name == "learner":
                return row.context
            if name not in CONTEXTS:
                raise ContractError(f"{method.name}: a stream's context '{name}' is unknown{nearest(name, CONTEXTS)}")
            return CONTEXTS[name].build(row.sample, texts)

        for row in rows:
            row.term = index
            row.context = term.context.build(row.sample, texts)
            if not math.isfinite(row.reward):
                raise ContractError(f"{method.name}: the reward of {row.sample.request.problem.uid} is {row.reward}")
        # The learner supplies the plain start log-probs itself; everything else is computed here, once.
        fill(rows, [], context_of)
        for stream in dict.fromkeys([*term.credit.reads, *(s for s in term.reads if s != START)]):
            if stream not in term.credit.reads and replace(stream, context=START.context) == START:
                for row in rows:
                    if context_of(row, stream.context) == row.context:
                        row.as_start |= {stream.name}
            needed = [row for row in rows if stream.name not in row.as_start]
            if needed:
                fill(needed, [stream], context_of)
        advantages = term.credit(rows, forest, max_new_tokens)
        if len(advantages) != len(rows):
            raise ContractError(f"{method.name}: credit returned {len(advantages)} advantages for {len(rows)} rows")
        for row, advantage in zip(rows, advantages, strict=True):
            if advantage is None:
                continue
            length, branch = len(row.tokens), row.sample.branch
            own = torch.arange(length) >= branch
            if isinstance(advantage, torch.Tensor):
                if advantage.shape != (length,):
                    raise ContractError(
                        f"{method.name}: an advantage has shape {tuple(advantage.shape)}, not ({length},): one a token"
                    )
                row.advantages = advantage.float()
            else:
                row.advantages = torch.where(own, float(advantage), 0.0)
            if not bool(torch.isfinite(row.advantages).all()):
                raise ContractError(f"{method.name}: an advantage of {row.sample.request.problem.uid} is not finite")
            if len(row.mask) == 0:
                row.mask = own
            elif row.mask.shape != (length,) or row.mask.dtype != torch.bool:
                raise ContractError(
                    f"{method.name}: a mask is {row.mask.dtype} {tuple(row.mask.shape)}, not torch.bool ({length},)"
                )
            else:
                row.mask = row.mask & own
            out.append(row)
    return out

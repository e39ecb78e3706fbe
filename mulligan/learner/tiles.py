"""Log-probs over a large vocabulary, a tile of tokens by words at a time. Logits are never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

ROWS = 1024  # tokens of a tile: enough of them that reading its weights costs little beside the product

Shape = Callable[[torch.Tensor], torch.Tensor]  # what a model does to its logits, number by number


def tiled_logprobs(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    *,
    shape: Shape,
    numbers: int,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs (and entropies) [N] in nats from hidden states [N, d]; differentiable once, by hidden states and head.

    The backward pass computes each tile's logits again; beside tiles it holds one gradient of the head.

    Args:
        head: a plain linear layer with V outputs.
        shape: from the head's outputs to logits of at least float32.
        numbers: of a tile, at most.
    """
    # Under autocast the products are in its dtype. It is asked for here, because backward runs outside of it.
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    out = _Tiles.apply(hidden, head.weight, head.bias, targets, temperature, shape, numbers, entropy, dtype)
    return out if entropy else (out[0], None)


class _Tiles(torch.autograd.Function):
    """See :func:`tiled_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        shape: Shape,
        numbers: int,
        entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings = shape, numbers, dtype
        # Per token, over the words so far: the largest logit, the sum of exp(logit - largest), the same sum weighted
        # by the logit, and the target's logit.
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        largest = torch.full(targets.shape, torch.finfo(exact).min, dtype=exact, device=hidden.device)
        total, weighted, chosen = (torch.zeros_like(largest) for _ in range(3))
        for words, w, b in _words(weight, bias, dtype, len(hidden), numbers):
            for rows in _rows(len(hidden)):
                raw = functional.linear(hidden[rows].to(dtype), w, b)
                logits = shape(raw) / temperature[rows, None]
                inside, word = _inside(targets[rows], words)
                chosen[rows] = torch.where(inside, logits.gather(1, word)[:, 0], chosen[rows])
                top = torch.maximum(largest[rows], logits.amax(-1))
                fade = (largest[rows] - top).exp()
                share = (logits - top[:, None]).exp_()
                total[rows] = total[rows] * fade + share.sum(-1)
                if entropy:
                    weighted[rows] = weighted[rows] * fade + share.mul_(logits).sum(-1)
                largest[rows] = top
        norm = largest + total.log()
        entropies = norm - weighted / total
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, norm, entropies)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return chosen - norm, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """p the softmax: ``d logprob / d logit = [target] - p``, ``d entropy / d logit = -p (log p + entropy)``."""
        hidden, weight, bias, targets, temperature, norm, entropies = ctx.saved_tensors
        shape, numbers, dtype = ctx.settings
        slope, bend = given
        slope = torch.zeros_like(norm) if slope is None else slope

        def sums(of: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
            """Where a gradient adds up: in float32 at least, whatever the products are in."""
            if of is None or not wanted:
                return None
            return torch.zeros_like(of, dtype=torch.promote_types(of.dtype, torch.float32))

        by_hidden, by_weight, by_bias = map(sums, (hidden, weight, bias), ctx.needs_input_grad[:3])
        for words, w, b in _words(weight, bias, dtype, len(hidden), numbers):
            for rows in _rows(len(hidden)):
                h = hidden[rows].to(dtype)
                raw = functional.linear(h, w, b)
                with torch.enable_grad():
                    logits = shape(raw.requires_grad_()) / temperature[rows, None]
                logp = logits.detach() - norm[rows, None]
                push = -slope[rows, None]
                if bend is not None:
                    push = push - (logp + entropies[rows, None]).mul_(bend[rows, None])
                push = logp.exp_().mul_(push)
                inside, word = _inside(targets[rows], words)
                push.scatter_add_(1, word, (slope[rows] * inside)[:, None])
                (by_raw,) = torch.autograd.grad(logits, raw, push)
                if by_hidden is not None:
                    _add_product(by_hidden[rows], by_raw, w)
                if by_weight is not None:
                    _add_product(by_weight[words], by_raw.T, h)
                if by_bias is not None:
                    by_bias[words] += by_raw.sum(0, dtype=by_bias.dtype)
        sides = ((by_hidden, hidden), (by_weight, weight), (by_bias, bias))
        return *(None if by is None else by.to(of.dtype) for by, of in sides), *(None,) * 6


def _words(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, rows: int, numbers: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
    """Stretches of the vocabulary, with their part of the head."""
    width = max(1, numbers // min(rows, ROWS))
    for start in range(0, len(weight), width):
        words = slice(start, min(start + width, len(weight)))
        yield words, weight[words].to(dtype), None if bias is None else bias[words].to(dtype)


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, start + ROWS)


def _inside(targets: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is among the words [N], and which of them it is [N, 1] (any where it is not).

    No indices of the targets that are: their number would have to be waited for on a GPU, tile by tile.
    """
    word = targets - words.start
    last = words.stop - words.start - 1
    return (word >= 0) & (word <= last), word.clamp(0, last)[:, None]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right``, in place where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

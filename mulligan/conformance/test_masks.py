"""Tokens that are not trained have no part in the gradient: the prefix of a reset, and whatever a mask leaves out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mulligan.conformance.bench import Case, copied
from mulligan.types import Row


def test_a_reentered_prefix_is_never_trained(case: Case) -> None:
    """The mask of every row starts at its branch."""
    for row in case.rows:
        assert row.mask.shape == row.advantages.shape == (len(row.tokens),)
        assert not bool(row.mask[: row.sample.branch].any()), f"sample {row.sample.uid}: its prefix is trained"


def test_masked_tokens_have_no_gradient(case: Case) -> None:
    """d loss / d (what the head reads) is exactly 0, in every loop, where no trained token is predicted."""
    rows, found = case.live(with_gaps(case.some)), 0.0
    for row in rows:
        slopes = head_slopes(case, row)
        predicts = torch.zeros(slopes.shape[1], dtype=torch.bool)
        predicts[len(row.context) - 1 : -1] = row.mask
        leak = slopes[:, ~predicts]
        assert float(leak.max()) == 0.0, f"sample {row.sample.uid} ({row.sample.origin}): a masked token has a gradient"
        found += float(slopes[:, predicts].sum())
    assert found > 0, "no trained token has a gradient either"


def test_numbers_of_masked_tokens_are_never_read(case: Case) -> None:
    """Other advantages and streams on masked tokens: bitwise the same loss and gradient."""
    rows = with_gaps(case.some)
    other = [copied(row) for row in rows]
    for row in other:
        row.advantages[~row.mask] = 99.0
        for values in row.streams.values():
            values[~row.mask] = -33.0
    loss, gradient = case.bench.update(rows, case.method)
    other_loss, other_gradient = case.bench.update(other, case.method)
    assert loss == other_loss and torch.equal(gradient, other_gradient), "numbers of masked tokens reach the loss"


def with_gaps(rows: list[Row]) -> list[Row]:
    """Every second row with a hole in its mask, as the output of a tool would leave one."""
    out = [copied(row) for row in rows]
    for row in out[::2]:
        trained = row.mask.nonzero()[:, 0]
        if len(trained) > 4:
            row.mask[trained[1:3]] = False
    return out


def head_slopes(case: Case, row: Row) -> torch.Tensor:
    """|d loss / d hidden state| as the head and the exit gate give it, [what is read, positions].

    The model's states are cut off from one another, so that a position's slope is its own prediction's.
    """
    leaves: list[torch.Tensor] = []

    def cut(state: torch.Tensor) -> torch.Tensor:
        leaves.append(state.detach().requires_grad_())
        return leaves[-1]

    def hook(_: object, __: object, out) -> object:
        out.last_hidden_state = cut(out.last_hidden_state)
        if getattr(out, "loop_hidden_states", None) is not None:
            out.loop_hidden_states = tuple(cut(state) for state in out.loop_hidden_states)
        if getattr(out, "exit_probabilities", None) is not None:
            out.exit_probabilities = cut(out.exit_probabilities)
        return out

    base: torch.nn.Module = case.bench.model.base_model
    handle = base.register_forward_hook(hook)
    try:
        case.bench.update([row], case.method)
    finally:
        handle.remove()
    size: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.abs().sum(-1)[0]  # noqa: E731
    return torch.stack([size(torch.zeros_like(x) if x.grad is None else x.grad) for x in leaves])

"""A method's loss and gradient built plainly: one row at a time, no padding, a softmax over the whole vocabulary.

It shares with the learner the model's own forward and the method's parts, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mulligan.conformance.bench import MOST, TEMPERATURE, Case
from mulligan.learner.update import require
from mulligan.method import Term
from mulligan.objective import TokenView
from mulligan.types import Row


def plain_update(case: Case, rows: Sequence[Row]) -> tuple[float, torch.Tensor]:
    """Loss and gradient (all weights end to end) over all terms."""
    model = case.bench.model
    model.zero_grad()
    total = 0.0
    for index, term in enumerate(case.method.terms):
        mine = [row for row in rows if row.term == index]
        if mine:
            total += _term(case, model, term, mine)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return total, torch.cat([g.flatten() for g in gradients])


def _term(case: Case, model: PreTrainedModel, term: Term, rows: list[Row]) -> float:
    tables = [_tables(model, row) for row in rows]  # of each row: [L, tokens of its mask, vocabulary]
    exits = [_exits(model, row) for row in rows] if term.readout.exits else None
    targets = [torch.tensor(row.tokens)[row.mask] for row in rows]
    loops = term.readout.loops
    read = range(case.loops) if loops == "all" else [loop - 1 for loop in loops or (case.loops,)]
    by_loop = [
        torch.cat([table[loop].gather(1, t[:, None])[:, 0] for table, t in zip(tables, targets, strict=True)])
        for loop in read
    ]
    last = by_loop[-1]
    where = torch.cat([torch.full((len(t),), i) for i, t in enumerate(targets)])
    weights = term.weight * torch.tensor(term.aggregation(rows, MOST), dtype=torch.float64)[where]
    entropy = torch.cat([-(table[-1].exp() * table[-1]).sum(-1) for table in tables])

    def view(logprobs: torch.Tensor) -> TokenView:
        return TokenView(
            policy_logprobs=logprobs,
            advantages=torch.cat([row.advantages[row.mask] for row in rows]),
            row=where,
            rows=rows,
            streams={s.name: torch.cat([require(r, s, case.label)[r.mask] for r in rows]) for s in term.reads},
            policy_entropy=entropy if term.entropy else None,
            exit_probabilities=None if exits is None else torch.cat(exits),
            loop_logprobs=torch.stack(by_loop).detach(),
            owner=case.label,
        )

    if loops is None:
        surrogate = (weights * term.surrogate(view(last))).sum()
        spread = surrogate
    else:  # c_j = d loss / d log P_last(y_j), and the loss sum_j sum_t w_t c_j log P_t(y_j)
        leaf = last.detach().requires_grad_()
        surrogate = (weights * term.surrogate(view(leaf))).sum()
        (slope,) = torch.autograd.grad(surrogate, leaf)
        shares = term.readout.weights(view(leaf))
        spread = torch.stack(
            [(share * slope * logprobs).sum() for share, logprobs in zip(shares, by_loop, strict=True)]
        )
        spread = spread.sum()
    penalty = torch.stack([last.sum() * 0, *((weights * r(view(last))).sum() for r in term.regularisers)]).sum()
    (spread + penalty).backward()
    return float(surrogate.detach()) + float(penalty.detach())


def _positions(row: Row) -> torch.Tensor:
    """Where the trained tokens are predicted: one before each."""
    return row.mask.nonzero()[:, 0] + len(row.context) - 1


def _tables(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """log P of every token of the vocabulary at each trained token, for each loop (a plain model has one)."""
    given = row.sample.request.temperature
    temperature = (TEMPERATURE if given is None else given) or 1.0
    ids = torch.tensor([[*row.context, *row.tokens]])
    if not hasattr(model.config, "total_ut_steps"):
        logits = model(ids, use_cache=False).logits
    else:
        out = model(ids, use_cache=False, output_loops=True)
        logits = torch.cat([model.lm_head(state) for state in out.loop_hidden_states])
    return torch.log_softmax(logits[:, _positions(row)] / temperature, dim=-1)


def _exits(model: PreTrainedModel, row: Row) -> torch.Tensor:
    """Exit probabilities [tokens of the mask, L]."""
    out = model(torch.tensor([[*row.context, *row.tokens]]), use_cache=False, output_loops=True)
    return out.exit_probabilities[0, _positions(row)]

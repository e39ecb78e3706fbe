"""The contract, checked before anything is trained: every phase's method on a small batch of every origin.

A declared stream that nobody reads is as much an error as one that is read and not declared: an advantage
that is computed and never arrives in the loss is how a method fails silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mulligan.assign import assign
from mulligan.errors import ContractError
from mulligan.method import Method, Term
from mulligan.objective import TokenView
from mulligan.schedule import Schedule
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import ORIGINS, Forest, Grade, Problem, Request, Row, Sample, Stream, Tokens, Tree, Verdict


def fake_forest(task: Task, texts: Texts, problems: Sequence[Problem]) -> Forest:
    """A tree a problem, each with passing, failing and truncated samples of every origin."""
    trees = []
    for slot, problem in enumerate(problems):
        tree = Tree(problem)
        for k, origin in enumerate(ORIGINS):
            for attempt in range(3):
                right = attempt == 0
                text = task.solution(problem)
                tokens: Tokens = tuple(texts.tokenizer.encode(text, add_special_tokens=False))[:40]
                prefix = tokens[: len(tokens) // 2] if origin == "reset" else ()
                own = len(tokens) - len(prefix)
                verdict = Verdict.UNGRADED if origin == "diagnosis" else Verdict.PASS if right else Verdict.FAIL
                request = Request(
                    problem=problem,
                    group=slot * 10 + k,
                    n=3,
                    context=texts.prompt(problem),
                    seeds=(0, 1, 2),
                    prefix=prefix,
                    origin=origin,
                )
                tree.samples.append(
                    Sample(
                        uid=slot * 100 + len(tree.samples),
                        request=request,
                        attempt=attempt,
                        tokens=tokens,
                        behavior_logprobs=(-0.7,) * own,
                        finish="length" if attempt == 2 else "stop",
                        text=text,
                        grade=Grade(
                            verdict=verdict, reward=float(right and origin != "diagnosis"), answer="0", steps=1
                        ),
                    )
                )
        trees.append(tree)
    return Forest(0, trees)


def check_schedule(
    schedule: Schedule, task: Task, texts: Texts, problems: Sequence[Problem], *, max_new_tokens: int, loops: int
) -> list[str]:
    """Runs every phase's method on the fake batch; returns one line a phase of what it reads.

    Raises:
        ContractError: what does not fit, naming method and field.
    """
    lines = []
    for method in schedule.methods:
        forest = fake_forest(task, texts, problems)
        filled: set[str] = set()
        rows = assign(method, forest, texts, _fake_fill(filled), max_new_tokens)
        for index, term in enumerate(method.terms):
            check_term(method, term, [row for row in rows if row.term == index], max_new_tokens, loops)
        streams = sorted({s.name for t in method.terms for s in (*t.reads, *t.credit.reads)})
        lines.append(f"{method.name}: {len(rows)} rows; streams: {', '.join(['policy_logprobs', *streams])}")
    return lines


def check_term(method: Method, term: Term, rows: list[Row], max_new_tokens: int, loops: int) -> None:
    """One term on its rows: every declared stream is read, every loss is one finite number a token, and
    advantages reach the gradient."""
    if not rows:
        raise ContractError(f"{method.name}: its select and credit leave no row of a batch that holds every origin")
    if term.readout.loops is not None and max(term.readout.loops) > loops:
        raise ContractError(
            f"{method.name}: reads loop {max(term.readout.loops)}, but the model runs {loops}"
            + (" (it has no loops)" if loops == 1 else "")
        )
    weights = term.aggregation(rows, max_new_tokens)
    if len(weights) != len(rows):
        raise ContractError(f"{method.name}: aggregation returned {len(weights)} weights for {len(rows)} rows")
    n = sum(int(row.mask.sum()) for row in rows)
    generator = torch.Generator().manual_seed(0)
    leaf = (-torch.rand(n, generator=generator) - 0.1).requires_grad_()
    row_index = torch.cat([torch.full((int(row.mask.sum()),), i) for i, row in enumerate(rows)])
    view = TokenView(
        policy_logprobs=leaf,
        advantages=torch.cat([row.advantages[row.mask] for row in rows]),
        row=row_index,
        rows=rows,
        streams={s.name: -torch.rand(n, generator=generator) - 0.1 for s in term.reads},
        policy_entropy=torch.rand(n, generator=generator) if term.entropy else None,
        exit_probabilities=torch.full((n, loops), 1 / loops) if term.readout.exits else None,
        owner=method.name,
    )
    loss = term.surrogate(view)
    for part in (loss, *(r(view) for r in term.regularisers)):
        if part.shape != (n,) or not bool(torch.isfinite(part).all()):
            raise ContractError(f"{method.name}: a loss is not one finite number for each of the {n} trainable tokens")
    unread = [s.name for s in term.reads if s.name not in view.read]
    if unread:
        raise ContractError(f"{method.name}: declares '{unread[0]}' but never reads it")
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    if bool((view.advantages != 0).any()) and not bool((slope != 0).any()):
        raise ContractError(f"{method.name}: its advantages never reach the gradient")
    if len(list(term.readout.weights(view))) != len(term.readout.loops or (1,)):
        raise ContractError(f"{method.name}: the readout gives a different number of weights than loops")


def _fake_fill(filled: set[str]) -> Callable[[Sequence[Row], Sequence[Stream], Callable[[Row, str], Tokens]], None]:
    def fill(rows: Sequence[Row], streams: Sequence[Stream], context_of: Callable[[Row, str], Tokens]) -> None:
        for stream in streams:
            filled.add(stream.name)
            for row in rows:
                if not context_of(row, stream.context):
                    raise ContractError(f"stream '{stream.name}' has an empty context")
                row.streams[stream.name] = torch.full((len(row.tokens),), -0.7)

    return fill

"""The contract, checked before anything is trained: every phase's method on a small batch of every origin.

A declared stream that nobody reads is as much an error as one that is read and not declared: an advantage
that is computed and never arrives in the loss is how a method fails silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mulligan.assign import Fill, assign
from mulligan.errors import ContractError, nearest
from mulligan.method import Method, Term
from mulligan.objective import TokenView
from mulligan.rehearsal import rehearse
from mulligan.schedule import Schedule
from mulligan.seeds import seed_of
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import MODELS, ORIGINS, Forest, Grade, Problem, Request, Row, Sample, Stream, Tokens, Tree, Verdict


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
        read: list[set[str]] = [set() for _ in method.terms]
        for term in method.terms:
            check_loops(method, term, loops)
        rows = assign(method, forest, texts, _fake_fill(method, read), max_new_tokens)
        rehearse(method, task, texts, problems, _fake_fill(method, [set() for _ in method.terms]), max_new_tokens)
        for index, term in enumerate(method.terms):
            unread = [s.name for s in term.credit.reads if s.name not in read[index]]
            if unread:
                raise ContractError(f"{method.name}: its credit declares '{unread[0]}' but never reads it")
            check_term(method, term, [row for row in rows if row.term == index], max_new_tokens, loops)
        streams = sorted({s.name for t in method.terms for s in (*t.reads, *t.credit.reads)})
        lines.append(f"{method.name}: {len(rows)} rows; streams: {', '.join(['policy_logprobs', *streams])}")
    return lines


def check_loops(method: Method, term: Term, loops: int) -> None:
    """Every loop that the term reads is one that the model runs."""
    named = tuple(range(1, loops + 1)) if term.readout.loops == "all" else term.readout.loops
    if loops == 1 and (named is not None or term.readout.exits):
        raise ContractError(f"{method.name}: its readout reads loops, but the model runs 1 (it has no loops)")
    for loop in named or ():
        if not 1 <= loop <= loops:
            raise ContractError(f"{method.name}: its readout reads loop {loop}, but the model runs {loops}")
    if named is not None and (not named or named[-1] != loops):
        raise ContractError(
            f"{method.name}: its readout reads loops {named}, but the last one must be the model's last, {loops}: "
            "ratios and regularisers are taken there"
        )
    for stream in (*term.reads, *term.credit.reads):
        known = (*MODELS, *method.models)
        if stream.model not in known:
            raise ContractError(f"{method.name}: stream '{stream.name}' names no model{nearest(stream.model, known)}")
        if (stream.loop or 1) > loops or (loops == 1 and (stream.loop or stream.quantity == "exit_probability")):
            where = " (it has no loops)" if loops == 1 else ""
            raise ContractError(f"{method.name}: reads '{stream.name}', but the model runs {loops}{where}")


def check_term(method: Method, term: Term, rows: list[Row], max_new_tokens: int, loops: int) -> None:
    """One term on its rows: every declared stream is read, every loss is one finite number a token, and
    the gradient comes from the advantages."""
    n = sum(int(row.mask.sum()) for row in rows)
    if not n:
        raise ContractError(
            f"{method.name}: its select, credit and mask leave no token of a batch that holds every origin"
        )
    weights = term.aggregation(rows, max_new_tokens)
    if len(weights) != len(rows):
        raise ContractError(f"{method.name}: aggregation returned {len(weights)} weights for {len(rows)} rows")
    generator = torch.Generator().manual_seed(0)
    leaf = (-torch.rand(n, generator=generator) - 0.1).requires_grad_()
    row_index = torch.cat([torch.full((int(row.mask.sum()),), i) for i, row in enumerate(rows)])
    view = TokenView(
        policy_logprobs=leaf,
        advantages=torch.cat([row.advantages[row.mask] for row in rows]),
        row=row_index,
        rows=rows,
        streams={s.name: -torch.rand(n, generator=generator) - 0.1 for s in term.reads},
        policy_entropy=torch.rand(n, generator=generator).requires_grad_() if term.entropy else None,
        exit_probabilities=torch.full((n, loops), 1 / loops) if term.readout.exits else None,
        loop_logprobs=-torch.rand(loops, n, generator=generator) - 0.1 if term.readout.loops else None,
        owner=method.name,
    )
    loss = term.surrogate(view)
    for part in (loss, *(r(view) for r in term.regularisers)):
        if part.shape != (n,) or not bool(torch.isfinite(part).all()):
            raise ContractError(f"{method.name}: a loss is not one finite number for each of the {n} trainable tokens")
    declared = [*(s.name for s in term.reads), *(["policy_entropy"] if term.entropy else [])]
    unread = [name for name in declared if name not in view.read]
    if unread:
        raise ContractError(f"{method.name}: declares '{unread[0]}' but never reads it")
    slope = _slope(loss, leaf)
    idle = _slope(term.surrogate(replace(view, advantages=torch.zeros(n))), leaf)
    if not bool(torch.isfinite(slope).all()):
        raise ContractError(f"{method.name}: the gradient of its surrogate is not finite")
    if bool((view.advantages != 0).any()) and torch.equal(slope, idle):
        raise ContractError(f"{method.name}: its advantages never reach the gradient")
    if bool((idle != 0).any()):
        raise ContractError(
            f"{method.name}: its surrogate has a gradient where the advantage is 0; the learner leaves such rows out"
        )
    readout = list(term.readout.weights(view))
    if len(readout) != (loops if term.readout.loops == "all" else len(term.readout.loops or (1,))):
        raise ContractError(f"{method.name}: the readout gives a different number of weights than loops")
    for weight in readout:
        if isinstance(weight, torch.Tensor) and weight.shape not in ((), (n,)):
            raise ContractError(f"{method.name}: a weight of the readout has shape {tuple(weight.shape)}, not ({n},)")


def _slope(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """d loss / d leaf; 0 where the loss does not depend on it at all."""
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    (slope,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if slope is None else slope


class _Watched(dict[str, torch.Tensor]):
    """A row's streams, noting which of them the credit reads."""

    def __init__(self, owner: str, read: set[str]) -> None:
        super().__init__()
        self._owner, self._read = owner, read

    def __getitem__(self, name: str) -> torch.Tensor:
        self._read.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> torch.Tensor:
        raise ContractError(f"{self._owner}: its credit reads '{name}' but does not declare it")

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)


def some_logprobs(n: int, *labels: str | int) -> torch.Tensor:
    """Made-up log-probs [n], other ones for each stream: a difference of two streams must not vanish."""
    return -torch.rand(n, generator=torch.Generator().manual_seed(seed_of(*labels) % 2**31)) - 0.1


def _fake_fill(method: Method, read: list[set[str]]) -> Fill:
    """Fills streams without a model; ``read`` collects, for each term, what its credit reads."""

    def fill(rows: Sequence[Row], streams: Sequence[Stream], context_of: Callable[[Row, str], Tokens]) -> None:
        for row in rows:
            if not isinstance(row.streams, _Watched):
                row.streams = _Watched(method.name, read[row.term])
        for stream in streams:
            for row in rows:
                if not context_of(row, stream.context):
                    raise ContractError(f"{method.name}: stream '{stream.name}' has an empty context")
                row.streams[stream.name] = some_logprobs(len(row.tokens), stream.name, row.sample.uid)

    return fill

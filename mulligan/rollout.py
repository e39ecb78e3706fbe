"""From problems to a forest of graded samples, by generator passes.

A pass is a generator for one problem: it yields orders and is sent what came of them. One order gives a
list (samples, or tensors of scores); a list of orders gives a list of such lists. Problems advance on
their own: what one asks next goes to the sampler while others are still waiting for their first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mulligan.errors import UserError
from mulligan.sampling import Sampler
from mulligan.seeds import seed_of
from mulligan.texts import Texts
from mulligan.types import (
    FRESH,
    Completion,
    Forest,
    Grade,
    Problem,
    Request,
    Sample,
    Stream,
    Tokens,
    Tree,
    Verdict,
)

_PER_TREE = 1 << 20  # uids and group ids of a tree are its slot times this, plus a count

Verifier = Callable[[Problem, str], Grade]
Scorer = Callable[[Sequence[Sample], Stream], list[torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """Asks for n samples; made by :meth:`Ask.samples`."""

    n: int
    context: Tokens
    group: int
    prefix: Tokens = ()
    origin: str = FRESH
    parent: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    stop: tuple[str, ...] = ()
    graded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOrder:
    """Asks for a stream on samples: one tensor [T] each; made by :meth:`Ask.scores`."""

    samples: tuple[Sample, ...]
    stream: Stream


Order = SampleOrder | ScoreOrder
Attempt = Generator[Order | Sequence[Order], Any, None]


class Ask:
    """What a pass may ask for, bound to one problem."""

    def __init__(self, problem: Problem, texts: Texts, slot: int, seed: int) -> None:
        self.problem, self.texts = problem, texts
        self._slot, self._groups, self._seed = slot, 0, seed

    def new_group(self) -> int:
        """An id for a group with a baseline of its own."""
        self._groups += 1
        return self._slot * _PER_TREE + self._groups - 1

    def samples(self, n: int, *, context: Tokens | None = None, group: int | None = None, **more: Any) -> SampleOrder:
        """An order of n samples.

        Args:
            context: what the sampler sees; the plain prompt when left out.
            group: an id from :meth:`new_group` or of an earlier sample; a new one when left out.
            more: the further fields of :class:`SampleOrder`.
        """
        return SampleOrder(
            n=n,
            context=self.texts.prompt(self.problem) if context is None else context,
            group=self.new_group() if group is None else group,
            **more,
        )

    def scores(self, samples: Sequence[Sample], stream: Stream) -> ScoreOrder:
        """An order of scores."""
        return ScoreOrder(samples=tuple(samples), stream=stream)

    def draw_seed(self, *labels: str | int) -> int:
        """A seed for the pass's own choices (which failure is the parent, which step it goes back to)."""
        return seed_of(self._seed, "pass", *labels)


Pass = Callable[[Problem, Tree, Ask], Attempt]


def fresh(n: int) -> Pass:
    """n i.i.d. samples of the plain prompt, in one group."""

    def attempt(problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        yield ask.samples(n)

    return attempt


class _Climb:
    """One problem on its way through the passes."""

    def __init__(
        self, problem: Problem, slot: int, passes: Sequence[Pass], seed: int, texts: Texts, score: Scorer | None
    ):
        self.tree = Tree(problem)
        self.slot, self.passes, self.score = slot, passes, score
        self.seed = seed_of(seed, problem.uid, slot)
        self.ask = Ask(problem, texts, slot, self.seed)
        self.at_pass, self.round, self.uids = -1, 0, 0
        self.generator: Attempt | None = None
        self.single = False
        self.orders: list[Order] = []
        self.answers: list[Any] = []
        self.index: dict[int, int] = {}  # id of a request -> which order it came from

    def advance(self) -> list[Request]:
        """Runs until samples are wanted; the requests, or nothing when the passes have ended."""
        while True:
            try:
                if self.generator is None:
                    self.at_pass += 1
                    if self.at_pass == len(self.passes):
                        return []
                    self.generator = self.passes[self.at_pass](self.tree.problem, self.tree, self.ask)
                    self.round = 0
                    asked = next(self.generator)
                else:
                    asked = self.generator.send(self.answers[0] if self.single else self.answers)
            except StopIteration:
                self.generator, self.orders, self.answers = None, [], []
                continue
            self.single = isinstance(asked, (SampleOrder, ScoreOrder))
            self.orders = [asked] if isinstance(asked, (SampleOrder, ScoreOrder)) else list(asked)
            self.answers = [self._scores(o) if isinstance(o, ScoreOrder) else None for o in self.orders]
            requests = {k: self._request(k, o) for k, o in enumerate(self.orders) if isinstance(o, SampleOrder)}
            self.index = {id(request): k for k, request in requests.items()}
            self.round += 1
            if requests:
                return list(requests.values())

    def _scores(self, order: ScoreOrder) -> list[torch.Tensor]:
        if self.score is None:
            raise UserError("a pass asks for scores, but this rollout has no scorer")
        return self.score(order.samples, order.stream)

    def _request(self, branch: int, order: SampleOrder) -> Request:
        seeds = tuple(seed_of(self.seed, self.at_pass, self.round, branch, k) for k in range(order.n))
        return Request(
            problem=self.tree.problem,
            seeds=seeds,
            **{name: getattr(order, name) for name in SampleOrder.__slots__},
        )

    def receive(self, request: Request, samples: list[Sample]) -> None:
        """Takes in the samples of one order; they join the tree once all orders of the round are answered."""
        self.answers[self.index[id(request)]] = samples
        if all(a is not None for a in self.answers):
            for order, answer in zip(self.orders, self.answers, strict=True):
                if isinstance(order, SampleOrder):
                    for sample in answer:
                        sample.uid = self.slot * _PER_TREE + self.uids
                        self.uids += 1
                        self.tree.samples.append(sample)

    @property
    def waiting(self) -> bool:
        return any(a is None for a in self.answers)


def make_sample(request: Request, attempt: int, completion: Completion, texts: Texts, verify: Verifier) -> Sample:
    """Decodes and grades one completion."""
    tokens = (*request.prefix, *completion.tokens)
    text = texts.decode(tokens)
    grade = verify(request.problem, text) if request.graded else Grade(verdict=Verdict.UNGRADED, reward=0.0)
    return Sample(
        uid=-1,
        request=request,
        attempt=attempt,
        tokens=tokens,
        behavior_logprobs=completion.behavior_logprobs,
        finish=completion.finish,
        text=text,
        grade=grade,
    )


def climb(
    problems: Sequence[tuple[int, Problem]],
    passes: Sequence[Pass],
    *,
    seed: int,
    texts: Texts,
    sampler: Sampler,
    verify: Verifier,
    score: Scorer | None = None,
) -> list[Tree]:
    """Runs the passes over some problems.

    Args:
        problems: (slot, problem); the slot is unique in the step and enters the seeds.
        seed: of this run and step.
    """
    climbs = [_Climb(problem, slot, passes, seed, texts, score) for slot, problem in problems]
    owner: dict[int, _Climb] = {}

    def issue(climb_: _Climb) -> list[Request]:
        requests = climb_.advance()
        owner.update({id(r): climb_ for r in requests})
        keep.extend(requests)  # ids stay unique only while the objects live
        return requests

    def on_done(request: Request, completions: Sequence[Completion]) -> Iterable[Request]:
        climb_ = owner[id(request)]
        climb_.receive(request, [make_sample(request, k, c, texts, verify) for k, c in enumerate(completions)])
        return [] if climb_.waiting else issue(climb_)

    keep: list[Request] = []
    sampler.run([request for c in climbs for request in issue(c)], on_done)
    return [c.tree for c in climbs]


def rollout(
    draw: Callable[[], tuple[int, Problem]],
    n: int,
    passes: Sequence[Pass],
    *,
    step: int,
    seed: int,
    texts: Texts,
    sampler: Sampler,
    verify: Verifier,
    keep: Callable[[Tree], bool] | None = None,
    draws: int = 10,
    score: Scorer | None = None,
) -> Forest:
    """The forest of one step: n problems, or as many as it takes until n groups are kept.

    Args:
        draw: gives the next (cursor, problem).
        seed: the run's.
        keep: the method's group filter (dynamic sampling); None keeps all.
        draws: at most ``draws * n`` problems are drawn.

    Raises:
        UserError: when not one of ``draws * n`` problems is kept.
    """
    forest, drawn = Forest(step, []), 0
    seed = seed_of(seed, "sample", step)
    while len(forest.trees) < n and drawn < draws * n:
        wanted = n - len(forest.trees)
        problems = [draw() for _ in range(min(wanted, draws * n - drawn))]
        drawn += len(problems)
        for tree in climb(problems, passes, seed=seed, texts=texts, sampler=sampler, verify=verify, score=score):
            (forest.trees if keep is None or keep(tree) else forest.filtered).append(tree)
    if not forest.trees:
        solved = sum(all(s.passed for s in t.samples) for t in forest.filtered)
        raise UserError(
            f"step {step + 1}: dynamic sampling drew {drawn} problems and kept none ({solved} solved by every sample, "
            f"{sum(not t.any_pass() for t in forest.filtered)} by none): nothing is left to learn from at this level"
        )
    return forest

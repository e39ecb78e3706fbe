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
from mulligan.memory import Memory
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

Grader = Callable[[Problem, Sequence[str], Sequence[Tokens]], list[Grade]]
Scorer = Callable[[Sequence[Sample], Stream, Tokens | None], list[torch.Tensor]]


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
    context: Tokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenOrder:
    """A response that nobody needs to draw, to be graded and join the tree; made by :meth:`Ask.given`."""

    tokens: Tokens
    behavior_logprobs: tuple[float, ...]
    order: SampleOrder


Order = SampleOrder | ScoreOrder | GivenOrder
Attempt = Generator[Order | Sequence[Order], Any, None]


class Ask:
    """What a pass may ask for, bound to one problem."""

    def __init__(self, problem: Problem, texts: Texts, slot: int, seed: int, memory: Memory | None = None) -> None:
        self.problem, self.texts, self._memory = problem, texts.of(problem), memory or Memory()
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

    def scores(self, samples: Sequence[Sample], stream: Stream, *, context: Tokens | None = None) -> ScoreOrder:
        """An order of scores: a stream on samples, behind another context than the sampler's where one is given."""
        return ScoreOrder(samples=tuple(samples), stream=stream, context=context)

    def given(self, tokens: Tokens, behavior_logprobs: Sequence[float], **more: Any) -> GivenOrder:
        """An order that draws nothing: a response from elsewhere (a replay) is graded and joins the tree.

        Args:
            behavior_logprobs: what its sampler said when it was drawn, one for each token.
            more: as for :meth:`samples`.
        """
        return GivenOrder(tokens=tokens, behavior_logprobs=tuple(behavior_logprobs), order=self.samples(1, **more))

    def recall(self, name: str, default: Any) -> Any:
        """What the method remembered (``Method.remember``) in earlier steps; only to be read."""
        return self._memory.get(name, default)

    def draw_seed(self, *labels: str | int) -> int:
        """A seed for the pass's own choices (which failure is the parent, which step it goes back to)."""
        return seed_of(self._seed, "pass", *labels)


Pass = Callable[[Problem, Tree, Ask], Attempt]


@dataclass(frozen=True, slots=True)
class Fresh:
    """n i.i.d. samples of the plain prompt, in one group."""

    n: int

    def __call__(self, problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        yield ask.samples(self.n)


def fresh(n: int) -> Fresh:
    """n i.i.d. samples of the plain prompt, in one group."""
    return Fresh(n)


class _Climb:
    """One problem on its way through the passes."""

    def __init__(
        self,
        problem: Problem,
        slot: int,
        passes: Sequence[Pass],
        seed: int,
        texts: Texts,
        grade: Grader,
        score: Scorer | None,
        memory: Memory,
    ):
        self.tree = Tree(problem)
        self.slot, self.passes, self.grade, self.score = slot, passes, grade, score
        self.seed = seed_of(seed, problem.uid, slot)
        self.ask = Ask(problem, texts, slot, self.seed, memory)
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
            self.single = isinstance(asked, Order)
            self.orders = [asked] if isinstance(asked, Order) else list(asked)
            self.answers = [self._at_once(o) for o in self.orders]
            requests = {k: self._request(k, o) for k, o in enumerate(self.orders) if isinstance(o, SampleOrder)}
            self.index = {id(request): k for k, request in requests.items()}
            self.round += 1
            if requests:
                return list(requests.values())
            self._settle()

    def _at_once(self, order: Order) -> list[Any] | None:
        """The answer to an order that needs no sampler; None for one that does."""
        if isinstance(order, ScoreOrder):
            if self.score is None:
                raise UserError("a pass asks for scores, but this rollout has no scorer")
            return self.score(order.samples, order.stream, order.context)
        if isinstance(order, GivenOrder):
            completion = Completion(tokens=order.tokens, behavior_logprobs=order.behavior_logprobs, finish="stop")
            return make_samples(self._request(0, order.order), [completion], self.ask.texts, self.grade)
        return None

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
        if not self.waiting:
            self._settle()

    def _settle(self) -> None:
        """New samples join the tree, in the order of asking."""
        for order, answer in zip(self.orders, self.answers, strict=True):
            for sample in answer if not isinstance(order, ScoreOrder) else ():
                sample.uid = self.slot * _PER_TREE + self.uids
                self.uids += 1
                self.tree.samples.append(sample)

    @property
    def waiting(self) -> bool:
        return any(a is None for a in self.answers)


def make_samples(request: Request, completions: Sequence[Completion], texts: Texts, grade: Grader) -> list[Sample]:
    """Decodes and grades what came of one request, all at once."""
    tokens = [(*request.prefix, *completion.tokens) for completion in completions]
    decoded = [texts.decode(each) for each in tokens]
    ungraded = Grade(verdict=Verdict.UNGRADED, reward=0.0)
    to_grade = [texts.to_grade(each) for each in decoded]
    grades = grade(request.problem, to_grade, tokens) if request.graded else [ungraded] * len(decoded)
    return [
        Sample(
            uid=-1,
            request=request,
            attempt=attempt,
            tokens=tokens[attempt],
            behavior_logprobs=completion.behavior_logprobs,
            finish=completion.finish,
            text=text,
            grade=judged,
        )
        for attempt, (completion, text, judged) in enumerate(zip(completions, decoded, grades, strict=True))
    ]


def climb(
    problems: Sequence[tuple[int, Problem]],
    passes: Sequence[Pass],
    *,
    seed: int,
    texts: Texts,
    sampler: Sampler,
    grade: Grader,
    score: Scorer | None = None,
    memory: Memory | None = None,
) -> list[Tree]:
    """Runs the passes over some problems.

    Args:
        problems: (slot, problem); the slot is unique in the step and enters the seeds.
        seed: of this run and step.
        grade: the verifier's word on all responses of one request (:meth:`Task.grade`).
        memory: what passes may recall.
    """
    memory = memory if memory is not None else Memory()
    climbs = [_Climb(problem, slot, passes, seed, texts, grade, score, memory) for slot, problem in problems]
    owner: dict[int, _Climb] = {}

    def issue(climb_: _Climb) -> list[Request]:
        requests = climb_.advance()
        owner.update({id(r): climb_ for r in requests})
        keep.extend(requests)  # ids stay unique only while the objects live
        return requests

    def on_done(request: Request, completions: Sequence[Completion]) -> Iterable[Request]:
        climb_ = owner[id(request)]
        climb_.receive(request, make_samples(request, completions, texts, grade))
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
    grade: Grader,
    keep: Callable[[Tree], bool] | None = None,
    draws: int = 10,
    score: Scorer | None = None,
    memory: Memory | None = None,
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
        for tree in climb(
            problems, passes, seed=seed, texts=texts, sampler=sampler, grade=grade, score=score, memory=memory
        ):
            (forest.trees if keep is None or keep(tree) else forest.filtered).append(tree)
    if not forest.trees:
        solved = sum(all(s.passed for s in t.samples) for t in forest.filtered)
        raise UserError(
            f"step {step + 1}: dynamic sampling drew {drawn} problems and kept none ({solved} solved by every sample, "
            f"{sum(not t.any_pass() for t in forest.filtered)} by none): nothing is left to learn from at this level"
        )
    return forest

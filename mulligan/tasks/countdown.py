r"""Countdown: make the target from the numbers, each used exactly once.

Prompt ``3,7,5>22?``, response ``3*5=15:7,15;7+15=22:22;\boxed{7+3*5}``: a step turns two of the numbers at hand into
one and says what is at hand then, so that what remains reads like a smaller problem.
The right answer is not unique: any expression that uses every number once and gives the target is right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import ClassVar

from pydantic import Field, model_validator

from mulligan.tasks.base import GeneratedTask, TaskSettings, boxed, split_after
from mulligan.tasks.expressions import (
    Arithmetic,
    ExpressionError,
    Leaf,
    Node,
    Tree,
    arithmetic,
    canonical,
    has_prefix,
    operators,
    show_arithmetic,
)
from mulligan.types import Problem

HINTS = 4  # wrong answers in a hint, at most
_STEP = re.compile(r"([0-9]{1,6})([-+*])([0-9]{1,6})=([0-9]{1,6}):([0-9]{1,6}(?:,[0-9]{1,6}){0,9});")

Numbers = tuple[int, ...]  # the numbers at hand, sorted
Move = tuple[int, str, int, int]  # a, operator, b, result


class CountdownSettings(TaskSettings):
    """``level`` + 1 numbers from 1 to ``largest``; the result of every step lies in 0..``limit``.

    Small numbers make few problems: of two numbers up to 9 there are some 130 in all splits together.
    """

    level: int = Field(default=2, ge=1, le=4)
    largest: int = Field(default=99, ge=2, le=999)
    limit: int = Field(default=99, ge=2, le=9999)

    @model_validator(mode="after")
    def _numbers_within_limit(self) -> CountdownSettings:
        if self.largest > self.limit:
            raise ValueError(f"largest ({self.largest}) must not exceed limit ({self.limit})")
        return self


class Countdown(GeneratedTask):
    """Arithmetic search with a process oracle: a step is right while the target can still be reached.

    Steps are bound to results in 0..limit. The boxed expression is judged as Countdown usually is: ``+ - *``, every
    number once, equal to the target, whatever its intermediate values and whatever the steps before it.
    """

    name: ClassVar[str] = "countdown"
    summary: ClassVar[str] = "reach a target with + - *, using each number once"
    Settings: ClassVar[type[TaskSettings]] = CountdownSettings
    has_oracle = True

    def draw(self, rng: Random, split: str) -> tuple[str, Problem]:
        """Random numbers, and random moves from them to a target: reachable by construction."""
        limit = self.settings.limit
        numbers = [rng.randint(1, self.settings.largest) for _ in range(self.settings.level + 1)]
        start = pool = tuple(sorted(numbers))
        for _ in range(self.settings.level):
            _, pool = rng.choice(list(moves(pool, limit)))
        target = pool[0]
        problem = Problem(
            task=self.name,
            split=split,
            index=0,
            prompt=f"{','.join(map(str, numbers))}>{target}?",
            answer=show_arithmetic(combined(start, solve(start, target, limit))),
            data={"numbers": numbers, "target": target},
        )
        return f"{','.join(map(str, start))}>{target}", problem

    def solution(self, problem: Problem) -> str:
        """The first solution in the order of :func:`moves`; it depends on the numbers as a set, not on their order."""
        start = tuple(sorted(problem.data["numbers"]))
        path = solve(start, problem.data["target"], self.settings.limit)
        return f"{''.join(write_steps(start, path))}\\boxed{{{show_arithmetic(combined(start, path))}}}"

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        """``3,7,5>22!3*5-7,3+5+7?``; ``~`` before the question mark asks for a short solution."""
        wrong = "!" + ",".join(wrong_answers[:HINTS]) if wrong_answers else ""
        return f"{problem.prompt[:-1]}{wrong}{'~' if concise else ''}?"

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        """``3,7,5>22?3*5=15:7,15;7+15=21:21;\\boxed{7+3*5}@``."""
        return f"{problem.prompt}{''.join(steps)}@"

    def split_steps(self, response: str) -> list[str]:
        return split_after(response, ";")

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """A step is right when its numbers are at hand, its arithmetic is exact, its result lies in 0..limit, it says
        what is left (in any order) and the target can still be reached from that. The last segment is the answer's:
        right when it is a box alone, its expression is correct and the steps left nothing but the target. An empty
        response is wrong at 1."""
        pool = tuple(sorted(problem.data["numbers"]))
        for at, step in enumerate(steps[:-1], start=1):
            after = self._after(pool, step)
            if after is None or not reaches(after, problem.data["target"], self.settings.limit):
                return at
            pool = after
        answer = self.extract(steps[-1]) if steps else None
        done = pool == (problem.data["target"],)
        if done and answer is not None and steps[-1] == f"\\boxed{{{answer}}}" and self.correct(problem, answer):
            return None
        return max(1, len(steps))

    def extract(self, response: str) -> str | None:
        return boxed(response)

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        """Whether the expressions differ at most in the order and grouping of ``+`` and ``*`` (or are the same text).
        Two right answers need not be equivalent."""
        one, other = _read(left), _read(right)
        if one is None or other is None:
            return left.strip() == right.strip()
        return canonical(one.tree) == canonical(other.tree)

    def correct(self, problem: Problem, answer: str) -> bool:
        read = _read(answer)
        return (
            read is not None
            and read.value == problem.data["target"]
            and sorted(read.integers) == sorted(problem.data["numbers"])
            and operators(read.tree) <= {"+", "-", "*"}
            and not has_prefix(read.tree)
        )

    def _after(self, pool: Numbers, step: str) -> Numbers | None:
        """What is at hand after the step; None when the step is no allowed operation."""
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        a, b, c = int(match[1]), int(match[3]), int(match[4])
        rest = list(pool)
        for number in (a, b):
            if number not in rest:
                return None
            rest.remove(number)
        exact = a + b if match[2] == "+" else a - b if match[2] == "-" else a * b
        if c != exact or c > self.settings.limit:
            return None
        left = tuple(sorted((*rest, c)))
        return left if left == tuple(sorted(map(int, match[5].split(",")))) else None


def write_steps(numbers: Numbers, path: Sequence[Move]) -> list[str]:
    """The steps as text.

    >>> write_steps((3, 5, 7), ((3, "*", 5, 15), (7, "+", 15, 22)))
    ['3*5=15:7,15;', '7+15=22:22;']
    """
    pool, steps = list(numbers), []
    for a, op, b, c in path:
        pool.remove(a)
        pool.remove(b)
        pool = sorted([*pool, c])
        steps.append(f"{a}{op}{b}={c}:{','.join(map(str, pool))};")
    return steps


def moves(numbers: Numbers, limit: int) -> Iterator[tuple[Move, Numbers]]:
    """Every allowed operation on two of the numbers and what it leaves, in a fixed order: small operands first, then
    ``+ - *``. The smaller operand comes first, except in a difference, which must not be negative."""
    for i, j in combinations(range(len(numbers)), 2):
        small, large = numbers[i], numbers[j]
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for move in (
            (small, "+", large, small + large),
            (large, "-", small, large - small),
            (small, "*", large, small * large),
        ):
            if move[3] <= limit:
                yield move, tuple(sorted((*rest, move[3])))


@lru_cache(maxsize=1 << 16)
def reaches(numbers: Numbers, target: int, limit: int) -> bool:
    """Whether some moves lead from the numbers to the target alone; exact."""
    if len(numbers) == 1:
        return numbers[0] == target
    return any(reaches(rest, target, limit) for _, rest in moves(numbers, limit))


@lru_cache(maxsize=1 << 14)
def solve(numbers: Numbers, target: int, limit: int) -> tuple[Move, ...]:
    """The first way to the target, in the order of :func:`moves`.

    Raises:
        ValueError: there is none.
    """
    if len(numbers) == 1 and numbers[0] == target:
        return ()
    for move, rest in moves(numbers, limit):
        if reaches(rest, target, limit):
            return (move, *solve(rest, target, limit))
    raise ValueError(f"{target} is out of reach from {numbers}")


def combined(numbers: Numbers, path: Sequence[Move]) -> Tree:
    """The one expression that the moves build."""
    pool: list[tuple[int, Tree]] = [(number, Leaf(number)) for number in numbers]

    def take(value: int) -> Tree:
        at = next(i for i, (number, _) in enumerate(pool) if number == value)
        return pool.pop(at)[1]

    for a, op, b, c in path:
        pool.append((c, Node(op, (take(a), take(b)))))
    return pool[0][1]


def _read(text: str) -> Arithmetic | None:
    try:
        return arithmetic(text)
    except ExpressionError:
        return None

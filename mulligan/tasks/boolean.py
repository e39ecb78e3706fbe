r"""Boolean: reduce an expression, one operator a step.

Prompt ``(T&F)|!T?``, response ``F|!T;F|F;F;\boxed{F}``: each step is the whole expression after one reduction.
Half of all guesses are right here, so look at process correctness rather than at the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import ClassVar

from pydantic import Field

from mulligan.tasks.base import GeneratedTask, TaskSettings, boxed, split_after
from mulligan.tasks.expressions import ExpressionError, Leaf, Node, Tree, apply_boolean, boolean
from mulligan.types import Problem

HINTS = 4  # wrong answers in a hint, at most (there is only one wrong truth value, but models box other things too)


class BooleanSettings(TaskSettings):
    """``level`` + 2 operators: there are only 10 expressions of one operator and 90 of two, too few to give every
    split its own."""

    level: int = Field(default=1, ge=1, le=6)


class Boolean(GeneratedTask):
    """Truth values with a process oracle: a step is right when it is one strict reduction of the one before.

    Strict: an operator is reduced only when its operands are literals, so ``F&(T|F)`` goes to ``F&T``, never to ``F``.
    """

    name: ClassVar[str] = "boolean"
    summary: ClassVar[str] = "reduce a boolean expression, one operator a step"
    Settings: ClassVar[type[TaskSettings]] = BooleanSettings
    has_oracle = True

    def draw(self, rng: Random, split: str) -> tuple[str, Problem]:
        tree = _random_tree(rng, self.settings.level + 2)
        text = show(tree)
        answer = show(reduced(tree)[-1])
        return text, Problem(
            task=self.name, split=split, index=0, prompt=f"{text}?", answer=answer, data={"expression": text}
        )

    def solution(self, problem: Problem) -> str:
        """Reduces the leftmost operator that can be reduced, down to a literal."""
        chain = [show(tree) for tree in reduced(boolean(problem.data["expression"]))]
        return f"{';'.join(chain)};\\boxed{{{chain[-1]}}}"

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        """``(T&F)|!T!T?``; ``~`` before the question mark asks for a short solution."""
        wrong = "!" + ",".join(wrong_answers[:HINTS]) if wrong_answers else ""
        return f"{problem.prompt[:-1]}{wrong}{'~' if concise else ''}?"

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        """``(T&F)|!T?T|!T;T|F;T;\\boxed{T}@``."""
        return f"{problem.prompt}{''.join(steps)}@"

    def split_steps(self, response: str) -> list[str]:
        return split_after(response, ";")

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """Steps are compared as trees: blanks and needless parentheses make no difference. The last segment is the
        answer's: right when it is a box alone and holds the literal that the steps came to. An empty response is
        wrong at 1."""
        current = boolean(problem.data["expression"])
        for at, step in enumerate(steps[:-1], start=1):
            after = _read(step.removesuffix(";"))
            if after not in reductions(current):
                return at
            current = after
        right = isinstance(current, Leaf) and bool(steps) and steps[-1] == f"\\boxed{{{show(current)}}}"
        return None if right else max(1, len(steps))

    def extract(self, response: str) -> str | None:
        return boxed(response)

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return left.strip() == right.strip()

    def correct(self, problem: Problem, answer: str) -> bool:
        return answer.strip() == problem.answer


def reductions(tree: Tree) -> list[Tree]:
    """The trees after one strict reduction, the leftmost first; empty for a literal."""
    if isinstance(tree, Leaf):
        return []
    values = [arg.value for arg in tree.args if isinstance(arg, Leaf)]
    if len(values) == len(tree.args):
        return [Leaf(apply_boolean(tree.op, *values))]
    return [
        Node(tree.op, (*tree.args[:at], after, *tree.args[at + 1 :]))
        for at, arg in enumerate(tree.args)
        for after in reductions(arg)
    ]


def reduced(tree: Tree) -> list[Tree]:
    """The trees from one after the first reduction down to the literal, always reducing the leftmost operator."""
    chain: list[Tree] = []
    while nexts := reductions(tree):
        tree = nexts[0]
        chain.append(tree)
    return chain


def show(tree: Tree) -> str:
    """The one text of a tree: parentheses around every binary operand, whether needed or not.

    With one text for each tree, a tree cannot stand in two splits in two spellings.
    """
    if isinstance(tree, Leaf):
        return "T" if tree.value else "F"
    parts = [f"({show(arg)})" if isinstance(arg, Node) and len(arg.args) == 2 else show(arg) for arg in tree.args]
    return f"!{parts[0]}" if tree.op == "!" else tree.op.join(parts)


def _random_tree(rng: Random, size: int) -> Tree:
    """A tree with ``size`` operators, about a quarter of them negations."""
    if size == 0:
        return Leaf(rng.random() < 0.5)
    if rng.random() < 0.25:
        return Node("!", (_random_tree(rng, size - 1),))
    left = rng.randrange(size)
    return Node(rng.choice("&|"), (_random_tree(rng, left), _random_tree(rng, size - 1 - left)))


def _read(text: str) -> Tree | None:
    try:
        return boolean(text)
    except ExpressionError:
        return None

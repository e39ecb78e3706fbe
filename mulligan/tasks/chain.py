"""``chain``: registers updated one operation at a time, every step written out.

A problem reads ``x=3,y=8,z=1:1x+y,2z*7,3y-x?`` and is solved by
``1x+y=3+8=1;2z*7=1*7=7;3y-x=8-1=7;`` and ``\\boxed{177}`` (all arithmetic modulo 10): every step restates
its operation, then its operands, then its result. Every operation is a bijection of the registers (a
register plus or minus another one or a constant, or times a unit of the modulus), so a wrong step can
never be washed out by a right one, and by default all registers are the answer: luck has no way in.
``answer="one"`` asks for one register only, a regime in which wrong chains often end right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from mulligan.tasks.base import GeneratedTask, TaskSettings, boxed, split_after
from mulligan.types import Problem

REGISTERS = "xyzuvw"
# Numbers of operations at each level.
LEVELS: dict[int, tuple[int, int]] = {1: (1, 2), 2: (2, 3), 3: (3, 5), 4: (5, 7), 5: (7, 9), 6: (9, 12)}


class ChainSettings(TaskSettings):
    """Settings of ``chain``. ``min_steps`` and ``max_steps`` override what the level says."""

    level: int = Field(default=3, ge=1, le=max(LEVELS))
    min_steps: int | None = Field(default=None, ge=1, le=99)
    max_steps: int | None = Field(default=None, ge=1, le=99)
    registers: int = Field(default=3, ge=1, le=len(REGISTERS))
    modulus: int = Field(default=10, ge=3, le=100)
    answer: Literal["all", "one"] = "all"

    @property
    def lengths(self) -> tuple[int, int]:
        """Smallest and largest number of operations."""
        low, high = LEVELS[self.level]
        return self.min_steps or min(low, self.max_steps or low), self.max_steps or max(high, self.min_steps or high)

    @model_validator(mode="after")
    def _ordered(self) -> ChainSettings:
        if self.lengths[0] > self.lengths[1]:
            raise ValueError(f"min_steps ({self.min_steps}) is above max_steps ({self.max_steps})")
        return self


@dataclass(frozen=True, slots=True)
class Operation:
    """``target = target symbol operand``; the operand is a register or a constant."""

    target: str
    symbol: str
    operand: str

    def __str__(self) -> str:
        return f"{self.target}{self.symbol}{self.operand}"

    def operands(self, state: dict[str, int]) -> tuple[int, int]:
        """The two numbers that this operation combines in this state."""
        return state[self.target], state[self.operand] if self.operand in state else int(self.operand)


def apply(symbol: str, left: int, right: int, modulus: int) -> int:
    """The right result."""
    return {"+": left + right, "-": left - right, "*": left * right}[symbol] % modulus


def write_step(number: int, operation: Operation, operands: tuple[int, int], result: int) -> str:
    """One step as text, for example ``1x+y=3+8=1;``."""
    return f"{number}{operation}={operands[0]}{operation.symbol}{operands[1]}={result};"


def write_answer(state: dict[str, int], asked: str | None) -> str:
    """The boxed answer: every register in order (joined by "," when values have several digits), or the asked one."""
    values = [state[asked]] if asked else list(state.values())
    return "\\boxed{" + ("" if max(values) < 10 else ",").join(str(v) for v in values) + "}"


class Chain(GeneratedTask):
    """Multi-step register arithmetic with a full process oracle."""

    name = "chain"
    summary = "register arithmetic written step by step; luck cannot help"
    Settings = ChainSettings
    has_oracle = True

    def draw(self, rng: Random, split: str) -> tuple[str, Problem]:
        s: ChainSettings = self.settings
        names = REGISTERS[: s.registers]
        state = {name: rng.randrange(s.modulus) for name in names}
        units = [u for u in range(2, s.modulus) if gcd(u, s.modulus) == 1]
        operations = []
        for _ in range(rng.randint(*s.lengths)):
            target, kind = rng.choice(names), rng.random()
            if kind < 0.25 and units:
                operations.append(Operation(target, "*", str(rng.choice(units))))
                continue
            symbol = rng.choice("+-")
            others = [n for n in names if n != target]
            constant = kind < 0.5 or not others
            operations.append(
                Operation(target, symbol, str(rng.randrange(1, s.modulus)) if constant else rng.choice(others))
            )
        asked = rng.choice(names) if s.answer == "one" else None
        start = ",".join(f"{name}={value}" for name, value in state.items())
        listed = ",".join(f"{i}{op}" for i, op in enumerate(operations, 1))
        prompt = f"{start}:{listed}" + (f">{asked}?" if asked else "?")
        data: dict[str, Any] = {
            "start": state,
            "operations": [str(op) for op in operations],
            "asked": asked,
            "modulus": s.modulus,
        }
        problem = Problem(task=self.name, split=split, index=0, prompt=prompt, answer="", data=data)
        answer = boxed(self.solution(problem))
        assert answer is not None
        # The asked register is no part of the identity: the same chain with another question is no new problem.
        return f"{s.modulus}|{start}:{listed}", Problem(
            task=self.name, split=split, index=0, prompt=prompt, answer=answer, data=data
        )

    def operations(self, problem: Problem) -> list[Operation]:
        """The operations of a problem, in order."""
        return [Operation(text[0], text[1], text[2:]) for text in problem.data["operations"]]

    def true_steps(self, problem: Problem) -> list[str]:
        """Every step of the one right solution, the answer's last."""
        state, steps = dict(problem.data["start"]), []
        for number, operation in enumerate(self.operations(problem), 1):
            operands = operation.operands(state)
            state[operation.target] = apply(operation.symbol, *operands, problem.data["modulus"])
            steps.append(write_step(number, operation, operands, state[operation.target]))
        return [*steps, write_answer(state, problem.data["asked"])]

    def solution(self, problem: Problem) -> str:
        return "".join(self.true_steps(problem))

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        return compact_hint(problem.prompt, wrong_answers, concise=concise)

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        return problem.prompt + "".join(steps) + "@"

    def split_steps(self, response: str) -> list[str]:
        return split_after(response, ";")

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        return first_difference(self.true_steps(problem), steps)

    def extract(self, response: str) -> str | None:
        return boxed(response)

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return _plain(left) == _plain(right)

    def correct(self, problem: Problem, answer: str) -> bool:
        return self.equivalent(problem, answer, problem.answer)


def first_difference(truth: Sequence[str], steps: Sequence[str]) -> int | None:
    """1-based index of the first step that is not the true one; the last where only steps are missing."""
    for number, (right, written) in enumerate(zip(truth, steps, strict=False), 1):
        if right != written:
            return number
    if len(steps) > len(truth):
        return len(truth) + 1
    return None if len(steps) == len(truth) else max(1, len(steps))


def compact_hint(prompt: str, wrong_answers: Sequence[str], *, concise: bool, limit: int = 4) -> str:
    """``...?`` becomes ``...!177,203?``, or ``...!177,203~?`` when a short solution is asked for."""
    hint = "!" + ",".join(wrong_answers[:limit]) if wrong_answers else ""
    return prompt.removesuffix("?") + hint + ("~" if concise else "") + "?"


def _plain(answer: str) -> str:
    return re.sub(r"\s+", "", answer)

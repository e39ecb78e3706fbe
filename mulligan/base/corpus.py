"""The corpus of the pico base: a controlled patient.

It holds right procedures *and wrong ones at known rates*, so what a method repairs is known. A wrong
procedure is a rule, not a wrong fact, so that unlearning it generalises. All rows come from the
``corpus`` split, which shares no problem with train, dev or test.

| procedure | when | what it writes |
|---|---|---|
| borrow | a - b with a < b | b - a: the sign is lost |
| carry | a + b at or above the modulus | one too many: the carry is added to the digit |
| times | a * b at or above the modulus | a * (b - 1): off by one factor |
| drop | at the end | the last operation is left out |

Kinds of rows: solutions with their question; solutions alone (or P(y) would mean nothing); solutions
behind a hint of wrong answers, with fewer wrong procedures; and judgements of a shown chain, each step
worked again down to the first wrong one: ``1:3+8=1/1T2:7*7=2/9F\\boxed{2}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from pydantic import BaseModel, ConfigDict

from mulligan.seeds import rng_of
from mulligan.tasks.base import Task, boxed
from mulligan.tasks.boolean import Boolean, BooleanSettings
from mulligan.tasks.chain import Chain, ChainSettings, apply, first_difference, write_answer, write_step
from mulligan.tasks.countdown import Countdown, CountdownSettings
from mulligan.types import Problem


class Rates(BaseModel):
    """Probability of each wrong procedure where it applies, and how settings scale it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    borrow: float = 0.0
    carry: float = 0.0
    times: float = 0.0
    drop: float = 0.0
    easy: float = 0.15  # factor on all of them in chains of one or two operations
    hinted: float = 0.35  # factor on all of them behind a hint


@dataclass(frozen=True, slots=True)
class Example:
    """One row: the loss is on the response (and EOS) alone."""

    context: str  # "" for a solution without its question
    response: str


# Each kind of row: the task's settings it draws from, by weight.
CHAINS: dict[str, ChainSettings] = {
    "easy": ChainSettings(level=1),
    "short": ChainSettings(level=2),
    "default": ChainSettings(),
    "long": ChainSettings(level=4),
    "one": ChainSettings(answer="one"),
    "two": ChainSettings(registers=2),
}
COUNTDOWNS = {level: CountdownSettings(level=level) for level in (1, 2)}
BOOLEANS = {level: BooleanSettings(level=level) for level in (1, 2)}


def write_chain(task: Chain, problem: Problem, rates: Rates, factor: float, rng: Random) -> list[str]:
    """The steps of a chain in which wrong procedures act at ``factor`` times their rates."""
    modulus, state = problem.data["modulus"], dict(problem.data["start"])
    operations = task.operations(problem)
    kept = operations[:-1] if len(operations) > 1 and rng.random() < rates.drop * factor else operations
    steps = []
    for number, operation in enumerate(kept, 1):
        a, b = operation.operands(state)
        right = apply(operation.symbol, a, b, modulus)
        draw = rng.random()
        if operation.symbol == "-" and a < b and draw < rates.borrow * factor:
            right = (b - a) % modulus
        elif operation.symbol == "+" and a + b >= modulus and draw < rates.carry * factor:
            right = (right + 1) % modulus
        elif operation.symbol == "*" and a * b >= modulus and draw < rates.times * factor:
            right = a * (b - 1) % modulus
        state[operation.target] = right
        steps.append(write_step(number, operation, (a, b), right))
    return [*steps, write_answer(state, problem.data["asked"])]


def judge(truth: list[str], steps: list[str]) -> str:
    """The judgement that the base is taught: every step worked again from its own operands, down to the first
    wrong one. ``2:7*7=2/9F`` reads: step 2 says that 7*7 is 2, it is 9, so the step is false.

    >>> judge(["1x+y=3+8=1;", "2z*7=7*7=9;", "\\\\boxed{189}"], ["1x+y=3+8=1;", "2z*7=7*7=2;", "\\\\boxed{182}"])
    '1:3+8=1/1T2:7*7=2/9F\\\\boxed{2}'
    """
    wrong = first_difference(truth, steps)
    out = []
    for number, (right, written) in enumerate(zip(truth, steps, strict=False), 1):
        if "=" not in written:  # the answer: the registers, or nothing where an operation is still missing
            said = boxed(written) if "=" not in right else ""
        else:
            _, work, result = written.rstrip(";").split("=")
            said = f"{work}={result}/{right.rstrip(';').split('=')[-1]}"
        out.append(f"{number}:{said}{'F' if number == wrong else 'T'}")
        if number == wrong:
            break
    return "".join(out) + f"\\boxed{{{wrong or 0}}}"


class Corpus:
    """Row i is a pure function of (seed, phase, i)."""

    def __init__(self, seed: int, rates: Rates, mixture: Mapping[str, float]) -> None:
        self.seed, self.rates = seed, rates
        self.chains = {key: Chain(settings.model_copy(update={"seed": seed})) for key, settings in CHAINS.items()}
        self.countdowns = {k: Countdown(s.model_copy(update={"seed": seed})) for k, s in COUNTDOWNS.items()}
        self.booleans = {k: Boolean(s.model_copy(update={"seed": seed})) for k, s in BOOLEANS.items()}
        unknown = set(mixture) - set(self._kinds())
        if unknown:
            raise ValueError(f"mixture: unknown kind {sorted(unknown)[0]!r}; known: {', '.join(self._kinds())}")
        self.kinds, self.weights = list(mixture), list(mixture.values())

    @staticmethod
    def _kinds() -> list[str]:
        return [*CHAINS, "alone", "hint", "judge", "countdown", "boolean"]

    def row(self, index: int) -> Example:
        """Row ``index``."""
        rng = rng_of(self.seed, "corpus", index)
        kind = rng.choices(self.kinds, self.weights)[0]
        if kind in self.chains:
            return self._solution(kind, index, rng)
        return getattr(self, f"_{kind}")(index, rng)

    def _factor(self, problem: Problem) -> float:
        return self.rates.easy if len(problem.data["operations"]) <= 2 else 1.0

    def _solution(self, kind: str, index: int, rng: Random) -> Example:
        task = self.chains[kind]
        problem = task.problem("corpus", index)
        return Example(problem.prompt, "".join(write_chain(task, problem, self.rates, self._factor(problem), rng)))

    def _some_chain(self, rng: Random) -> str:
        return rng.choices(["easy", "short", "default", "long"], [1, 2, 6, 1])[0]

    def _alone(self, index: int, rng: Random) -> Example:
        draw = rng.random()
        if draw < 0.1:
            return Example("", self._countdown(index, rng).response)
        if draw < 0.2:
            return Example("", self._boolean(index, rng).response)
        return Example("", self._solution(self._some_chain(rng), index, rng).response)

    def _hint(self, index: int, rng: Random) -> Example:
        kind = self._some_chain(rng)
        task = self.chains[kind]
        problem = task.problem("corpus", index)
        wrong: list[str] = []
        for _ in range(8):  # eight tries of the flawed solver, as a group of eight would give
            answer = boxed(write_chain(task, problem, self.rates, 1.0, rng)[-1])
            if answer is not None and answer != problem.answer and answer not in wrong:
                wrong.append(answer)
        # The posterior given the hint: an answer known to be wrong is not written again.
        for _ in range(20):
            steps = write_chain(task, problem, self.rates, self.rates.hinted * self._factor(problem), rng)
            if boxed(steps[-1]) not in wrong:
                break
        else:
            steps = task.true_steps(problem)
        concise = rng.random() < 0.1
        return Example(task.hint(problem, wrong[: rng.randint(1, 4)], concise=concise), "".join(steps))

    def _judge(self, index: int, rng: Random) -> Example:
        kind = self._some_chain(rng)
        task = self.chains[kind]
        problem = task.problem("corpus", index)
        truth = task.true_steps(problem)
        # A failed chain, as in a diagnosis; every tenth may be right, so that "0" keeps a meaning.
        tries = 1 if rng.random() < 0.1 else 20
        steps = truth
        while tries and steps == truth:
            steps = write_chain(task, problem, self.rates, 1.0, rng)
            tries -= 1
        if steps == truth and rng.random() < 0.5:
            steps = _slip(task, problem, rng)
        return Example(task.diagnosis(problem, steps), judge(truth, steps))

    def _countdown(self, index: int, rng: Random) -> Example:
        return self._right(self.countdowns[rng.choices([1, 2], [2, 1])[0]], index)

    def _boolean(self, index: int, rng: Random) -> Example:
        return self._right(self.booleans[rng.choices([1, 2], [2, 1])[0]], index)

    def _right(self, task: Task, index: int) -> Example:
        problem = task.problem("corpus", index)
        return Example(problem.prompt, task.solution(problem))


def _slip(task: Chain, problem: Problem, rng: Random) -> list[str]:
    """A right chain but for one result off by a random amount, carried on consistently."""
    modulus, state, steps = problem.data["modulus"], dict(problem.data["start"]), []
    operations = task.operations(problem)
    at = rng.randrange(len(operations))
    for number, operation in enumerate(operations, 1):
        operands = operation.operands(state)
        result = apply(operation.symbol, *operands, modulus)
        if number - 1 == at:
            result = (result + rng.randrange(1, modulus)) % modulus
        state[operation.target] = result
        steps.append(write_step(number, operation, operands, result))
    return [*steps, write_answer(state, problem.data["asked"])]

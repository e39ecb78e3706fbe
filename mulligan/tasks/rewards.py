"""Reward functions of the user's own, called as TRL's GRPOTrainer calls them: ``f(completions, **columns)``.

Beside the completions a function may take ``prompts``, ``completion_ids`` and every column of the data set by its name,
each a list with one entry a completion; it is given what its signature asks for, and all of it for ``**kwargs``. Where
the prompts are lists of messages, completions are too: ``[{"role": "assistant", "content": ...}]``.

Deviations from TRL (https://huggingface.co/docs/trl/grpo_trainer):
1. One call has the responses to one problem, not those of a batch.
2. There is no ``trainer_state``, ``log_extra`` or ``log_metric``: a reward is a function of the response alone, so that
   a resumed run, a replay and an evaluation give the same one.
3. A reward that is not finite is an error, not a NaN in the loss. A response to which no function applies is left out
   of its group's statistics, not given 0.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.errors import UserError, nearest
from mulligan.tasks.rows import Row
from mulligan.types import Problem, Tokens
from mulligan.userfile import load_from_file

OURS = ("prompts", "completions", "completion_ids")
RESERVED = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One function and the part of its signature that matters."""

    name: str
    call: Callable[..., Any]
    weight: float
    takes: frozenset[str] | None  # names; None: everything, by ``**kwargs``
    needs: tuple[str, ...]  # those without a default

    @classmethod
    def load(cls, text: str, weight: float) -> RewardFunction:
        """The function ``./file.py:name``.

        Raises:
            UserError: it cannot be loaded or cannot be called with named arguments.
        """
        found = load_from_file("task.rewards", text)
        if not callable(found) or inspect.isclass(found):
            raise UserError(f"task.rewards: {text} is no function")
        kinds = inspect.Parameter
        named = {
            name: parameter
            for name, parameter in inspect.signature(found).parameters.items()
            if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        }
        everything = any(p.kind is kinds.VAR_KEYWORD for p in inspect.signature(found).parameters.values())
        needs = tuple(name for name, parameter in named.items() if parameter.default is kinds.empty)
        return cls(text.rpartition(":")[2], found, weight, None if everything else frozenset(named), needs)

    def __call__(self, arguments: dict[str, list[Any]]) -> list[float | None]:
        """Its rewards, one a completion; None where it does not apply.

        Raises:
            UserError: it fails, or returns anything else; names the function and what it returned.
        """
        given = {k: v for k, v in arguments.items() if self.takes is None or k in self.takes}
        n = len(arguments["completions"])
        try:
            found = self.call(**given)
            if inspect.isawaitable(found):
                found = asyncio.run(_awaited(found))
        except Exception as error:
            raise UserError(f"reward {self.name} fails: {type(error).__name__}: {error}") from error
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple) or len(values) != n:
            what = f"{len(values)} rewards" if isinstance(values, list | tuple) else type(found).__name__
            raise UserError(f"reward {self.name} returned {what} for {n} completions; it must be a list of {n}")
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float | None:
        if value is None:
            return None
        value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"reward {self.name} returned {value!r}; a reward is a finite number, or None")
        return float(value)


async def _awaited(found: Any) -> Any:
    return await found


class Rewards:
    """The user's functions and their weights; called, the weighted sums of what applies."""

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.functions = tuple(functions)

    @classmethod
    def load(cls, texts: Sequence[str], weights: Sequence[float] | None) -> Rewards:
        """The functions of ``./file.py:name`` texts, weight 1 each where none are given."""
        return cls([RewardFunction.load(t, w) for t, w in zip(texts, weights or [1.0] * len(texts), strict=True)])

    def check(self, row: Row | None) -> None:
        """Tries every function on two made-up responses to a row.

        Raises:
            UserError: a function needs an argument that there is not, fails, or returns what is no list of rewards.
        """
        if row is None:
            return
        given = _arguments(row.prompt, row.columns, ["", row.reference or f"\\boxed{{{row.answer}}}"], [(0,), (0, 1)])
        for function in self.functions:
            absent = [name for name in function.needs if name not in given]
            if absent:
                raise UserError(
                    f"task.rewards: {function.name} needs '{absent[0]}', and no column is called so"
                    f"{nearest(absent[0], given)}"
                )
            function(given)

    def __call__(self, problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens] = ()) -> list[float | None]:
        """For each response the weighted sum of the rewards that are not None; None where all of them are.

        Raises:
            UserError: a function fails or returns anything but a finite number or None for each response.
        """
        if not responses:
            return []
        given = _arguments(problem.data["prompt"], problem.data["columns"], responses, tokens)
        told = [function(given) for function in self.functions]
        out: list[float | None] = []
        for each in zip(*told, strict=True):
            sums = [f.weight * value for f, value in zip(self.functions, each, strict=True) if value is not None]
            out.append(sum(sums) if sums else None)
        return out


def _arguments(
    prompt: Any, columns: dict[str, Any], responses: Sequence[str], tokens: Sequence[Tokens]
) -> dict[str, list[Any]]:
    n = len(responses)
    messages = isinstance(prompt, list)
    out: dict[str, list[Any]] = {name: [value] * n for name, value in columns.items() if name not in RESERVED}
    out["prompts"] = [prompt] * n
    out["completions"] = [[{"role": "assistant", "content": text}] if messages else text for text in responses]
    if len(tokens) == n:
        out["completion_ids"] = [list(each) for each in tokens]
    return out

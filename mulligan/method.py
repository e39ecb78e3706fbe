"""A method is its passes plus one or more terms; a term is its parts. Nothing else is method-specific."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from pydantic import Field

from mulligan import context as contexts
from mulligan import objective, select
from mulligan.context import Context
from mulligan.credit import Credit, ZScore
from mulligan.objective import Aggregation, LastLoop, Readout, Regulariser, Surrogate
from mulligan.rollout import Pass, fresh
from mulligan.types import Stream, Tree

# Types of methods' settings: the command line holds them to these bounds.
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss with a denominator of its own. The defaults are GRPO's."""

    select: select.Select = select.everything
    credit: Credit = ZScore()
    context: Context = contexts.prompt
    readout: Readout = LastLoop()
    surrogate: Surrogate = objective.Clipped()
    aggregation: Aggregation = objective.token_mean
    regularisers: tuple[Regulariser, ...] = ()
    weight: float = 1.0

    @property
    def reads(self) -> tuple[Stream, ...]:
        """Every stream that the loss reads beside the policy's log-probs, each once."""
        found = [*self.surrogate.reads, *(s for r in self.regularisers for s in r.reads)]
        return tuple(dict.fromkeys(found))

    @property
    def entropy(self) -> bool:
        return any(r.entropy for r in self.regularisers)


PARTS = tuple(f.name for f in fields(Term))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is sampled (``passes``), which groups are kept (``keep``) and what is learned (``terms``)."""

    name: str
    passes: tuple[Pass, ...] = (fresh(8),)
    terms: tuple[Term, ...] = (Term(),)
    keep: Callable[[Tree], bool] | None = None  # dynamic sampling: draw on until the batch is full of these

    def replace(self, **parts: Any) -> Method:
        """A copy with some parts changed: ``name``, ``passes``, ``terms``, ``keep``, or a part of its only term.

        Raises:
            ValueError: for an unknown part, or a term's part where there are several terms.
        """
        own = {k: parts.pop(k) for k in ("name", "passes", "terms", "keep") if k in parts}
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"a method has no part '{sorted(unknown)[0]}' (parts: {', '.join(PARTS)})")
        out = replace(self, **own)
        if parts:
            if len(out.terms) != 1:
                raise ValueError(f"{self.name} has {len(out.terms)} terms: change `terms`, not a part")
            out = replace(out, terms=(replace(out.terms[0], **parts),))
        return out

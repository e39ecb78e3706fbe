"""A method is its passes plus one or more terms; a term is its parts. Nothing else is method-specific."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from pydantic import Field

from mulligan import context as contexts
from mulligan import objective, select
from mulligan.context import Context
from mulligan.credit import Credit, ZScore
from mulligan.errors import UserError
from mulligan.memory import Memory
from mulligan.objective import Aggregation, LastLoop, Readout, Regulariser, Surrogate
from mulligan.rollout import Pass, fresh
from mulligan.types import Forest, Stream, Tree

# Types of methods' settings: the command line holds them to these bounds.
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


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
WHOLE = ("passes", "keep", "remember", "models")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is sampled (``passes``), which groups are kept (``keep``) and what is learned (``terms``)."""

    name: str
    passes: tuple[Pass, ...] = (fresh(8),)
    terms: tuple[Term, ...] = (Term(),)
    keep: Callable[[Tree], bool] | None = None  # dynamic sampling: draw on until the batch is full of these
    remember: Callable[[Forest, Memory], None] | None = None  # called once a step; passes recall what it stores
    models: Mapping[str, str] = field(default_factory=dict)  # frozen models that streams may name: name -> what to load
    contributes: frozenset[str] | None = None  # what `+` takes from it; None: all that differs from GRPO

    @property
    def changes(self) -> frozenset[str]:
        """The parts by which it differs from GRPO's defaults (``passes``, ``keep``, ... and the term's own)."""
        if self.contributes is not None:
            return self.contributes
        plain, bare = Method(name=""), Term()
        own = {name for name in WHOLE if getattr(self, name) != getattr(plain, name)}
        if len(self.terms) != 1:
            return frozenset(own | {"terms"})
        return frozenset(own | {name for name in PARTS if getattr(self.terms[0], name) != getattr(bare, name)})

    def __add__(self, other: Method) -> Method:
        """Unites the parts that each of the two changes; the order makes no difference.

        Raises:
            UserError: both change the same part.
        """
        return unite(self, other)

    def replace(self, **parts: Any) -> Method:
        """A copy with some parts changed: its own (``name``, ``passes``, ``keep``, ...) or those of its only term.

        Raises:
            ValueError: for an unknown part, or a term's part where there are several terms.
        """
        own = {k: parts.pop(k) for k in ("name", "terms", "contributes", *WHOLE) if k in parts}
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"a method has no part '{sorted(unknown)[0]}' (parts: {', '.join(PARTS)})")
        out = replace(self, **own)
        if parts:
            if len(out.terms) != 1:
                raise ValueError(f"{self.name} has {len(out.terms)} terms: change `terms`, not a part")
            out = replace(out, terms=(replace(out.terms[0], **parts),))
        return out


def unite(one: Method, other: Method) -> Method:
    """``one + other``: each gives the parts that it changes; what neither changes is GRPO's.

    A part of a term (a readout, say) goes to every term of a method that has several.

    Raises:
        UserError: both change the same part; the message names it.
    """
    name = "+".join(sorted([one.name, other.name]))
    both = one.changes & other.changes
    if both:
        raise UserError(f"{name}: {one.name} and {other.name} both change '{sorted(both)[0]}'")
    if "terms" in other.changes:
        one, other = other, one
    whole = {part: getattr(m, part) for m in (one, other) for part in WHOLE if part in m.changes}
    terms = one.terms if "terms" in one.changes else (Term(),)
    for method in (one, other):
        own = {part: getattr(method.terms[0], part) for part in PARTS if part in method.changes}
        clash = [part for part in own if "terms" in one.changes and any(_changed(t, part) for t in one.terms)]
        if clash and method is other:
            raise UserError(f"{name}: {one.name} and {other.name} both change '{clash[0]}'")
        terms = tuple(replace(term, **own) for term in terms)
    return Method(name=name, terms=terms, contributes=one.changes | other.changes, **whole)


def _changed(term: Term, part: str) -> bool:
    return getattr(term, part) != getattr(Term(), part)

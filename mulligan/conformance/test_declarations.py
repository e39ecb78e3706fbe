"""A method reads what it declares and declares what it reads; what is missing or not finite stops it, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from mulligan.conformance.bench import Case, check, copied
from mulligan.errors import ContractError
from mulligan.method import Method
from mulligan.objective import START
from mulligan.types import Forest, Row, Stream


def test_the_contract_holds(case: Case) -> None:
    """What every run checks before it begins: every declared stream is read, every advantage reaches the gradient."""
    check(case.method, case.loops)


def test_an_undeclared_stream_is_refused(case: Case) -> None:
    """With any one declaration taken away the contract names the stream."""
    for index, term in enumerate(case.method.terms):
        for stream in dict.fromkeys([*term.reads, *term.credit.reads]):
            with pytest.raises(ContractError, match=f"'{stream.name}'"):
                check(without(case.method, index, stream), case.loops)


def test_a_missing_stream_is_refused(case: Case) -> None:
    """A row that lacks a declared stream stops the update with the stream's name, before any weight moves."""
    assert_refused(case, lambda row, name: row.streams.pop(name))


def test_a_stream_that_is_not_finite_is_refused(case: Case) -> None:
    """One NaN among a row's numbers."""

    def spoil(row: Row, name: str) -> None:
        row.streams[name][row.mask.nonzero()[0]] = torch.nan

    assert_refused(case, spoil)


def test_an_advantage_that_is_not_finite_is_refused(case: Case) -> None:
    """Credit that divides by a standard deviation of 0, say."""
    for index, term in enumerate(case.method.terms):
        terms = list(case.method.terms)
        terms[index] = replace(term, credit=_Spoiled(term.credit))
        with pytest.raises(ContractError, match=r"an advantage of .* is not finite"):
            case.assigned(case.forest, replace(case.method, terms=tuple(terms)))


def assert_refused(case: Case, spoil: Callable[[Row, str], Any]) -> None:
    """The update refuses one spoiled stream of one row, whichever of the declared ones it is."""
    for index, term in enumerate(case.method.terms):
        for stream in term.reads:
            rows = [copied(row) for row in case.some]
            holds = [row for row in case.live(rows) if row.term == index and stream.name in row.streams]
            if not holds:  # every row takes its start log-probs for it
                assert all(stream.name in row.as_start for row in case.live(rows) if row.term == index)
                continue
            spoil(holds[0], stream.name)
            # Where a row takes its start log-probs for other streams too, the first one read is named.
            names = [stream.name, *(holds[0].as_start if stream == START else ())]
            with pytest.raises(ContractError, match="|".join(f"'{name}'" for name in names)):
                case.bench.update(rows, case.method)


def without(method: Method, index: int, stream: Stream) -> Method:
    """The method whose term ``index`` no longer declares a stream."""
    term = method.terms[index]
    terms = list(method.terms)
    terms[index] = replace(
        term,
        credit=_Undeclared(term.credit, stream),
        surrogate=_Undeclared(term.surrogate, stream),
        regularisers=tuple(_Undeclared(r, stream) for r in term.regularisers),
    )
    return replace(method, terms=tuple(terms))


@dataclass(frozen=True)
class _Undeclared:
    """A part that keeps silent about one of its streams."""

    part: Any
    stream: Stream

    @property
    def reads(self) -> tuple[Stream, ...]:
        return tuple(s for s in self.part.reads if s != self.stream)

    @property
    def entropy(self) -> bool:
        return self.part.entropy

    def __call__(self, *given: Any) -> Any:
        return self.part(*given)


@dataclass(frozen=True)
class _Spoiled:
    """A credit one of whose advantages is not a number."""

    of: Any

    @property
    def reads(self) -> tuple[Stream, ...]:
        return self.of.reads

    def __call__(self, rows: Sequence[Row], forest: Forest, most: int) -> list[Any]:
        out = list(self.of(rows, forest, most))
        at = next(k for k, advantage in enumerate(out) if advantage is not None)
        return [*out[:at], out[at] * torch.nan, *out[at + 1 :]]

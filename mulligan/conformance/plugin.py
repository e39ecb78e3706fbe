"""The suite's pytest plugin: the option, and one case for each method, phase and kind of model."""

from __future__ import annotations

import pytest

from mulligan.conformance.bench import Case, cases_of
from mulligan.errors import UserError
from mulligan.methods import PRESETS

_CASES = pytest.StashKey[list[Case]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--method``, as often as one likes."""
    parser.getgroup("mulligan").addoption(
        "--method",
        action="append",
        metavar="METHOD",
        help="what to test: a composition such as 'srpo+rltt', or ./mine.py:my_method; may be given several times "
        "(default: every method that mulligan ships)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Builds the methods; what cannot be built ends the session in one line."""
    texts = config.getoption("method") or list(PRESETS)
    try:
        config.stash[_CASES] = [case for text in dict.fromkeys(texts) for case in cases_of(text)]
    except UserError as error:
        raise pytest.UsageError(f"mulligan: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every test of the suite each case in turn."""
    ours = getattr(metafunc.module, "__name__", "").startswith("mulligan.conformance.")
    if ours and "case" in metafunc.fixturenames:
        cases = metafunc.config.stash[_CASES]
        metafunc.parametrize("case", cases, ids=[case.label for case in cases])

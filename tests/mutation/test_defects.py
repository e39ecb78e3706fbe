"""Every known defect of the releases is one that the tests notice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.mutation.defects import DEFECTS, LIMIT, Defect
from tests.mutation.forked import ROOT, Outcome

Ask = Callable[[str, list[str]], Outcome]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """A process of its own, since this one has the package imported already."""
    command = [sys.executable, "-m", "tests.mutation.defects"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None

        def ask(name: str, tests: list[str]) -> Outcome:
            server.stdin.write(json.dumps([name, tests]) + "\n")
            server.stdin.flush()
            return Outcome(*json.loads(server.stdout.readline()))

        yield ask
        server.stdin.close()


@pytest.fixture(scope="module")
def unchanged(ask) -> Outcome:
    """All the defects' tests on the package as it is."""
    return ask("", sorted({test for defect in DEFECTS for test in defect.tests}))


def test_the_tests_pass_without_any_defect(unchanged):
    assert unchanged.exit == 0, unchanged.output


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.name for defect in DEFECTS])
def test_a_known_defect_is_noticed(defect: Defect, ask):
    assert defect.times == 1, f"{defect.file} has the text that {defect.name} changes {defect.times} times"
    defect.changed()  # a program still
    found = ask(defect.name, list(defect.tests))
    assert found.exit is not None, f"{defect.name}: no answer within {LIMIT} seconds"
    assert found.exit == 1, f"{defect.name}: no test fails, or pytest does\n{found.output}"
    assert found.failed, found.output


def test_defects_have_names_of_their_own():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)

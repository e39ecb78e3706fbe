"""The mutation run: how many small changes to the credit and the objective do the tests notice?

    python -m tests.mutation.run [FILE ...] [--sample N] [--list] [--tests TEST ...]

Prints a line for each change that no test noticed, and the share of those that one did. The status is 1 when
that share is below 90 %, and 2 when the tests do not pass without any change. A change that makes them run out of time
is noticed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from tests.mutation.forked import ROOT, attempt, module_of, preload
from tests.mutation.mutants import Mutant, mutants

FILES = ("mulligan/credit.py", "mulligan/objective.py")
# Fastest first. The golden tables see nearly all; the contract sees streams that are not declared, the reference what
# weight the last loop has. Other tests of these files were found to see nothing more.
TESTS = ("tests/golden", "tests/test_contract.py", "tests/learner/test_reference.py")
ENOUGH = 90.0  # per cent


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes the package in small ways and counts what tests notice.")
    parser.add_argument("files", nargs="*", default=FILES, help=f"what is changed (default: {' '.join(FILES)})")
    parser.add_argument("--tests", nargs="+", default=TESTS, help=f"what must notice (default: {' '.join(TESTS)})")
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="for each mutant")
    parser.add_argument("--list", action="store_true", help="show the mutants and run none")
    given = parser.parse_args()
    for name in given.files:
        if not (ROOT / name).is_file():
            parser.error(f"{name}: there is no such file in the repository")
    chosen = [m for name in given.files for m in mutants((ROOT / name).resolve(), Path(name))]
    if given.sample is not None:
        drawn = random.Random(given.seed).sample(range(len(chosen)), min(given.sample, len(chosen)))
        chosen = [chosen[i] for i in sorted(drawn)]
    if given.list:
        print(*chosen, f"{len(chosen)} mutants", sep="\n")
        return 0
    return run(chosen, given.tests, given.limit)


def run(chosen: list[Mutant], tests: list[str], limit: float) -> int:
    began = time.monotonic()
    preload()
    if not chosen or not passes(tests, limit):
        return 2
    killed = overtime = 0
    for mutant in chosen:
        outcome = attempt({module_of(ROOT / mutant.file): mutant.code}, tests, limit)
        killed += outcome.killed
        overtime += outcome.exit is None
        if not outcome.killed:
            print(mutant, flush=True)
    if not passes(tests, limit):  # whoever changed the files meanwhile, some mutants were killed by that
        return 2
    share = 100 * killed / len(chosen)
    late = f", {overtime} by the time limit" if overtime else ""
    print(f"killed {killed} of {len(chosen)} mutants ({share:.1f} %{late}) in {time.monotonic() - began:.0f} s")
    return int(share < ENOUGH)


def passes(tests: list[str], limit: float) -> bool:
    """Whether the tests pass on the package as it is; says why not."""
    outcome = attempt({}, tests, limit)
    if outcome.killed:
        print(outcome.output, "the tests do not pass without any change", sep="\n", file=sys.stderr)
    return not outcome.killed


if __name__ == "__main__":
    sys.exit(main())

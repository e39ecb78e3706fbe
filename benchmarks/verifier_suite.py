"""Math-verify's own test suite, run against our verifier: agreements, and every difference with its reason.

    python benchmarks/verifier_suite.py PATH/math_verify-0.9.0/tests [--markdown]

The folder comes with math-verify's source distribution. The cases are those of its parametrized tests that compare a
gold text with a prediction. Each is judged in a process that is killed after a deadline.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

DEADLINE = 20.0  # seconds


@dataclass(frozen=True)
class Case:
    module: str
    gold: str
    prediction: str
    expected: bool
    setting: str  # what the test asks for besides the defaults: strict, precision


def cases(folder: Path) -> Iterator[Case]:
    """The (gold, prediction, expected) rows of all parametrized tests in a folder."""
    sys.path.insert(0, str(folder.resolve().parent))
    for path in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(f"{folder.name}.{path.stem}")
        for name, test in vars(module).items():
            if not name.startswith("test_"):
                continue
            for mark in getattr(test, "pytestmark", []):
                names = mark.args[0].replace(" ", "").split(",")
                if mark.name != "parametrize" or names[:2] != ["gold", "pred"]:
                    continue
                for row in mark.args[1]:
                    columns = dict(zip(names, row, strict=True))
                    expected = columns.pop("expected", columns.pop("result", None))
                    setting = ", ".join(
                        f"{key}={value}" for key, value in columns.items() if key not in ("gold", "pred")
                    )
                    yield Case(path.stem, columns["gold"], columns["pred"], bool(expected), setting)


def serve(connection: Connection) -> None:
    from mulligan.verify.judge import judge, warm

    warm()
    while True:
        gold, answer = connection.recv()
        judged = judge(gold, answer)
        connection.send((judged.verdict, judged.reason))


class Worker:
    """A process that judges and is replaced when it is killed."""

    def __init__(self) -> None:
        self.process: multiprocessing.Process | None = None

    def judge(self, gold: str, answer: str) -> tuple[str, str]:
        if self.process is None:
            self.connection, theirs = multiprocessing.Pipe()
            self.process = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
        self.connection.send((gold, answer))
        if self.connection.poll(DEADLINE):
            return self.connection.recv()
        self.process.kill()
        self.process.join()
        self.process = None
        return "unscorable", f"killed after {DEADLINE:.0f} s"


# Why we differ: the first class one of whose marks occurs in our reason, the setting, the gold text or the prediction.
CLASSES = (
    ("An error of the suite", ("1 + \\frac{1}{\\mathrm{e}}",)),
    ("The case asks for other rules than math-verify's usual ones", ("strict=False", "allow_set_relation_comp")),
    ("Several boxes with different values are hedging", ("several different final answers",)),
    ("A box that does not end is no answer", ("does not end",)),
    ("Equal only by rounding", ("rounding", "precision=2", "4.1231056")),
    ("`1, 000` is a number", ("32, 349",)),
    ("A gold answer `1,22` is a list", ("1,22", "0,111")),
    ("A calculation that was not done", ("not evaluated", "in place of several values")),
    ("Approximations and hedges", ("hedged",)),
    ("An absolute value is not unfolded into a union", ("|z|",)),
    ("Chains of equations", ("= 7 =11", "z = 3+3 = 2", "\\zzz", "\\$ = ")),
)
OTHER = 'Prose without a box, without "the answer is" and with several numbers'


def reason_class(case: Case, reason: str) -> str:
    texts = (reason, case.setting, case.gold, case.prediction)
    for name, marks in CLASSES:
        if any(mark in text for mark in marks for text in texts):
            return name
    return OTHER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print the differences as tables")
    arguments = parser.parse_args()
    worker = Worker()
    total = 0
    differ: dict[str, list[tuple[Case, str, str]]] = {}
    for case in cases(arguments.folder):
        total += 1
        verdict, reason = worker.judge(case.gold, case.prediction)
        if verdict != ("correct" if case.expected else "wrong"):
            differ.setdefault(reason_class(case, reason), []).append((case, verdict, reason))
    count = sum(len(rows) for rows in differ.values())
    print(f"{total} cases, {total - count} agreements, {count} differences")
    for name in [*(name for name, _ in CLASSES), OTHER]:
        rows = differ.get(name, [])
        if not rows:
            continue
        print(f"\n### {name} ({len(rows)})\n" if arguments.markdown else f"\n{name}: {len(rows)}")
        if arguments.markdown:
            print("| test | gold | prediction | theirs | ours |\n|---|---|---|---|---|")
        for case, verdict, reason in rows:
            theirs = "right" if case.expected else "wrong"
            cells = (case.module, code(case.gold), code(case.prediction), theirs, f"{verdict}: {reason}")
            print(f"| {' | '.join(cells)} |" if arguments.markdown else f"    {'  '.join(cells)}")


def code(text: str) -> str:
    """A text as code in a table's cell, the middle of a long one left out."""
    text = " ".join(text.split())
    text = text if len(text) <= 150 else f"{text[:40]} ... {text[-90:]}"
    return f"`{text}`".replace("|", "\\|")


if __name__ == "__main__":
    main()

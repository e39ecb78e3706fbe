"""Audits reasoning-gym's data sets: which of them can be trusted with a reward, and how their answers are compared.

    python benchmarks/gym_audit.py [DATASET ...] [--json]

Prints one row a data set and fails when what it finds is not what ``mulligan/tasks/gym_table.py`` says. For each data
set, in a process of its own that is killed after a minute:

1. Its items are made from 24 seeds under two PYTHONHASHSEEDs and in two orders; they have to be the same.
2. Its scorer's source, with what it calls within reasoning_gym, is searched for eval and its like; and its scorer is
   given hostile answers under an audit hook that reports whatever is compiled, executed, imported or opened.
3. The gold in a box has to score 1; junk has to score nothing worth having: fixed texts, the question, its numbers,
   all golds in a list, the gold within a text, the gold doubled, NaN in place of the gold's numbers. What is 1 for a
   gold with another digit is either a second right answer (``MANY_RIGHT``) or an error.
4. An item may take 0.1 s of CPU time, a score 1 s.

Those that pass with a scorer of their own keep it. The default scorer pays for parts of the answer, so data sets that
have it are compared exactly, and so are some (``ONE_ANSWER``) whose own scorer fails but whose question has one answer
in one form.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEEDS = [at * 7919 * 104729 % 2**31 for at in range(1, 25)]
SCORED = 10  # items that are given junk
MINUTE = 60
SLOW_ITEM, SLOW_SCORE = 0.1, 1.0
FLOOR = 0.05
CANARY = "mulligan.canary"
HOSTILE = [
    f"__import__('sys').audit('{CANARY}')",
    f"[__import__('sys').audit('{CANARY}')]",
    f"int.__class__.__base__.__subclasses__() or '{CANARY}'",
    f"open('/nonexistent/{CANARY}')",
    f"Integer(sys.audit('{CANARY}'))",
    "(lambda: 1)()",
]
JUNK = (
    "", " ", "x", "X", "A", "a", "0", "1", "-1", "2", "10", "nan", "NaN", "inf", "-inf", "1e999", "True", "False",
    "None", "null", "no", "yes", "[]", "{}", "[[]]", "()", '""', "[NaN]", "{'a': 1}", "*", "...", "->",
    "x " * 1000, "0 " * 500,
)  # fmt: skip
WATCHED = ("exec", "compile", "import", "open", "socket.", "subprocess.", "os.", "ctypes.", "shutil.", CANARY)

# Scorers that give 1 to a changed gold because it is right as well, as their sources say.
MANY_RIGHT = {
    "cryptarithm": "any assignment that satisfies the sum",
    "jugs": "any moves that reach the target",
    "power_function": "three significant figures are asked for",
}
RIGHT_AS_WELL = ("another digit", "another gold", "the gold twice", "a cut gold")
# The question has one right answer in one stated form, though the scorer cannot be used.
ONE_ANSWER = {
    "calendar_arithmetic": "a weekday, a number, or Yes or No",
    "chain_sum": "an integer",
    "coin_flip": "a number, exact in its decimals",
    "emoji_mystery": "a hidden sentence",
    "game_of_life": "a JSON grid",
    "gsm_symbolic": "a number without units",
    "knights_knaves": "who is what, in the order that the question states; made with one solution",
    "manipulate_matrix": "a grid",
    "mini_sudoku": "a grid; made with one solution",
    "products": "an integer",
    "rearc": "a grid",
    "rectangle_count": "a number",
    "spell_backward": "a word",
    "sudoku": "a grid; made with one solution",
    "word_sorting": "a list in a stated order",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="DATASET")
    parser.add_argument("--json", action="store_true", help="one JSON row a data set")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    without_torch()
    if options.child:
        child(options.names)
        return
    from mulligan.tasks.gym_table import EXACT, EXCLUDED, OWN_SCORER

    there = {"exact": EXACT, "own scorer": OWN_SCORER, "out": EXCLUDED}
    first, second = map(finish, [start(options.names, seed) for seed in ("0", "1")])
    different = 0
    for name, found in first.items():
        mode, reason = decide(name, found, second[name])
        agrees = name in there[mode]
        different += not agrees
        row = {"dataset": name, "mode": mode, "reason": reason, "agrees": agrees} | found
        row |= {"same_items": found.get("items") == second[name].get("items")}
        row.pop("items", None)
        print(json.dumps(row) if options.json else line(row), flush=True)
    listed = {name for names in there.values() for name in names}
    if not options.names and listed - set(first):
        print(f"in the table, but not in reasoning-gym: {', '.join(sorted(listed - set(first)))}")
        different += 1
    sys.exit(1 if different else 0)


def without_torch() -> None:
    """Packages without their ``__init__``, as the verifier's worker has them: two small files of theirs are needed."""
    root = Path(__file__).resolve().parents[1]
    for name in ("mulligan", "mulligan.tasks"):
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module


def line(row: dict[str, Any]) -> str:
    item, scoring = (1000 * row.get(key, math.nan) for key in ("item_seconds", "score_seconds"))
    return (
        f"{row['dataset']:26} {row['mode']:10} {item:7.1f} ms an item {scoring:7.2f} ms a score "
        f"{row.get('distinct', 0):3}/{len(SEEDS)} distinct  {row['reason']}{'' if row['agrees'] else '  NOT AS PINNED'}"
    )


def decide(name: str, found: dict[str, Any], again: dict[str, Any]) -> tuple[str, str]:
    """``exact``, ``own scorer`` or ``out``, and the reason."""
    for failed in (found, again):
        if "error" in failed:
            return "out", failed["error"]
    if found["gold"]:
        return "out", found["gold"]
    if found["evaluates"]:
        return "out", f"its scorer calls {found['evaluates']}"
    if found["items"] != again["items"]:
        return "out", "its items are no function of their seed: they change from process to process"
    if found["item_seconds"] > SLOW_ITEM:
        return "out", f"an item takes more than {SLOW_ITEM:g} s"
    if found["default"]:
        return "exact", "the default scorer pays for parts"
    complaint = found["events"] or found["json"] or junk(name, found["junk"])
    if found["score_seconds"] > SLOW_SCORE:
        complaint = f"a score takes more than {SLOW_SCORE:g} s"
    if not complaint:
        return "own scorer", MANY_RIGHT.get(name, "")
    if name in ONE_ANSWER and not found["exact_junk"]:
        return "exact", f"{ONE_ANSWER[name]}; {complaint}"
    return "out", complaint


def junk(name: str, paid: dict[str, list[Any]]) -> str:
    """What is wrong with what the scorer pays; empty when nothing is."""
    if name in MANY_RIGHT:
        paid = {kind: what for kind, what in paid.items() if kind not in RIGHT_AS_WELL}
    if not paid:
        return ""
    kind, (value, text) = max(paid.items(), key=lambda item: item[1][0])
    shown = text if len(text) <= 24 else text[:21] + "..."
    return f"its scorer gives {value:.2g} to {kind} ({shown!r})"


def start(names: list[str], hash_seed: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, "--child", *names], env=environment, stdout=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> dict[str, dict[str, Any]]:
    """What a child found, by data set."""
    said = process.communicate()[0]
    if process.returncode:
        sys.exit("the audit's own process failed")
    return {row["name"]: row for row in map(json.loads, said.splitlines())}


# --- in the child ---------------------------------------------------------------------------------------


def child(names: list[str]) -> None:
    """One JSON row a data set, each made in a fork: what one breaks or keeps, the next does not see."""
    from reasoning_gym.factory import DATASETS

    import mulligan.tasks.gym_score  # here, so that no fork has to  # noqa: F401

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some data sets print
    warnings.simplefilter("ignore")
    for name in names or sorted(DATASETS):
        out.write(json.dumps({"name": name} | forked(name)) + "\n")
        out.flush()


def forked(name: str) -> dict[str, Any]:
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        try:
            found = inspect_dataset(name)
        except BaseException as error:
            found = {"error": f"it cannot be made: {type(error).__name__}: {error}".split("\n")[0][:120]}
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(found))
        os._exit(0)
    os.close(writer)
    parts: list[bytes] = []
    end = time.monotonic() + MINUTE
    while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(reader, 2**16)
        if not part:
            break
        parts.append(part)
    else:
        os.kill(process, signal.SIGKILL)
        parts = []
    os.close(reader)
    os.waitpid(process, 0)
    return json.loads(b"".join(parts)) if parts else {"error": f"no end within {MINUTE} s"}


def inspect_dataset(name: str) -> dict[str, Any]:
    from reasoning_gym import create_dataset, get_score_answer_fn
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    kind = DATASETS[name][0]
    scorer: Any = get_score_answer_fn(name)
    watch = Watch()
    items = {}
    begun = time.process_time()
    # The other hash seed also has the other order, for items that depend on what was made before.
    for seed in SEEDS if os.environ["PYTHONHASHSEED"] == "0" else SEEDS[::-1]:
        items[seed] = create_dataset(name, seed=seed, size=1)[0]
    seconds = (time.process_time() - begun) / len(SEEDS)
    found: dict[str, Any] = {
        "default": kind.score_answer is ProceduralDataset.score_answer,
        "distinct": len({item["question"] for item in items.values()}),
        "item_seconds": seconds,
        "items": {str(seed): digest(items[seed]) for seed in SEEDS},
        "evaluates": ", ".join(sorted(evaluates(kind))),
    }
    golds = [item["answer"] for item in items.values()]
    if not all(isinstance(gold, str) and gold.strip() for gold in golds):
        return found | {"gold": "it has no gold answer, so that its scorer cannot be checked", "junk": {}}
    found["gold"] = gold_in_a_box(list(items.values()), None if found["default"] else scorer)
    return found | feed(list(items.values())[:SCORED], golds, scorer, watch)


def digest(item: dict[str, Any]) -> str:
    """Of all that is in an item; metadata by its JSON, other objects by their text without addresses."""
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(item, default=repr))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def gold_in_a_box(items: list[dict[str, Any]], scorer: Callable[..., float] | None) -> str:
    """Whether the gold in a box is found and right, by the exact comparison and by the data set's own scorer; else what
    is wrong."""
    from mulligan.tasks.gym_score import bare, same
    from mulligan.verify.answer import final_answer

    for item in items:
        answer = final_answer(f"So it is \\boxed{{{item['answer']}}}.")[0]
        if answer is None or not same(item["answer"], bare(answer)):
            return "its gold does not survive a box"
        if scorer is not None and scorer(bare(answer), item) != 1.0:
            return "its own gold in a box does not score 1"
    return ""


def through_json(item: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(item, default=repr))


def feed(items: list[dict[str, Any]], golds: list[str], scorer: Callable[..., float], watch: Watch) -> dict[str, Any]:
    """Junk and hostile answers to the scorer and to the exact comparison."""
    from mulligan.tasks.gym_score import bare, same

    paid: dict[str, tuple[float, str]] = {}
    exact_paid: list[str] = []
    json_differs = ""
    longest = 0.0
    for item in items:
        for kind, text in junk_for(item, golds):
            answer = bare(text)
            if same(item["answer"], answer):  # it is right after all
                continue
            begun = time.process_time()
            with watch:
                value = safely(scorer, answer, item)
            longest = max(longest, time.process_time() - begun)
            if value > max(FLOOR, paid.get(kind, (0.0,))[0]):
                paid[kind] = (value, text)
            if safely(scorer, answer, through_json(item)) != value:
                json_differs = "its items do not survive JSON"
        if scorer(item["answer"], through_json(item)) != 1.0:
            json_differs = "its items do not survive JSON"
    for item in items:
        exact_paid += [text for _, text in junk_for(item, golds) if exact_error(item["answer"], text)]
    return {
        "junk": paid,
        "exact_junk": exact_paid[:3],
        "events": watch.told(),
        "json": json_differs,
        "score_seconds": longest,
    }


def exact_error(gold: str, text: str) -> bool:
    """Whether the exact comparison takes a text for the gold that differs in letters or digits."""
    from mulligan.tasks.gym_score import bare, same

    def kept(t: str) -> list[str]:
        return re.findall(r"\w", t.casefold())

    number = re.fullmatch(r"[-+$.,\d\s]*", text) is not None  # other digits may be the same number: 1.50
    return same(gold, bare(text)) and kept(gold) != kept(text) and not number


def safely(scorer: Callable[..., float], answer: str, item: dict[str, Any]) -> float:
    """As the bridge scores: what fails is 0, and so is what is no number."""
    try:
        value = float(scorer(answer, item))
    except Exception:
        return 0.0
    return value if math.isfinite(value) else 0.0


def junk_for(item: dict[str, Any], golds: list[str]) -> Iterator[tuple[str, str]]:
    gold, question = item["answer"], item["question"]
    yield from (("junk", text) for text in JUNK)
    yield from (("hostile text", text) for text in HOSTILE)
    yield "the question", question
    numbers = sorted(set(re.findall(r"-?\d+(?:\.\d+)?", question)))[:20]
    yield from (("a number of the question", text) for text in numbers)
    others = [other for other in golds if other != gold]
    yield from (("another gold", text) for text in others[:6])
    for separator in (", ", "\n", " "):
        yield "a list of all golds", separator.join([*others[:9], gold, *others[9:]])
        yield "the gold twice", gold + separator + gold
        yield "two golds", gold + separator + (others[0] if others else "x")
    yield "the gold in a text", f"The answer may be {gold} or something else, who knows."
    yield "the gold in a text", f"I think:\n{gold}\nbut I am not sure."
    yield "NaN", re.sub(r"-?\d+(?:\.\d+)?", "NaN", gold)
    yield "a cut gold", gold[1:]
    yield "a cut gold", gold[:-1]
    yield "the gold's words backwards", " ".join(gold.split()[::-1])
    digits = list(re.finditer(r"\d", gold))
    for match in digits[:1] + digits[-1:]:
        yield "another digit", gold[: match.start()] + str((int(match[0]) + 1) % 10) + gold[match.end() :]


def evaluates(kind: type) -> set[str]:
    """Names of evaluating functions in a class's scorer and in what it calls within reasoning_gym."""
    risky = {"eval", "exec", "compile", "literal_eval", "parse_expr", "sympify", "parse_latex", "__import__"}
    found: set[str] = set()
    seen: set[int] = set()
    waiting: list[Any] = [kind.score_answer]  # pyright: ignore[reportAttributeAccessIssue]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        module = sys.modules[function.__module__]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name):
                name, target = call.func.id, getattr(module, call.func.id, None)
            elif isinstance(call.func, ast.Attribute):
                name = call.func.attr
                owner = call.func.value.id if isinstance(call.func.value, ast.Name) else ""
                if owner == "re":
                    continue
                target = getattr(kind, name, None) or getattr(getattr(module, owner, None), name, None)
            else:
                continue
            if name in risky:
                found.add(name)
            if (getattr(target, "__module__", None) or "").startswith("reasoning_gym"):
                waiting.append(target)
    return found


class Watch:
    """Audit events within its ``with``: a hook cannot be taken away again, so it is only switched."""

    def __init__(self) -> None:
        self.on = False
        self.events: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event.startswith(WATCHED):
            self.on = False  # the text of an argument may raise events of its own
            self.events.add(event if CANARY not in repr(arguments) else CANARY)
            self.on = True

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False

    def told(self) -> str:
        if CANARY in self.events:
            return "its scorer evaluates the answer"
        return f"its scorer raises {', '.join(sorted(self.events))}" if self.events else ""


if __name__ == "__main__":
    main()

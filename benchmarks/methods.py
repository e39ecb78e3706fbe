"""Every method on the pico base at equal sampled tokens: one row a method.

    python benchmarks/methods.py --out runs/methods

Every sampled token counts: diagnoses, hints that did not help, filtered groups. A run ends at the first step that
reaches the budget. Held-out numbers are of the test split, before training and after it. A finished run is read, not
run again; ``--methods`` names others than all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mulligan.methods import PRESETS

ROOT = Path(__file__).resolve().parents[1]
COMPOSED = ("srpo+rltt", "lte+rltt", "dsrl(lte, steps=5)")
SETTINGS = ("task.level=4", "eval.every=0", "eval.split=dev", "eval.problems=16", "eval.samples=1", "log.samples=false")
# A budget of some 13 steps leaves DSRL no room for its 20 steps of warm-up.
SHORT = {
    "dsrl": "dsrl(steps=5)",
    "dsrl-shuffled": "dsrl-shuffled(steps=5)",
    "dsrl-conditional": "dsrl-conditional(steps=5)",
}


def measure(model: str, problems: int) -> dict:
    """What ``mulligan eval`` says of a run or model on the test split."""
    command = [sys.executable, "-m", "mulligan", "eval", model, "task.level=4", "--problems", str(problems), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(name: str, numbers: dict, steps: str, tokens: str, seconds: str) -> str:
    cells = [
        f"`{name}`",
        f"{numbers['pass@1']:.3f} [{numbers['pass@1_low']:.3f}, {numbers['pass@1_high']:.3f}]",
        f"{numbers['process_correct']:.3f}",
        f"{numbers['pass@8']:.3f}",
        f"{numbers['length']:.1f}",
        f"{numbers['none_pass']:.3f}",
        steps,
        tokens,
        seconds,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--methods", nargs="*", default=[n for n in PRESETS if "published" not in n] + list(COMPOSED))
    arguments = parser.parse_args()
    print("| method | accuracy [95 %] | process-correct | pass@8 | length | none-pass | steps | tokens | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(row("(the base)", measure("pico", arguments.problems), "0", "0", "0"), flush=True)
    for name in arguments.methods:
        run = arguments.out / f"{name.replace(' ', '')}-seed{arguments.seed}"
        result = run / "result.json"
        if not result.exists():
            begun = time.monotonic()
            command = [sys.executable, "-m", "mulligan", "train", "--method", SHORT.get(name, name), "--out", str(run)]
            command += ["--resume", "--seed", str(arguments.seed), "--steps", "100000", f"tokens={arguments.tokens}"]
            command += [f"optimizer.learning_rate={arguments.learning_rate}", *SETTINGS]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - begun
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            last = [s for s in steps if "total/tokens" in s][-1]
            found = {"last": last, "seconds": seconds, "numbers": measure(str(run), arguments.problems)}
            result.write_text(json.dumps(found))
        found = json.loads(result.read_text())
        last = found["last"]
        told = row(name, found["numbers"], str(last["step"]), f"{last['total/tokens']:,.0f}", f"{found['seconds']:.0f}")
        print(told, flush=True)


if __name__ == "__main__":
    main()

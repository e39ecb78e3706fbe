"""The demo under several seeds: held-out accuracy before and after, and seconds, one row a seed.

    python benchmarks/demo_seeds.py --seeds 5 --out runs/seeds

Seeds are 0, 1, 2, ...: none is picked. A finished run is read, not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from mulligan.log import METRICS, read_metrics

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/demo.toml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    print("| seed | before [95 %] | after [95 %] | points | process-correct after | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    for seed in range(arguments.seeds):
        run = arguments.out / f"seed{seed}"
        seconds = "-"
        if not (run / "curve.png").exists():
            begun = time.monotonic()
            command = [sys.executable, "-m", "mulligan", "train", str(arguments.recipe), "--seed", str(seed)]
            command += ["--out", str(run), "--resume", *arguments.overrides]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = f"{time.monotonic() - begun:.0f}"
        held_out = [record for record in read_metrics(run / METRICS) if "eval/pass@1" in record]
        first, last = held_out[0], held_out[-1]
        cells = [
            f"{r['eval/pass@1']:.3f} [{r['eval/pass@1_low']:.3f}, {r['eval/pass@1_high']:.3f}]" for r in (first, last)
        ]
        points = 100 * (last["eval/pass@1"] - first["eval/pass@1"])
        print(
            f"| {seed} | {cells[0]} | {cells[1]} | {points:+.1f} | {last['eval/process_correct']:.3f} | {seconds} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

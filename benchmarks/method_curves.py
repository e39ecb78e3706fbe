"""The learning curves of the methods' pages, from the runs of ``benchmarks/methods.py``.

    python benchmarks/methods.py --out runs/methods --problems 128
    python benchmarks/method_curves.py --runs runs/methods

On the left of a panel the pass rate of all graded samples of a step, over the tokens sampled until then: dots are
steps, lines the mean of three neighbours. Second rounds and resets are among those samples, so that the height of such
a curve is not the accuracy on fresh prompts. That stands on the right: the test split after training, with its 95 %
interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mulligan.errors import UserError
from mulligan.files import write_aside
from mulligan.log import METRICS, read_metrics
from mulligan.report.curve import smooth

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow; markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P")
BASELINE, GREY = "grpo", "#333333"
DPI, INCHES, HEIGHT = 100, 4.9, 2.9  # a panel's width and height
COLUMNS = 2

# A page's panels; each is drawn against GRPO.
PAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "grpo-family": (("dr-grpo", "dapo", "gspo", "cispo"), ("rloo", "reinforce", "reinforce++", "maxrl")),
    "nsr": (("nsr", "psr", "w-reinforce"),),
    "prerl": (("prerl", "psr-prerl", "nsr-prerl"),),
    "dsrl": (("dsrl", "nsr-prerl"),),
    "lte": (("lte", "lte-dagger", "grpo-extra"),),
    "resets": (("srpo", "rrpo", "early-random"),),
    "rltt": (("rltt",),),
    "controls": (
        ("srpo", "srpo-permuted", "reset-entropy", "reset-restart", "reset-oracle"),
        ("lte", "lte-other-answers", "lte-silent-failures"),
        ("dsrl", "dsrl-shuffled", "dsrl-conditional"),
        ("rltt", "rltt-distillation"),
    ),
    "composition": (("srpo", "srpo+rltt"), ("lte", "lte+rltt", "dsrl(lte, steps=5)")),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One run.

    Attributes:
        tokens: sampled until and with each step, in thousands.
        passed: the share of the step's graded samples that pass.
        held_out: what ``mulligan eval`` says of the test split after training.
    """

    name: str
    tokens: list[float]
    passed: list[float]
    held_out: dict[str, Any]


def read(runs: Path, name: str, seed: int) -> Curve:
    """The run of a method.

    Raises:
        UserError: it is not there, or not finished.
    """
    run = runs / f"{name.replace(' ', '')}-seed{seed}"
    result = run / "result.json"
    if not result.is_file():
        raise UserError(f"{result}: no such file; `python benchmarks/methods.py --out {runs}` makes it")
    steps = [record for record in read_metrics(run / METRICS) if "rollout/pass" in record]
    return Curve(
        name,
        [record["total/tokens"] / 1000 for record in steps],
        [record["rollout/pass"] for record in steps],
        json.loads(result.read_text())["numbers"],
    )


def draw(page: str, runs: Path, seed: int, path: Path) -> None:
    """A page's picture, written whole or not at all."""
    panels = PAGES[page]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = INCHES * columns if len(panels) > 1 else 6.4
    figure = Figure(figsize=(width, HEIGHT * rows), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.75, 1] * columns)
    for index, names in enumerate(panels):
        row, column = divmod(index, columns)
        left, right = grid[row][2 * column : 2 * column + 2]
        curves = [read(runs, name, seed) for name in (BASELINE, *names)]
        styles = [(GREY, "o"), *zip(COLORS, MARKERS, strict=True)][: len(curves)]
        for curve, (color, marker) in zip(curves, styles, strict=True):
            left.plot(curve.tokens, curve.passed, ".", color=color, markersize=3, alpha=0.4)
            left.plot(curve.tokens, smooth(curve.passed, 3), color=color, marker=marker, markersize=4, linewidth=1.5)
        _tidy(left)
        left.set(ylim=(0, 1), xlim=(0, None))
        left.set_xlabel("sampled tokens (thousands)", fontsize=8)
        left.set_ylabel("pass rate, all graded samples", fontsize=8)
        _held_out(right, curves, styles)
    canvas.draw()
    picture = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    # A palette makes the file a third as large, and nothing that an eye could tell is lost.
    write_aside(path, lambda aside: picture.quantize(256).save(aside, format="PNG", optimize=True))


def _held_out(axes: Axes, curves: list[Curve], styles: list[tuple[str, str]]) -> None:
    """Accuracy and its interval for each method; the methods' names are the legend of the curves too."""
    for place, (curve, (color, marker)) in enumerate(zip(curves, styles, strict=True)):
        told = curve.held_out
        axes.plot([told["pass@1_low"], told["pass@1_high"]], [place, place], color=color, linewidth=1.6)
        axes.plot([told["pass@1"]], [place], color=color, marker=marker, markersize=6, clip_on=False)
        axes.annotate(
            curve.name,
            (0.02, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            xytext=(0, 5),
            color=color,
            fontsize=8,
        )
    _tidy(axes)
    axes.set(xlim=(0, 1), ylim=(len(curves) - 0.6, -0.7), yticks=[])
    axes.set_xlabel(f"held-out pass@1\n({curves[0].held_out['problems']:.0f} test problems)", fontsize=8)
    axes.spines["left"].set_visible(False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "methods" / "img")
    parser.add_argument("--pages", nargs="*", choices=list(PAGES), default=list(PAGES))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for page in arguments.pages:
        path = arguments.to / f"{page}.png"
        try:
            draw(page, arguments.runs, arguments.seed, path)
        except UserError as error:
            sys.exit(f"{page}: {error}")
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

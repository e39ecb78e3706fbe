"""The learning curve of a run as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mulligan.errors import UserError
from mulligan.files import write_aside

WIDTH, HEIGHT, DPI = 9.0, 6.0, 100  # 900 x 600 pixels
FEW = 12  # fewer points than this are drawn as points and not smoothed
REWARD, HELD_OUT, LENGTH, ENTROPY = "#2a6fbb", "#c8471f", "#4c7a34", "#7d4fa3"


def plot_curve(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw training reward and held-out accuracy, and below them response length and entropy.

    Args:
        metrics: the records of ``metrics.jsonl``. Read are ``step``; ``rollout/reward`` (mean over the step's
            samples), ``rollout/length`` (tokens) and ``rollout/entropy`` (nats a token); and on the lines of an
            evaluation ``eval/pass@1`` with ``eval/pass@1_low`` and ``eval/pass@1_high``, the ends of its
            95% interval. What is absent is not drawn.
        path: the PNG, 900 x 600 pixels; written whole or not at all.
        title: one line above the plot.

    Raises:
        UserError: no record has a reward or an accuracy, or the file cannot be written.
    """
    reward, accuracy = _series(metrics, "rollout/reward"), _series(metrics, "eval/pass@1")
    if not reward[0] and not accuracy[0]:
        raise UserError(f"{path}: nothing to draw: no record has 'rollout/reward' or 'eval/pass@1'")
    length, entropy = _series(metrics, "rollout/length"), _series(metrics, "rollout/entropy")
    lower = bool(length[0] or entropy[0])
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if lower:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2])
        _draw_texts(bottom, length, entropy)
    else:
        top = bottom = figure.subplots()
    _draw_scores(top, metrics, reward)
    top.set_title(title, loc="left", fontsize=13, fontweight="bold", wrap=True, pad=10)
    bottom.set_xlabel("updates")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    write_aside(path, lambda aside: figure.savefig(aside, format="png"))


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over ``window`` neighbours, half on each side; fewer at the ends, so that no value is made up.

    Args:
        window: an odd number.
    """
    half = window // 2
    spans = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have ``key``."""
    rows = [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def _draw_scores(axes: Axes, metrics: Sequence[dict[str, Any]], reward: tuple[list[int], list[float]]) -> None:
    steps, values = reward
    if len(values) < FEW:
        axes.plot(steps, values, color=REWARD, linewidth=2.2, marker="o", label="training reward")
    elif values:
        window = max(1, len(values) // 20) * 2 + 1
        axes.plot(steps, values, color=REWARD, linewidth=0.8, alpha=0.4)
        label = f"training reward (thin: each step, thick: mean of {window})"
        axes.plot(steps, smooth(values, window), color=REWARD, linewidth=2.2, label=label)
    evals = [record for record in metrics if record.get("eval/pass@1") is not None]
    if evals:
        score = [e["eval/pass@1"] for e in evals]
        low = [s - e.get("eval/pass@1_low", s) for s, e in zip(score, evals, strict=True)]
        high = [e.get("eval/pass@1_high", s) - s for s, e in zip(score, evals, strict=True)]
        axes.errorbar(
            [e["step"] for e in evals],
            score,
            # an interval's end may lie beyond its own point by rounding, which matplotlib refuses
            yerr=[[max(0.0, x) for x in low], [max(0.0, x) for x in high]],
            color=HELD_OUT,
            marker="o",
            markersize=5.5,
            linewidth=1.2,
            elinewidth=1.4,
            capsize=3.5,
            zorder=3,
            clip_on=False,  # a point at 0 or 1 is drawn whole
            label="held-out accuracy (pass@1, 95% interval)",
        )
    # 0 to 1, so that curves can be compared by eye; a shaped reward may need more
    axes.set_ylim(min(0.0, *values, 0.0), max(1.0, *values, 1.0))
    axes.set_ylabel("reward, accuracy")
    _tidy(axes)
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=10)


def _draw_texts(axes: Axes, length: tuple[list[int], list[float]], entropy: tuple[list[int], list[float]]) -> None:
    """Length on the left axis, entropy on the right one; either may be absent."""
    sides = [(length, "length (tokens)", LENGTH), (entropy, "entropy (nats)", ENTROPY)]
    present = [side for side in sides if side[0][0]]
    for i, ((steps, values), label, color) in enumerate(present):
        side = axes.twinx() if i else axes
        side.plot(steps, values, color=color, linewidth=1.3, marker="o" if len(values) < FEW else None)
        side.set_ylabel(label, color=color)
        side.tick_params(axis="y", colors=color)
        _tidy(side, grid=i == 0)
        side.spines["right"].set_visible(i > 0)
        side.set_ylim(0, max(*values, 1e-3) * 1.15)
        side.yaxis.set_major_locator(MaxNLocator(4))


def _tidy(axes: Axes, *, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)

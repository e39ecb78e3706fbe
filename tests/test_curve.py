import struct

import pytest

from mulligan.errors import UserError
from mulligan.report.curve import plot_curve, smooth


def records(steps: int) -> list[dict]:
    out = []
    for step in range(steps):
        out.append({"step": step, "rollout/reward": step / steps, "rollout/length": 40.0, "rollout/entropy": 0.3})
        if step % 5 == 0:
            out.append({"step": step, "eval/pass@1": 0.4, "eval/pass@1_low": 0.3, "eval/pass@1_high": 0.5})
    return out


def without(metrics: list[dict], *words: str) -> list[dict]:
    return [{k: v for k, v in r.items() if not any(w in k for w in words)} for r in metrics]


@pytest.mark.parametrize(
    "metrics",
    [
        records(40),
        records(1),
        without(records(40), "entropy"),
        without(records(40), "length"),
        without(records(40), "length", "entropy", "reward"),
        without(records(40), "eval", "length", "entropy"),
        without(records(40), "_low", "_high"),
        [{"step": 0, "rollout/reward": -0.5, "rollout/entropy": 0.0}, {"step": 1, "rollout/reward": 1.5}],
        [{"step": 0, "eval/pass@1": 1.0, "eval/pass@1_low": 0.9, "eval/pass@1_high": 1.0 - 1e-12}],
    ],
)
def test_a_png_of_the_promised_size_and_nothing_beside_it(tmp_path, metrics):
    path = tmp_path / "plots" / "curve.png"
    plot_curve(metrics, path, title="grpo on chain")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (900, 600)
    assert [p.name for p in path.parent.iterdir()] == ["curve.png"]


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        plot_curve(records(20), tmp_path / name, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_nothing_to_draw_and_nowhere_to_write(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        plot_curve([{"step": 0, "loss": 1.0}], tmp_path / "curve.png", title="t")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"curve\.png: cannot write"):
        plot_curve(records(2), tmp_path / "file" / "curve.png", title="t")


def test_smoothing_is_centred_and_makes_up_no_values():
    assert smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]
    assert smooth([], 3) == []

"""The mutation run's own parts: which changes it makes, and that they are seen by a child alone."""

from __future__ import annotations

from importlib.util import module_from_spec
from pathlib import Path

from tests.mutation.forked import Finder
from tests.mutation.mutants import mutants

SOURCE = '''
"""A docstring with 1 < 2."""
__all__ = ["a", "b"]
Alias = float | None

@decorated(frozen=True)
def f(x: int = 0, *, on: bool = True) -> float:
    """Another: not x."""
    assert x >= 0
    if not x > 3:
        raise ValueError(f"{x - 1} is below {2}")
    y = [v.detach() for v in x if v and on]
    for a, b in zip(x, y, strict=True):
        a += min(-a, b)
    return y[0] * 0.5
'''
CHANGES = [
    "7: 0 -> 1",
    "7: True -> False",
    "10: not x > 3 -> x > 3",
    "10: x > 3 -> x >= 3",
    "10: x > 3 -> x <= 3",
    "10: 3 -> 4",
    "11: raise ValueError(f'{x - 1} is below {2}') -> pass",
    "12: for v in x if v and on -> for v in x",
    "12: for v in x if v and on -> for v in x if not (v and on)",
    "12: v.detach() -> v",
    "12: v and on -> v or on",
    "14: a += min(-a, b) -> a -= min(-a, b)",
    "14: min(-a, b) -> max(-a, b)",
    "14: -a -> a",
    "15: return y[0] * 0.5 -> return y[0] * 0.5 + 1",
    "15: y[0] * 0.5 -> y[0] / 0.5",
    "15: 0 -> 1",
    "15: 0.5 -> 1.0",
]


def made(source: str, tmp_path: Path) -> list[str]:
    file = tmp_path / "module.py"
    file.write_text(source)
    return [f"{m.line}: {m.was} -> {m.now}" for m in mutants(file, Path("module.py"))]


def test_every_small_change_and_no_change_of_words(tmp_path):
    assert sorted(made(SOURCE, tmp_path)) == sorted(CHANGES)


def test_results_by_what_they_are_said_to_be(tmp_path):
    heads = ("torch.Tensor", "list[float]", "dict[str, int]", "bool", "str")
    source = "".join(f"def f(x) -> {head}:\n    return x\n" for head in heads)
    assert made(source, tmp_path) == [
        "2: return x -> return x * 0",
        "4: return x -> return x[:-1]",
        "4: return x -> return x[::-1]",
        "6: return x -> return {}",
        "8: return x -> return not x",
    ]
    assert made("def f(x) -> list[float]:\n    return [x] * x\n", tmp_path) == [
        "2: return [x] * x -> return ([x] * x)[:-1]"
    ]


def test_one_change_at_a_time_and_its_place(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("a = 1 + 2\nb = 3\n")
    found = []
    for mutant in mutants(file, Path("module.py")):
        spec = Finder({"changed": mutant.code}).find_spec("changed")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append((str(mutant).split(" | ")[0], module.a, module.b))
    assert found == [
        ("module.py:1: 1 + 2 -> 1 - 2", -1, 3),
        ("module.py:1: 1 -> 0", 2, 3),
        ("module.py:1: 1 -> 2", 4, 3),
        ("module.py:1: 2 -> 3", 4, 3),
        ("module.py:2: 3 -> 4", 3, 4),
    ]
    assert file.read_text() == "a = 1 + 2\nb = 3\n"
    assert list(tmp_path.iterdir()) == [file]  # no byte code either

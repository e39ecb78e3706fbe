"""Small changes to a module, one at a time: an operator, a constant, a sign, a condition, a result.

Left alone are docstrings, annotations, decorators, asserts, the texts of errors, ``__all__``, type aliases and
``strict=``: no test can, or should, tell those apart.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITES = {
    "min": "max",
    "any": "all",
    "minimum": "maximum",
    "amin": "amax",
    "clamp_min": "clamp_max",
    "zeros_like": "ones_like",
    "zeros": "ones",
    "argmin": "argmax",
}
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}
# Called on a tensor without arguments, or with bounds: the receiver alone has the same shape.
SHAPE_KEEPING = {"detach", "exp", "log", "abs", "sqrt", "clamp", "clamp_min", "clamp_max", "float", "double"}
UNTOUCHED = {"annotation", "returns", "decorator_list", "type_params"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change. ``code`` is the whole module with it."""

    file: Path
    line: int
    was: str
    now: str
    source: str  # the line
    code: CodeType

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.was} -> {self.now} | {self.source}"


@dataclass(frozen=True, slots=True)
class _Place:
    """A node, and where it hangs."""

    holder: ast.AST
    name: str
    index: int | None
    node: ast.AST
    function: ast.FunctionDef | None

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.holder, self.name, node)
        else:
            getattr(self.holder, self.name)[self.index] = node


def mutants(file: Path, shown: Path) -> list[Mutant]:
    """All mutants of a module, by line.

    Args:
        shown: the name under which its file is reported.
    """
    text = file.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    out = []
    for place in list(_places(tree, None)):
        for changed in _changes(place):
            new = ast.fix_missing_locations(ast.copy_location(changed, place.node))
            place.put(new)
            code = compile(tree, str(file), "exec", dont_inherit=True)
            place.put(place.node)
            line = min(n.lineno for n in ast.walk(place.node) if isinstance(n, ast.expr | ast.stmt))
            out.append(Mutant(shown, line, *_texts(place.node, new), lines[line - 1].strip(), code))
    return sorted(out, key=lambda m: m.line)


def _texts(was: ast.AST, now: ast.AST) -> tuple[str, str]:
    """Both as text, of compound statements the heads alone; of long ones the surroundings of what differs."""
    texts = [ast.unparse(node).strip().splitlines()[0] for node in (was, now)]
    if max(map(len, texts)) > 100:
        same = next((k for k, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        start = max(same - 20, 0)
        texts = [f"{'...' * (start > 0)}{text[start : start + 90]}" for text in texts]
    return texts[0], texts[1]


# ---- where -------------------------------------------------------------------------------------


def _places(holder: ast.AST, function: ast.FunctionDef | None) -> Iterator[_Place]:
    for name, value in ast.iter_fields(holder):
        if name in UNTOUCHED:
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or _left_alone(node, holder):
                continue
            yield _Place(holder, name, index if isinstance(value, list) else None, node, function)
            if not isinstance(node, ast.Raise):
                yield from _places(node, node if isinstance(node, ast.FunctionDef) else function)


def _left_alone(node: ast.AST, holder: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Assert():
            return True
        case ast.Expr(value=ast.Constant()):  # a docstring, or the ... of a protocol
            return True
        case ast.keyword(arg="strict"):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Assign(value=ast.BinOp(op=ast.BitOr()) | ast.Subscript(value=ast.Name(id="Callable"))):
            return isinstance(holder, ast.Module)  # a type alias
    return False


# ---- what --------------------------------------------------------------------------------------


def _changes(place: _Place) -> Iterator[ast.AST]:
    node = place.node
    match node:
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    yield _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
        case ast.BinOp(left=ast.List()):  # [x] * n: anything else is no program
            pass
        case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
        case ast.BoolOp():
            yield _with(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(value) for value in _other_numbers(node.value))
        case ast.If() | ast.IfExp() | ast.While():
            for test in _negated(node.test):
                yield _with(node, test=test)
        case ast.comprehension():
            for index, test in enumerate(node.ifs):
                for other in ([], *([t] for t in _negated(test))):
                    yield _with(node, ifs=[*node.ifs[:index], *other, *node.ifs[index + 1 :]])
        case ast.Call():
            yield from _other_calls(node)
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Raise(exc=ast.Call()):
            yield ast.Pass()
        case ast.Continue():
            yield ast.Pass()
        case ast.AnnAssign(value=ast.Tuple(elts=[_, *_])):
            yield _with(node, value=ast.Tuple(elts=[], ctx=ast.Load()))
        case ast.Return(value=ast.expr()) if place.function is not None:
            yield from (ast.Return(value) for value in _other_results(node.value, place.function))


def _with(node: ast.AST, **fields: object) -> ast.AST:
    out = copy.copy(node)
    for name, value in fields.items():
        setattr(out, name, value)
    return out


def _negated(test: ast.expr) -> list[ast.expr]:
    """The opposite of a condition, unless a change of its own operator is that already."""
    if isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and len(test.ops) == 1):
        return []
    return [ast.UnaryOp(op=ast.Not(), operand=test)]


def _other_numbers(value: float) -> list[float]:
    """0 -> 1, 1 -> 0 and 2, any other n -> n + 1 or, if it is no integer, 2 n."""
    kind = type(value)
    if value == 0:
        return [kind(1)]
    if value == 1:
        return [kind(0), kind(2)]
    return [value + 1 if kind is int else 2 * value]


def _other_calls(node: ast.Call) -> Iterator[ast.expr]:
    if isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
        yield _with(node, func=ast.Name(id=OPPOSITES[node.func.id], ctx=ast.Load()))
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in OPPOSITES:
            yield _with(node, func=_with(node.func, attr=OPPOSITES[node.func.attr]))
        if node.func.attr in SHAPE_KEEPING:
            yield node.func.value
        if node.func.attr == "where" and len(node.args) == 3:
            yield _with(node, args=[node.args[0], node.args[2], node.args[1]])
    for index, word in enumerate(node.keywords):
        if word.arg in ("min", "max"):
            others = [*node.keywords[:index], _with(word, arg=OPPOSITES[word.arg]), *node.keywords[index + 1 :]]
            yield _with(node, keywords=others)


def _other_results(value: ast.expr, function: ast.FunctionDef) -> Iterator[ast.expr]:
    """By the function's annotation: another number, no tensor's worth, the wrong way round or one short."""
    kind = ast.unparse(function.returns).strip("'\"") if function.returns else ""
    text = ast.unparse(value)
    if isinstance(value, ast.Constant):
        return
    if kind in ("float", "int"):
        yield _parsed(f"({text}) + 1")
    elif kind == "bool":
        yield from _negated(value)
    elif kind == "torch.Tensor":
        yield _parsed(f"({text}) * 0")
    elif kind.startswith("list[") and text != "[]":
        yield _parsed(f"({text})[:-1]")
        # [x] * n is the same both ways round.
        if not (isinstance(value, ast.BinOp) and isinstance(value.left, ast.List)):
            yield _parsed(f"({text})[::-1]")
    elif kind.startswith("dict[") and text != "{}":
        yield _parsed("{}")


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body

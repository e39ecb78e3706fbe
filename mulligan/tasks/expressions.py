"""Two tiny languages, read by hand: integer arithmetic and truth values. Model text is never evaluated by Python.

Both share one precedence parser. Its limits (length, depth, magnitude) hold before any work is done, so that no
text can make it slow or deep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_DEPTH = 50  # nested parentheses and prefix operators
MAX_MAGNITUDE = 10**12  # of a literal, and of numerator and denominator of every intermediate value


class ExpressionError(ValueError):
    """The text is no expression of the language, or goes beyond its limits. Callers take it as a wrong answer."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A literal: an integer in arithmetic, a truth value in boolean expressions."""

    value: int


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and its one (prefix) or two operands. Parentheses leave no trace but the shape of the tree."""

    op: str
    args: tuple[Tree, ...]


Tree = Leaf | Node


@dataclass(frozen=True, slots=True)
class _Language:
    token: re.Pattern[str]
    levels: tuple[str, ...]  # the binary operators, loosest first; all bind to the left
    prefix: str

    def leaf(self, token: str) -> Leaf | None:
        if token in ("T", "F"):
            return Leaf(token == "T")
        return Leaf(int(token)) if token.isdigit() else None


_ARITHMETIC = _Language(re.compile(r"\s*([0-9]+|[-+*/()])"), ("+-", "*/"), "-")
_BOOLEAN = _Language(re.compile(r"\s*([TF&|!()])"), ("|", "&"), "!")


class _Parser:
    """Recursive descent over the tokens; one method a kind of phrase."""

    def __init__(self, text: str, language: _Language) -> None:
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"longer than {MAX_LENGTH} characters")
        self.language = language
        self.tokens: list[str] = []
        self.at = 0
        text = text.rstrip()
        begin = 0
        while begin < len(text):
            match = language.token.match(text, begin)
            if match is None:
                raise ExpressionError(f"unexpected character at {begin}")
            self.tokens.append(match[1])
            begin = match.end()

    def next_in(self, wanted: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at] in wanted

    def take(self) -> str:
        if self.at == len(self.tokens):
            raise ExpressionError("ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def whole(self) -> Tree:
        tree = self.binary(0, 0)
        if self.at < len(self.tokens):
            raise ExpressionError(f"'{self.tokens[self.at]}' is too much")
        return tree

    def binary(self, level: int, depth: int) -> Tree:
        if level == len(self.language.levels):
            return self.operand(depth)
        tree = self.binary(level + 1, depth)
        while self.next_in(self.language.levels[level]):
            op = self.take()
            tree = Node(op, (tree, self.binary(level + 1, depth)))
        return tree

    def operand(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        token = self.take()
        if token == self.language.prefix:
            return Node(token, (self.operand(depth + 1),))
        if token == "(":
            tree = self.binary(0, depth + 1)
            if self.take() != ")":
                raise ExpressionError("an open parenthesis")
            return tree
        leaf = self.language.leaf(token)
        if leaf is None:
            raise ExpressionError(f"'{token}' where an operand belongs")
        return leaf


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """An arithmetic expression that was read: its tree, its exact value and its integer literals, left to right."""

    tree: Tree
    value: Fraction
    integers: tuple[int, ...]


def arithmetic(text: str) -> Arithmetic:
    """Reads integers, ``+ - * /``, parentheses and prefix minus; blanks between them mean nothing.

    Raises:
        ExpressionError: the text is anything else, divides by zero or goes beyond a limit.

    >>> arithmetic("(3+4)/2").value, arithmetic("(3+4)/2").integers
    (Fraction(7, 2), (3, 4, 2))
    """
    tree = _Parser(text, _ARITHMETIC).whole()
    return Arithmetic(tree, _value(tree), tuple(_literals(tree)))


def boolean(text: str) -> Tree:
    """Reads ``T F & | !`` and parentheses; ``!`` binds tightest, then ``&``, then ``|``.

    Raises:
        ExpressionError: the text is anything else or goes beyond a limit.

    >>> boolean("T|F&!F") == boolean("T|(F&(!F))")
    True
    """
    return _Parser(text, _BOOLEAN).whole()


def apply_boolean(op: str, *values: int) -> bool:
    """The truth value of one operator, ``!``, ``&`` or ``|``, on truth values."""
    if op == "!":
        return not values[0]
    return all(values) if op == "&" else any(values)


def has_prefix(tree: Tree) -> bool:
    """Whether a prefix operator stands anywhere in the tree."""
    return isinstance(tree, Node) and (len(tree.args) == 1 or any(map(has_prefix, tree.args)))


def operators(tree: Tree) -> set[str]:
    """The operators in the tree."""
    return set() if isinstance(tree, Leaf) else {tree.op}.union(*map(operators, tree.args))


def canonical(tree: Tree) -> str:
    """One text for all trees that differ only by the order or the grouping of ``+``, ``*``, ``&`` or ``|``.

    >>> canonical(arithmetic("7+(5*3+2)").tree) == canonical(arithmetic("3*5+2+7").tree)
    True
    """
    if isinstance(tree, Leaf):
        return str(int(tree.value))
    if len(tree.args) == 1:
        return f"{tree.op}{canonical(tree.args[0])}"
    if tree.op in "+*&|":
        return f"({tree.op.join(sorted(map(canonical, _chain(tree, tree.op))))})"
    return f"({tree.op.join(map(canonical, tree.args))})"


def show_arithmetic(tree: Tree) -> str:
    """The expression with no parenthesis that could be left out without changing its value.

    Only for ``+ - *``: a quotient is shown with all its parentheses.

    >>> show_arithmetic(arithmetic("(9-(5-3))*(2+(1+4))").tree)
    '(9-(5-3))*(2+1+4)'
    """
    return _show(tree)[0]


_LOOSE, _TIGHT, _ATOM = 0, 1, 2


def _show(tree: Tree) -> tuple[str, int]:
    """The text and how tightly its outermost operator binds."""
    if isinstance(tree, Leaf):
        return str(tree.value), _ATOM
    if len(tree.args) == 1:
        return f"(-{_wrapped(tree.args[0], _ATOM)})", _ATOM
    left, right = tree.args
    if tree.op == "/":
        return f"({_wrapped(left, _ATOM)}/{_wrapped(right, _ATOM)})", _ATOM
    if tree.op == "*":
        return f"{_wrapped(left, _TIGHT)}*{_wrapped(right, _TIGHT)}", _TIGHT
    # a+(b-c) is a+b-c, but a-(b-c) is not a-b-c.
    return f"{_wrapped(left, _LOOSE)}{tree.op}{_wrapped(right, _LOOSE if tree.op == '+' else _TIGHT)}", _LOOSE


def _wrapped(tree: Tree, least: int) -> str:
    text, binding = _show(tree)
    return text if binding >= least else f"({text})"


def _chain(tree: Tree, op: str) -> list[Tree]:
    """The operands of a run of one operator, however it is grouped."""
    if isinstance(tree, Node) and tree.op == op and len(tree.args) == 2:
        return [leaf for arg in tree.args for leaf in _chain(arg, op)]
    return [tree]


def _literals(tree: Tree) -> list[int]:
    return [tree.value] if isinstance(tree, Leaf) else [n for arg in tree.args for n in _literals(arg)]


def _value(tree: Tree) -> Fraction:
    if isinstance(tree, Leaf):
        return _bounded(Fraction(tree.value))
    values = [_value(arg) for arg in tree.args]
    if len(values) == 1:
        return -values[0]
    left, right = values
    if tree.op == "/":
        if right == 0:
            raise ExpressionError("division by zero")
        return _bounded(left / right)
    return _bounded(left + right if tree.op == "+" else left - right if tree.op == "-" else left * right)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > MAX_MAGNITUDE:
        raise ExpressionError(f"a value beyond {MAX_MAGNITUDE}")
    return value

r"""Reading a clean text as numbers, words, lists, sets, tuples, intervals, matrices, equations or other mathematics.

Linear in the length up to a bound; nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mulligan.verify.typography import NUMERAL, compact, number, untext, value_of
from mulligan.verify.units import CURRENCY, SCALES, currency, unit

MAX_PARTS = 64  # of a list; comparing unordered parts is quadratic


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number: its value as it is written, the unit behind it (or none) and whether a percent sign is."""

    value: Fraction
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a named base."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """Integers parted by colons: a ratio or a time of day, with ``am`` or ``pm`` or nothing."""

    parts: tuple[int, ...]
    half: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Math:
    """What only algebra can compare, as a compact text, and the unit behind it (or none)."""

    text: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Several parts. ``closed``, ``left`` and ``right`` are ``[a,b]``, ``[a,b)`` and ``(a,b]``; ``rows`` is a matrix,
    with the number of its columns in ``width``; ``union`` joins sets."""

    kind: Literal["list", "set", "tuple", "closed", "left", "right", "rows", "union"]
    parts: tuple[str, ...]
    width: int = 0
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """``name = value`` or ``name in value``."""

    name: str
    value: str
    whole: str


@dataclass(frozen=True, slots=True)
class Interval:
    """All ``name`` between two bounds; a bound is ``\\infty`` or ``-\\infty`` where there is none."""

    name: str
    low: str
    high: str
    closed: tuple[bool, bool]
    whole: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    operators: tuple[str, ...]
    sides: tuple[str, ...]
    whole: str


Form = Number | Based | Ratio | Words | Math | Group | Named | Interval | Relation
KINDS: dict[type[Form], str] = {
    Number: "a number",
    Based: "a number in a base",
    Ratio: "a ratio or time",
    Words: "words",
    Math: "an expression",
    Group: "several values",
    Named: "a named value",
    Interval: "an interval",
    Relation: "an equation or inequality",
}

# --- cutting a text at its top level -------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\(?:begin|end)\{[A-Za-z]+\*?\}|\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
_OPEN = frozenset(["(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil"])
_CLOSE = frozenset([")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil"])
RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\equiv": "=="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "==": "=="}


def cut(text: str, at: Callable[[str], bool]) -> tuple[list[str], list[str]] | None:
    """The pieces of a text between the top-level tokens for which ``at`` holds, and those tokens.

    None where brackets do not match.
    """
    pieces, found = [], []
    depth = begin = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPEN or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith("\\end"):
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and at(token):
            pieces.append(text[begin : match.start()].strip())
            found.append(token)
            begin = match.end()
    pieces.append(text[begin:].strip())
    return None if depth else (pieces, found)


def depth_of(text: str) -> int:
    """The deepest nesting of brackets."""
    depth = deepest = 0
    for token in _TOKEN.findall(text):
        if token in _OPEN:
            depth += 1
            deepest = max(deepest, depth)
        elif token in _CLOSE:
            depth -= 1
    return deepest


def _inside(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content and closing bracket of a text that is one bracketed whole; None for any other."""
    depth = 0
    first = _TOKEN.match(text)
    if first is None or first[0] not in _OPEN:
        return None
    for match in _TOKEN.finditer(text):
        if match[0] in _OPEN:
            depth += 1
        elif match[0] in _CLOSE:
            depth -= 1
            if depth == 0:
                whole = match.end() == len(text)
                return (first[0], text[first.end() : match.start()].strip(), match[0]) if whole else None
    return None


# --- one spelling for plain text and LaTeX -------------------------------------------------------------------------

_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|gcd|lcm|max|min|sqrt|pi|theta|alpha|beta|"
    "gamma|lambda|mu|sigma|phi|omega|infty"
)
# Behind a number, `min` and `sec` are units.
_BARE = re.compile(
    rf"(?<![\\A-Za-z])(?:(?!(?<=[0-9}}])(?:min|sec)|(?<=[0-9}}] )(?:min|sec))({_FUNCTIONS})(?![A-Za-z])"
    r"|(infinity|inf)(?![A-Za-z]))"
)
_TEXT_FUNCTION = re.compile(rf"(?<![0-9}} ])\\text\s*\{{\s*({_FUNCTIONS}|mod)\s*\}}")
_TEXT_JOIN = re.compile(r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}|\\(wedge|land|vee|lor)(?![A-Za-z])", re.IGNORECASE)
_JOINS = {"wedge": "and", "land": "and", "vee": "or", "lor": "or"}
_ASCII = {"<=": "\\le ", "=<": "\\le ", ">=": "\\ge ", "!=": "\\ne ", "==": "=", ":=": "=", "**": "^"}
_SINGLE = re.compile(r"<=|=<|>=|!=|==|:=|\*\*")


def prepare(text: str) -> str:
    """A clean text without math delimiters and with plain-text spellings (``sqrt(2)``, ``>=``, ``pi``) as in LaTeX."""
    text = text.strip().strip("`").strip()
    if text.startswith("**") and text.endswith("**"):
        text = text.strip("*").strip()
    signs = [match.start() for match in re.finditer(r"(?<!\\)\$", text)]
    if len(signs) % 2 == 0:
        text = re.sub(r"(?<!\\)\$+", " ", text)
    text = text.strip().rstrip(".,;: ") if not text.rstrip().endswith("\\,") else text
    text = _SINGLE.sub(lambda match: _ASCII[match[0]], text)
    text = _TEXT_JOIN.sub(lambda match: f" {match[1].lower() if match[1] else _JOINS[match[2]]} ", text)
    text = _TEXT_FUNCTION.sub(r"\\\1 ", text)
    text = _BARE.sub(lambda match: f"\\{match[1]} " if match[1] else "\\infty ", text)
    return " ".join(_roots(text).split())


def _roots(text: str) -> str:
    r"""``\sqrt(x)``, as plain text has it, with braces."""
    while (match := re.search(r"\\sqrt\s*\(", text)) is not None:
        depth = 0
        for at in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            if depth == 0:
                text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : at]}}}{text[at + 1 :]}"
                break
        else:
            return text
    return text


# --- reading -------------------------------------------------------------------------------------------------------

_LETTER = r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|varphi|omega|rho|tau|ell|Delta))"
_SUB = r"(?:_(?:[A-Za-z0-9]|\{[A-Za-z0-9, +-]*\}))?"
_VARIABLE = rf"{_LETTER}{_SUB}'{{0,3}}"
_FUNCTION_OF = rf"{_VARIABLE}(?:\^\{{-1\}})?\((?:{_VARIABLE}|-?[0-9]+)(?:,(?:{_VARIABLE}|-?[0-9]+))*\)"
_MEASURE = (
    rf"\|?(?:m ?)?(?:\\angle ?|\\triangle ?)?(?:[A-Z]{{2,5}}|[A-Z]{_SUB})\|?|\\(?:overline|vec|hat)\{{[A-Za-z]+\}}"
)
_WORDY = r"[A-Za-z]{4,}(?: [A-Za-z]+){0,3}|ans|sum"
NAME = re.compile(rf"(?:{_VARIABLE}|{_FUNCTION_OF}|{_MEASURE}|{_WORDY}|\(?{_VARIABLE}(?:,{_VARIABLE})+\)?)")
_SEGMENTS = rf"(?:[A-Z]+{_SUB})"
_GOLD_NAME = re.compile(
    rf"{NAME.pattern}|{_SEGMENTS}:{_SEGMENTS}|\\frac\{{{_SEGMENTS}\}}\{{{_SEGMENTS}\}}|{_SEGMENTS}/{_SEGMENTS}"
)
_BOUNDED = re.compile(rf"{_VARIABLE}|{_FUNCTION_OF}")
_WRITTEN = "two three four five six seven eight nine ten eleven twelve"
_BASE_WORDS = {word: str(base) for base, word in enumerate(_WRITTEN.split(), start=2)} | {"sixteen": "16"}
_BASED = re.compile(
    r"\(?([0-9][0-9A-F]*|[A-F][0-9A-F]*[0-9][0-9A-F]*)\)?_\{?([0-9]{1,2}|" + "|".join(_BASE_WORDS) + r")\}?"
)
_RATIO = re.compile(r"([0-9]{1,9})((?::[0-9]{1,9}){1,4}) ?(?:([ap])\.?m\.?)?", re.IGNORECASE)
_COMMA_DECIMAL = re.compile(r"([-+]?)([0-9]+|[1-9][0-9]{0,2}(?:\.[0-9]{3})+),([0-9]+)")
_SPACED_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:, ?[0-9]{3})*, [0-9]{3}(?:, ?[0-9]{3})*")
_BRACKETS = {("[", "]"): "closed", ("[", ")"): "left", ("(", "]"): "right", ("(", ")"): "tuple"}
_MATRIX = re.compile(r"\\begin\{([pb]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_REALS = ("\\mathbb{r}", "\\r", "(-\\infty,\\infty)", "(-\\infty,+\\infty)", "all real numbers", "all reals")
_KNOWN_SETS: dict[str, Form] = {
    **dict.fromkeys(_REALS, Interval("", "-\\infty", "\\infty", (False, False))),
    **dict.fromkeys(("\\emptyset", "\\{\\}", "empty set", "the empty set"), Words("empty set")),
}


def read(text: str, *, gold: bool = False, depth: int = 0) -> list[Form]:
    """All sensible readings of a prepared text, most likely first; at least one."""
    if depth > 6:
        return [Math(compact(untext(text)))]
    known = _KNOWN_SETS.get(compact(untext(text)).lower())
    if known is not None:
        return [known]
    readings: list[Form] = []
    quantity = read_number(text, gold=gold)
    if quantity is not None:
        readings.append(quantity)
        if not _SPACED_THOUSANDS.fullmatch(text):
            return readings
    if not gold and (match := _COMMA_DECIMAL.fullmatch(text)):
        # In an answer 1,5 may be one and a half; a gold answer of that shape is the list of 1 and 5.
        readings.append(Number(Fraction(f"{match[1]}{match[2].replace('.', '')}.{match[3]}")))
    if is_words(text):
        readings.append(Words(text))
        text = untext(text)
    listed = _list(text)
    if listed is not None:
        readings.append(listed)
    elif not readings or (isinstance(readings[0], Words) and re.fullmatch(r"[a-z]{1,3}", text)):
        measured = _MEASURED.fullmatch(text)
        behind = unit(measured[2], strict=True) if measured else None
        form = _single(measured[1].strip() if measured and behind else text, gold=gold, depth=depth)
        if behind and not isinstance(form, Math):
            form = _single(text, gold=gold, depth=depth)
        readings.append(Math(form.text, behind) if behind and isinstance(form, Math) else form)
    return readings


_BRACKETED_PART = re.compile(r"(?<=[/{])\(([-+]?[0-9]+)\)|^\(([-+]?[0-9]+)\)(?=/)")  # (1)/(2)
_MEASURED = re.compile(
    r"(.*(?:[0-9}]|\\pi) ?)"
    r"(\\text\s*\{[^{}]*\}(?:\^(?:[0-9]|\{[0-9]\}))?|\^\\circ|\^\{\\circ\}|(?<= )[a-z]{2,}(?:\^[23])?)"
)


def read_number(text: str, *, gold: bool = False) -> Number | None:
    """The text as a plain number with a unit, a percent sign or a currency sign; None for any other."""
    text = re.sub(r"\s+", " ", text.strip())
    outer = re.fullmatch(r"([-+]?) ?(?:\(([^()]*)\)|\{([^{}]*)\})", text)
    if outer and (inner := number(compact(outer[2] or outer[3] or ""))) is not None:
        return Number(-inner if outer[1] == "-" else inner)
    sign, unit_of = "", ""
    if match := re.match(rf"([-+]?) ?{CURRENCY.pattern} ?([-+]?)", text):
        sign, unit_of = match[1] or match[3], currency(match[2])
        text = text[match.end() :]
    text = _BRACKETED_PART.sub(r"\1\2", compact(text))
    match = NUMERAL.match(text)
    if match is None or match.end() > 200 or (sign and match["sign"]):
        return None
    value, rest = value_of(match), text[match.end() :].strip()
    if value is None:
        return None
    value = -value if sign == "-" else value
    if scale := re.match(rf"(?:\\text\{{ ?)?({'|'.join(SCALES)})(?![A-Za-z])", rest):
        value *= 10 ** SCALES[scale[1]]
        rest = rest[scale.end() :].removeprefix("}").strip()
        if not rest or rest == "}":
            return Number(value, unit_of)
    if not rest:
        return Number(value, unit_of)
    if not unit_of and re.fullmatch(r"%|(?:\\text\{)? ?(?:percent|percentage|per cent|pct) ?\}?", rest):
        return Number(value, percent=True)
    behind = unit(rest, strict=gold)
    if behind is None or (unit_of and behind != unit_of):
        return None
    return Number(value, behind)


def is_words(text: str) -> bool:
    """Whether a text is words rather than mathematics; ``ab`` and ``east`` are words, ``p - q`` is not."""
    texts = re.findall(r"\\text\s*\{([^{}]*)\}", text)
    around = re.sub(r"\\text\s*\{[^{}]*\}|\^[0-9]", "", text)
    if any(len(word.strip()) > 2 for word in texts) and re.fullmatch(r"[\s.,;:'\"!()-]*", around):
        return True
    plain = untext(text)
    if re.search(r"[0-9\\+*/^_=<>|{}\[\]&$%]", plain):
        return False
    runs = re.findall(r"[A-Za-z]+", plain)
    longest = max((len(run) for run in runs), default=0)
    return longest >= (3 if re.search(r"[-(]", plain) else 2)


def _list(text: str) -> Group | None:
    for separators in ((";",), (",", "and", "or"), ("\\\\",)):
        pieces = cut(text, lambda token, among=separators: token.lower() in among)
        if pieces is None:
            return None
        parts, found = pieces
        if not found:
            continue
        parts = [part for at, part in enumerate(parts) if part or not _joined(found, at)]
        if len(parts) < 2 or not all(parts) or len(parts) > MAX_PARTS:
            return None
        return Group("list", tuple(_spread(_shared_name(parts))), whole=text)
    return None


def _joined(found: Sequence[str], at: int) -> bool:
    """Whether an empty piece only stands between a comma and a joining word (``1, 2, and 3``)."""
    around = {found[place].lower() for place in (at - 1, at) if 0 <= place < len(found)}
    return len(around) == 2 and "," in around


def _shared_name(parts: list[str]) -> list[str]:
    """``a = 4, -8, -10`` names all of its values; so the name goes."""
    first = equation(parts[0], gold=False)
    if isinstance(first, Named) and not any(re.search(r"=|\\in(?![A-Za-z])", part) for part in parts[1:]):
        return [first.value, *parts[1:]]
    return parts


def _spread(parts: Sequence[str]) -> list[str]:
    """The parts with both values of each that holds one plus-minus sign."""
    return [value for part in parts for value in (_both(part) or [part])]


def _both(text: str) -> list[str] | None:
    signs = re.findall(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])", text)
    if len(signs) != 1:
        return None
    upper, lower = ("+", "-") if signs[0] == "\\pm" else ("-", "+")
    values = [re.sub(r"\\[pm][pm](?![A-Za-z]) ?", sign, text) for sign in (upper, lower)]
    return [re.sub(r"(^|[=({,]) ?\+", r"\1", value) for value in values]


def _single(text: str, *, gold: bool, depth: int) -> Form:
    plain = compact(untext(text))
    if match := _BASED.fullmatch(plain):
        return Based(match[1].lstrip("0") or "0", _BASE_WORDS.get(match[2], match[2]))
    if match := _RATIO.fullmatch(plain):
        return Ratio(tuple(int(part) for part in (match[1] + match[2]).split(":")), (match[3] or "").lower())
    if (related := equation(text, gold=gold)) is not None:
        return related
    if (joined := cut(text, lambda token: token == "\\cup")) is not None and joined[1]:
        return Group("union", tuple(joined[0]), whole=plain)
    bracketed = _bracketed(text, gold=gold, depth=depth)
    if bracketed is not None:
        return bracketed
    if (both := _both(text)) is not None:
        return Group("list", tuple(both), whole=text)
    if match := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in match[2].split("\\\\") if row.strip()]
        if rows and len({len(row) for row in rows}) == 1 and "\\begin" not in match[2]:
            return Group("rows", tuple(cell.strip() for row in rows for cell in row), width=len(rows[0]), whole=plain)
    return Math(plain)


def _bracketed(text: str, *, gold: bool, depth: int) -> Form | None:
    bracketed = _inside(text)
    if bracketed is None:
        return None
    opening, content, closing = bracketed
    if not content:
        return None
    if (opening, closing) == ("\\{", "\\}"):
        return _set(content)
    if _MATRIX.fullmatch(content):
        return _single(content, gold=gold, depth=depth + 1)
    separated = cut(content, lambda token: token in (",", ";"))
    if separated is None:
        return None
    parts = separated[0]
    if (opening, closing) in (("{", "}"), ("(", ")")) and len(parts) == 1:
        readings = read(content, gold=gold, depth=depth + 1)
        return readings[0] if len(readings) == 1 else Math(compact(untext(content)))
    if (opening, closing) == ("{", "}"):
        return Group("list", tuple(_spread(parts)), whole=compact(text))
    kind = "tuple" if (opening, closing) == ("\\langle", "\\rangle") else _BRACKETS.get((opening, closing))
    if kind is None or not all(parts) or len(parts) > MAX_PARTS or (len(parts) == 1 and kind != "closed"):
        return None
    if len(parts) == 1:
        return None
    if kind == "tuple" and (both := _both(text)) is not None:
        return Group("list", tuple(both), whole=text)
    if kind == "closed" and len(parts) != 2:
        kind = "tuple"  # no interval, so the brackets of a vector or of a programming language
    if kind in ("left", "right") and len(parts) != 2:
        return None
    return Group(kind, tuple(parts), whole=compact(text))  # type: ignore[arg-type]


def _set(content: str) -> Form | None:
    condition = re.fullmatch(rf"{_VARIABLE}\s*(?:\\in ?\\mathbb\{{R\}}\s*)?(?:\||:|\\mid(?![A-Za-z]))(.*)", content)
    if condition and isinstance(found := equation(condition[1].strip(), gold=False), Interval):
        return found
    separated = cut(content, lambda token: token in (",", ";"))
    if separated is None or not all(separated[0]) or len(separated[0]) > MAX_PARTS:
        return None
    return Group("set", tuple(_spread(separated[0])), whole=compact(f"\\{{{content}\\}}"))


def equation(text: str, *, gold: bool) -> Named | Interval | Relation | None:
    found = cut(text, lambda token: token in RELATIONS)
    if found is None or not found[1]:
        return None
    sides, signs = found
    whole = compact(untext(text))
    operators = tuple(RELATIONS[sign] for sign in signs)
    if not all(sides):
        return Relation(operators, tuple(sides), whole)
    named = [(_GOLD_NAME if gold else NAME).fullmatch(compact(untext(side))) is not None for side in sides]
    if len(sides) == 2 and operators[0] in ("=", "in") and sum(named) == 1 and (named[0] or operators[0] == "="):
        name, value = sides if named[0] else (sides[1], sides[0])
        return Named(compact(untext(name)), value, whole)
    if len(sides) == 2 and operators == ("=",) and all(named) and (gold or compact(sides[0]) == compact(sides[1])):
        return Named(compact(untext(sides[0])), sides[1], whole)
    return _interval(operators, sides, whole) or Relation(operators, tuple(sides), whole)


def _interval(operators: tuple[str, ...], sides: list[str], whole: str) -> Interval | None:
    """``a < x <= b`` and the like, with a single variable between (or beside) its bounds."""
    directions = {operator[0] for operator in operators}
    if len(sides) > 3 or len(directions) != 1 or not directions <= {"<", ">"}:
        return None
    variables = [_BOUNDED.fullmatch(compact(side)) is not None for side in sides]
    if directions == {">"}:
        sides, variables, operators = sides[::-1], variables[::-1], tuple(FLIPPED[sign] for sign in operators[::-1])
    closed = [operator == "<=" for operator in operators]
    if len(sides) == 3:
        middle = variables[1] and not variables[0] and not variables[2]
        return Interval(compact(sides[1]), sides[0], sides[2], (closed[0], closed[1]), whole) if middle else None
    if variables == [True, False]:
        return Interval(compact(sides[0]), "-\\infty", sides[1], (False, closed[0]), whole)
    if variables == [False, True]:
        return Interval(compact(sides[1]), sides[0], "\\infty", (closed[0], False), whole)
    return None

"""Units, currencies and counted things that may stand behind (or before) the number of an answer."""

from __future__ import annotations

import re

from mulligan.verify.typography import untext

# One line a unit: its name, then its other spellings; a plural -s or -es is understood.
_SPELLINGS = """
mm millimeter millimetre
cm centimeter centimetre
dm decimeter decimetre
m meter metre
km kilometer kilometre
inch in inches
foot ft feet
yard yd
mile mi
mg milligram
g gram gm
kg kilogram kilo
ton tonne
pound lb lbs
ounce oz
ml milliliter millilitre
l liter litre
gallon gal
quart qt
pint pt
cup
second s sec
minute min
hour h hr hrs
day
week wk
month
year yr
decade
century centuries
degree deg degrees
radian rad
mph
kmh kmph kph
hz hertz
n newton
j joule
w watt
kw kilowatt
v volt
a ampere amp
ohm
pa pascal
k kelvin
mol mole
bit
byte
acre
hectare
unit
dollar usd
cent
euro eur
yen
yuan rmb
rupee rs
peso
penny pennies pence
dime
nickel
step
page
person people persons
child children
man men
woman women
foot-pound
way
time times
"""
_NAMES = {word: line.split()[0] for line in _SPELLINGS.strip().splitlines() for word in line.split()}
_LETTERS = frozenset("mgslh")  # units of one letter, which may as well be variables
_SIGNS = frozenset("NJWVAK")  # those taken within \\text only (5K is five thousand elsewhere)
_CURRENCY = {"\\$": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee", "₽": "ruble"}
CURRENCY = re.compile(r"(?:US ?)?(\\\$|[$€£¥₹₽])")
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Words that change the number or take it back; what they follow is not a number with its unit.
_CHANGING = """
and or not no nor plus minus times over under less more than half halves third thirds fourth fourths fifth fifths sixth
sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths quarter
quarters dozen dozens pair pairs score hundreds thousands millions billions percent percents percentage factorial
factorials mod modulo maybe perhaps possibly probably approximately approx about around roughly nearly almost either if
unless except but without to through by divided multiplied point negative wrong false otherwise guess th st nd rd pi is
are was equals versus vs else sometimes always besides
"""
_NO_UNITS = frozenset(_CHANGING.split())
_TOKEN = re.compile(r"([A-Za-z]+(?:-[A-Za-z]+)?)(?:\^(?:\{(-?[1-9])\}|([1-9])))?|([/*])|(\\cdot)")


def currency(sign: str) -> str:
    """The unit that a matched currency sign stands for."""
    return _CURRENCY[sign]


def unit(text: str, *, strict: bool = False) -> str | None:
    r"""The canonical name of what stands behind a number (``cm^2``, ``mile/hour``, ``degree``); None if it is no unit.

    Known units are taken as they are; within ``\text{...}`` any words that do not change the number; outside, a plural
    such as ``apples``.

    Args:
        strict: whether a single letter outside ``\text`` is a variable, as it is in a gold answer (``2k``).

    >>> unit(r"\text{ square centimeters}"), unit("cm^{2}"), unit("apples"), unit("halves"), unit("x")
    ('cm^2', 'cm^2', 'apple', None, None)
    """
    sign = text.strip()
    if CURRENCY.fullmatch(sign):
        return currency(sign)
    if match := re.fullmatch(r"\^(?:\\circ|\{\\circ\})\s*(?:\\text\{)?\s*([CFK]?)\s*\}?", sign):
        return f"degree {match[1]}".strip()
    if match := re.fullmatch(r"\\pmod\s*(?:\{[0-9]+\}|[0-9]+)|\(\\text\{mod ?\} ?[0-9]+\)", sign):
        return "modulus"  # 9 (mod 11); `9 mod 11` is a calculation that was not done
    texted = "\\text" in sign
    plain = untext(sign).replace("\\cdot", "*").strip(" .")
    plain = re.sub(r"(?<=[A-Za-z])\. ?", " ", plain).strip()
    return _words(plain, texted=texted, strict=strict)


def _words(plain: str, *, texted: bool, strict: bool) -> str | None:
    names: list[str] = []
    free = 0
    power = 1
    at = 0
    while at < len(plain):
        match = _TOKEN.match(plain, at)
        if match is None:
            return None
        at = match.end() + len(plain[match.end() :]) - len(plain[match.end() :].lstrip())
        if match[1] is None:
            names.append("/" if match[0] == "/" else "*")
            continue
        word = match[1]
        if word.lower() in ("per", "an", "a") and names:
            names.append("/")
            continue
        if word.lower() in _POWERS:
            if word.lower().endswith("ed") and names:
                names[-1] += f"^{_POWERS[word.lower()]}"
            else:
                power = _POWERS[word.lower()]
            continue
        name = _known(word, texted=texted, strict=strict)
        if name is None:
            name, free = _free(word, texted=texted), free + 1
        if name is None:
            return None
        raised = int(match[2] or match[3] or power)
        names.append(name if raised == 1 else f"{name}^{raised}")
        power = 1
    if not names or power != 1 or free > (4 if texted else 2) or names[-1] in ("/", "*"):
        return None
    if free and not texted and not _plural(plain.split()[-1]):
        return None
    return re.sub(r" ?([/*]) ?", r"\1", " ".join(names))


def _known(word: str, *, texted: bool, strict: bool) -> str | None:
    if len(word) == 1:
        free = word in _LETTERS and (texted or not strict)
        return _NAMES[word.lower()] if free or (texted and word in _SIGNS) else None
    lower = word.lower()
    for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if form in _NAMES:
            return _NAMES[form]
    return None


def _free(word: str, *, texted: bool) -> str | None:
    lower = word.lower()
    if lower in _NO_UNITS or (len(word) < 3 and lower not in ("of", "in", "on", "at")):
        return None
    return lower.removesuffix("s") if texted or lower == word else None


def _plural(word: str) -> bool:
    word = re.sub(r"\^.*", "", word).lower()
    known = any(form in _NAMES for form in (word, word.removesuffix("s"), word.removesuffix("es")))
    return known or (len(word) >= 4 and word.endswith("s") and word not in _NO_UNITS)

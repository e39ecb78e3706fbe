r"""Typography of mathematical answers: writing the same thing in one way, and exact numbers. Nothing is evaluated.

Two forms are used. The clean form has one spelling for each sign, keeps blanks and keeps ``\text``, so that lists and
units can still be told apart; the normal form drops both and serves to compare texts.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_LENGTH = 2000  # characters of an answer; no gold answer is longer, and it bounds the work
MAX_NUMBER = 200  # characters of a number
MAX_EXPONENT = 4  # digits of the exponent of a number in scientific notation

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
_VULGAR = {sign: unicodedata.normalize("NFKC", sign).split("\u2044") for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
_LETTERS = """
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega
Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega varphi varepsilon vartheta
"""
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϵϑ", _LETTERS.split(), strict=True))
_SIGNS = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\u2061\u2062\ufeff", ""),  # unseen
    **dict.fromkeys("−‐‑‒–—﹣", "-"),
    **dict.fromkeys("’‘′", "'"),
    **dict.fromkeys("“”″", '"'),
    **{letter: f"\\{name} " for letter, name in GREEK.items()},
    **{sign: f"\\frac{{{upper}}}{{{lower}}}" for sign, (upper, lower) in _VULGAR.items()},
    **dict.fromkeys("·⋅∙•", "\\cdot "),
    **dict.fromkeys("⁄∕÷", "/"),
    **{"×": "\\times ", "∗": "*", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx "},
    **{"±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "√": "\\sqrt "},
    **{"°": "^\\circ ", "º": "^\\circ ", "℃": "^\\circ C", "℉": "^\\circ F", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}"},
    **{"ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}", "。": ".", "、": ",", "⟨": "\\langle "},
    **{"⟩": "\\rangle ", "∑": "\\sum ", "∏": "\\prod ", "∫": "\\int ", "…": "\\ldots ", "⌊": "\\lfloor "},
    **{"⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∣": "|", "∖": "\\setminus ", "⩽": "\\le ", "⩾": "\\ge "},
}
_TABLE = str.maketrans(_SIGNS)
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")

# A line break comes first, so that its second half is not taken for a spacing command.
_LAYOUT = re.compile(
    r"\\\\(?:\[[^\[\]]{0,20}\])?|\{\s?,\s?\}|,\\!\s?|\\!|\\[,;:> ]|\\%|~|\\q?quad(?![A-Za-z])|\\[()\[\]]"
    r"|\\(?:left|right|m?left|m?right)(?![A-Za-z])\.?|\\(?:big|Big|bigg|Bigg)[lrm]?(?![A-Za-z])"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|enspace|thinspace|hfill|phantom)(?![A-Za-z])|\s+"
)
_LAYOUTS = {"\\!": "", "\\%": "%"}
_MARKED = r"textbf|textit|textrm|textsf|texttt|textnormal|textup|mbox|hbox|emph|operatorname\*?|mathrm|mathsf|mathtt"
_NAMES = {
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "lt": "<",
    "gt": ">",
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "varnothing": "emptyset",
    "degree": "circ",
    "lbrace": "{",
    "rbrace": "}",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "euro": "€",
    "pounds": "£",
    "dots": "ldots",
    "cdots": "ldots",
    "lbrack": "[",
    "rbrack": "]",
    "colon": ":",
    "ast": "*",
    "div": "/",
    "mathbin": "",
    "mathop": "",
    "bold": "",
    "boldsymbol": "",
    "mathbf": "",
    "mathit": "",
    "mathnormal": "",
    "bm": "",
}
_COMMAND = re.compile(rf"\\(?:({'|'.join(_NAMES)})|({_MARKED}))(?![A-Za-z])\s*")
_LONE_TEXT = re.compile(r"\\text\s*\{\s*(\([A-Za-z]\)|[A-Za-z])\s*\}")
_ARGUMENT = r"([0-9A-Za-z]|\\(?:pi|theta|alpha|beta|phi)(?![A-Za-z]))"
_BARE_ARGUMENT = re.compile(rf"\\(frac|sqrt) ?{_ARGUMENT}")
_BARE_LOWER = re.compile(rf"(\\frac\{{[^{{}}]*\}}) ?{_ARGUMENT}")
_ESCAPED = re.compile(r"\\\\(?=[A-Za-z])")


def clean(text: str) -> str:
    r"""One spelling for each sign: full-width and Unicode ones, ``\dfrac12``, ``\left(``, ``\leq``, ``{,}``, spacing.

    Blanks are kept (one for any run), and so is ``\text{...}`` (for all its like). Linear in the length.

    >>> clean(r"\left[ ½, \dfrac34 \right]\;\textbf{cm}")
    '[ \\frac{1}{2}, \\frac{3}{4} ] \\text{cm}'
    """
    text = _RAISED.sub(lambda match: f"^{{{''.join(_SUPERSCRIPTS[sign] for sign in match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{''.join(_SUBSCRIPTS[sign] for sign in match[0])}}}", text)
    text = text.translate(_TABLE)
    if "\\begin" not in text:
        text = _ESCAPED.sub(r"\\", text)  # `\\frac` out of a JSON string that was escaped twice
    text = _LAYOUT.sub(_layout, text)
    text = _COMMAND.sub(_command, text)
    text = _LONE_TEXT.sub(_lone, text)
    text = re.sub(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = _BARE_ARGUMENT.sub(r"\\\1{\2}", text)
    text = _BARE_LOWER.sub(r"\1{\2}", text)
    return " ".join(text.split())


def _layout(match: re.Match[str]) -> str:
    sign = match[0]
    if sign.startswith("\\\\"):
        return "\\\\"
    if sign.startswith((",", "{")):
        return ","
    if sign.startswith(("\\left", "\\right", "\\mleft", "\\mright", "\\big", "\\Big")):
        return ""
    return _LAYOUTS.get(sign, " ")


def _lone(match: re.Match[str]) -> str:
    r"""``\text{C}`` and ``\mathrm{e}`` are the letters themselves, but ``5\text{ m}`` is a number with its unit."""
    before = match.string[: match.start()].rstrip()[-1:]
    return match[0] if (before.isdigit() or before in ("}", ")")) and match[1] not in "ei" else match[1]


def _command(match: re.Match[str]) -> str:
    if match[2]:
        return "\\text"
    name = _NAMES[match[1]]
    if name in ("{", "}"):
        return f"\\{name}"
    return f"\\{name} " if name.isalpha() else name


_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_WRAPPERS = (("\\$", ""), ("$", ""), ("**", "**"), ("", "\\$"), ("", "$"), ("", "."))


def untext(text: str) -> str:
    r"""The text with the content of every ``\text{...}`` in its place."""
    return _TEXT.sub(r"\1", text)


def normalise(text: str) -> str:
    r"""The text without what is only typography.

    Dropped: surrounding ``$``, ``\(`` and ``\[``, a leading currency sign, a trailing period, ``\text`` and
    its like (their content stays), ``\left`` and ``\right``, and blanks, except between two letters or digits
    (``1 1/2`` is not ``11/2``). ``\dfrac12`` becomes ``\frac{1}{2}``. Case, units and percent signs count.
    """
    text = untext(clean(text))
    text = re.sub(r"^\s*([-+])\s*\\?\$", r"\1", text)
    peeled = None
    while peeled != text:
        peeled = text
        text = text.strip()
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                text = text[len(left) : len(text) - len(right)]
    return compact(text)


def compact(text: str) -> str:
    """The text without blanks, except where they part two letters or digits."""
    return _LOOSE_SPACE.sub("", re.sub(r"\s+", " ", text.strip()))


INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
QUOTIENT = rf"(?:\\frac\{{[-+]?{INTEGER}\}}\{{[-+]?{INTEGER}\}}|{INTEGER}/{INTEGER})"
_POWER = rf"10\^(?:[0-9]|\{{[-+]?[0-9]{{1,{MAX_EXPONENT}}}\}}|[-+]?[0-9]{{1,{MAX_EXPONENT}}})"
_REPEATED = r"[0-9]*\.[0-9]*(?:\\(?:overline|bar|dot)\{[0-9]+\}|\([0-9]+\))"
# The longest form comes first: the beginning of a mixed number is a number as well.
NUMERAL = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<repeated>{_REPEATED})"
    rf"|(?P<whole>{INTEGER})(?: ?(?=\\frac)| )(?P<part>{QUOTIENT})"
    rf"|(?P<quotient>{QUOTIENT})"
    rf"|(?P<mantissa>{DECIMAL}) ?(?:\\times|\\cdot|\*|[xX]) ?(?P<power>{_POWER})"
    rf"|(?P<alone>{_POWER})"
    rf"|(?P<float>{DECIMAL}[eE][-+]?[0-9]{{1,{MAX_EXPONENT}}})(?![0-9])"
    rf"|(?P<decimal>{DECIMAL}))"
)


def number(text: str) -> Fraction | None:
    r"""The exact value of a compact text that is a plain number; None for any other.

    Plain numbers are integers, decimals, simple quotients, mixed numbers, scientific notation and repeating decimals,
    with thousands separators (``1,000``, ``1, 000`` or ``1 000``). Nothing is calculated: ``2+3`` is not one.

    >>> number("1,000.5"), number(r"1\frac{1}{2}"), number(r"3\times10^{-1}"), number(r"0.\overline{3}")
    (Fraction(2001, 2), Fraction(3, 2), Fraction(3, 10), Fraction(1, 3))
    """
    if len(text) > MAX_NUMBER:
        return None
    match = NUMERAL.fullmatch(text)
    return None if match is None else value_of(match)


def value_of(match: re.Match[str]) -> Fraction | None:
    """The exact value of a match of ``NUMERAL``; None where it divides by 0 or a mixed number is none (``1 3/2``)."""
    value: Fraction | None
    if match["repeated"]:
        value = _repeating(match["repeated"])
    elif match["whole"]:
        part = _quotient(match["part"])
        value = None if part is None or not 0 <= part < 1 else _plain(match["whole"]) + part
    elif match["quotient"]:
        value = _quotient(match["quotient"])
    elif match["power"]:
        value = _plain(match["mantissa"]) * _power(match["power"])
    elif match["alone"]:
        value = _power(match["alone"])
    else:
        value = _plain(match["float"] or match["decimal"])
    if value is None:
        return None
    return -value if match["sign"] == "-" else value


def _plain(text: str) -> Fraction:
    return Fraction(re.sub("[, ]", "", text))


def _power(text: str) -> Fraction:
    return Fraction(10) ** int(text[len("10^") :].strip("{}"))


def _quotient(text: str) -> Fraction | None:
    upper, lower = text[len("\\frac{") : -1].split("}{") if text.startswith("\\frac") else text.split("/")
    return None if _plain(lower) == 0 else _plain(upper) / _plain(lower)


def _repeating(text: str) -> Fraction:
    whole, _, digits = text.partition(".")
    fixed, block = re.sub(r"\\[a-z]+|[(){}]", " ", digits).rpartition(" ")[0], re.findall("[0-9]+", digits)[-1]
    fixed = fixed.split(" ")[0]
    tail = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(fixed))
    return Fraction(int(whole or 0)) + Fraction(int(fixed or 0), 10 ** len(fixed)) + tail

r"""Final answers of mathematical texts: finding them, and comparing them strictly as text or numbers.

Nothing is evaluated. ``equal`` compares numbers exactly and everything else as normalised text: ``0.5`` is
``\frac{1}{2}``, but ``10\%`` is not ``10`` and ``x+1`` is not ``1+x``. ``mulligan.verify.judge`` knows more.
"""

from __future__ import annotations

import re
from itertools import pairwise

from mulligan.verify.forms import prepare
from mulligan.verify.refusals import HEDGES
from mulligan.verify.rules import Comparison
from mulligan.verify.typography import MAX_LENGTH, clean, normalise, number

__all__ = ["MAX_LENGTH", "SEVERAL", "boxes", "equal", "final_answer", "normalise", "number", "stated_answer"]

SEVERAL = "several different final answers"
MAX_BOXES = 16  # different contents that are compared; more of them are hedging in any case

# `\\.` steps over escaped braces; a second backslash is there when a JSON string was escaped twice.
_BRACES = re.compile(r"\\{1,2}f?boxed\s*\{|\\fbox\s*\{|\\.|[{}]", re.DOTALL)


def boxes(response: str) -> list[str]:
    r"""The contents of all complete ``\boxed{...}`` that are not blank, in order; the inner one where boxes are nested.
    Linear in the length.

    >>> boxes(r"\boxed{3}, so \boxed{\frac{1}{2}} and \boxed{4")
    ['3', '\\frac{1}{2}']
    """
    return [response[begin:end] for begin, end, _ in _boxed(response)]


def _boxed(response: str) -> list[tuple[int, int, int]]:
    """Where the content of each box begins and ends, and where its command begins."""
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int] | None] = []  # where a box's content and its command begin, None for any other brace
    for match in _BRACES.finditer(response):
        if match[0] == "{":
            opened.append(None)
        elif match[0].endswith("{") and "box" in match[0]:
            opened.append((match.end(), match.start()))
        elif match[0] == "}" and opened:
            begin = opened.pop()
            if begin is not None and not (found and found[-1][0] > begin[0]):
                found.append((begin[0], match.start(), begin[1]))
    return [place for place in found if response[place[0] : place[1]].strip()]


def final_answer(response: str) -> tuple[str | None, str]:
    r"""The final answer of a response, and why there is none.

    It is the content of the last complete ``\boxed{...}``. A response that boxes different answers is hedging: it has
    no final answer, even where the last box is right.

    Returns:
        The answer and ``""``, or None and the reason.
    """
    found = boxes(response)
    if not found:
        return None, "no final answer"
    return _agreed(found)


def stated_answer(text: str, *, gold: bool = False) -> tuple[str | None, str]:
    r"""The answer that a text states, whether it is one by itself or holds one; and why there is none.

    Looked for in this order: the last ``\boxed{...}``; a line ``#### 42`` as GSM8K ends its solutions; a sentence "the
    (final) answer is 42" or "Answer: 42"; else the text itself, if it is short enough for an answer. Statements
    of the same sort that differ are hedging.

    Args:
        gold: whether the text is trusted. In a gold text, boxes that follow upon each other are a list.

    Returns:
        The answer and ``""``, or None and the reason.

    >>> stated_answer("3 + 4 = <<3+4=7>>7 eggs.\n#### 7")[0], stated_answer("So the answer is $7$.")[0]
    ('7', '$7$')
    """
    places = _boxed(text)
    if places:
        # What stands behind a box is not judged, but a gold percent sign there says that percentages are asked.
        agreed = _agreed([text[begin:end] + (_percent_behind(text, end) if gold else "") for begin, end, _ in places])
        if gold and agreed[0] is None and (joined := _joined(text, places)) is not None:
            return joined, ""
        return agreed
    if re.search(r"\\boxed\s*\{", text):
        return None, "a \\boxed{ that does not end"
    marked = [line[4:].strip() for line in re.findall(r"####[^\n]*", text) if line[4:].strip()]
    if marked and not marked[-1].startswith("#"):
        return _agreed(marked[-1:] if gold else marked)
    said = _sentences(text)
    if said:
        return _agreed(said)
    whole = text.strip()
    if not whole:
        return None, "no answer: the text is empty"
    if not gold and (value := _sentence(whole)):
        return value, ""
    return (whole, "") if len(whole) <= MAX_LENGTH else (None, "no final answer in a long text")


def _agreed(found: list[str]) -> tuple[str | None, str]:
    """The last statement, if all others say the same."""
    last = found[-1]
    others = set(found) - {last}
    if len(others) > MAX_BOXES or not all(equal(last, other) or _same(last, other) for other in others):
        return None, SEVERAL
    return last, ""


def _same(last: str, other: str) -> bool:
    """Whether two statements say the same, as ``x = 5`` and ``5`` do; sure without algebra."""
    if max(len(last), len(other)) > MAX_LENGTH:
        return False
    one, two = prepare(clean(last)), prepare(clean(other))
    return any(Comparison().texts(left, right)[0] is True for left, right in ((one, two), (two, one)))


_PERCENT = re.compile(r"\s*(?:\$|\\[)\]])?\s*(?:\\?%|(?:percent|pct)\b)")


def _percent_behind(text: str, end: int) -> str:
    r"""A percent sign where one stands right behind a box (``\boxed{20}$ percent``)."""
    return "%" if _PERCENT.match(text, end + 1) else ""


_GAP = re.compile(r"[$\s.;~]|\\[()\[\],;: ]|\\q?quad|\\text|[{}]")


def _joined(text: str, places: list[tuple[int, int, int]]) -> str | None:
    """The contents of the boxes of a gold text as one list, where commas or joining words stand between them."""
    contents = [text[begin:end].strip() for begin, end, _ in places]
    gaps = [text[one[1] + 1 : two[2]] for one, two in pairwise(places)]
    if len(contents) < 2 or len(contents) > MAX_BOXES or any(len(gap) > 60 for gap in gaps):
        return None
    if any(_GAP.sub("", gap) and not re.search(r",|\b(?:and|or)\b", gap) for gap in gaps):
        return None
    return ", ".join(dict.fromkeys(contents))


_SAID = re.compile(
    r"\banswer\b(?:(?: [a-z]+){0,4}?\s*(?:\bis\b\s*:?|:|=)\s*(?:\*\*)?|\s*(?=\$|\\[(\[]))", re.IGNORECASE
)
_DISPLAY = re.compile(r"\$\$[^$]+\$\$|\\\[.+?\\\]", re.DOTALL)  # may hold line breaks
_SENTENCE_END = re.compile(r"\n|\.(?=\s|$|\*\*)|\bI hope\b|(?<!\\)!(?=\s|$)")


def _sentences(text: str) -> list[str]:
    """What sentences such as "the answer is 42" say, in order."""
    marks = [(match.start(), match.end()) for match in _SAID.finditer(text)]
    ends = ([start for start, _ in marks] + [len(text)])[1:]
    found = []
    for (_, start), limit in zip(marks, ends, strict=True):
        piece = text[start : min(limit, start + MAX_LENGTH)].lstrip()
        shown = _DISPLAY.match(piece)
        end = _SENTENCE_END.search(piece, shown.end() if shown else 0)
        if end is None and limit < len(text):
            continue  # "Final Answer: the final answer is 42" says it once
        said = (piece[: end.start()] if end else piece).strip().strip("*").strip()
        if said:
            found.append(_sentence(said) or said)
    return found


_SEGMENT = re.compile(r"(?<!\\)\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN = r"[A-Za-z ,:;'*()-]"
_BEFORE = re.compile(rf"{_PLAIN}*[A-Za-z]{{2,}}{_PLAIN}*")
_CLOSING = re.compile(r"\s*(?:is|as) (?:the|our|a|its) (?:[a-z]+ )?(?:solution|answer|result|value)[\s.!*]*")
_BEHIND = re.compile(r"\s*(?:%|(?:[A-Za-z/]+(?:\^\{?[0-9]\}?)?\s*){0,3})[\s.!*]*")
_STATES = re.compile(
    r"((?:[A-Za-z ,'*-]|\$[^$]{1,40}\$)*[A-Za-z]{3,}(?:[A-Za-z ,'*-]|\$[^$]{1,40}\$)*) is:? ([^ ].*)", re.DOTALL
)
MAX_SENTENCE = 400


def _sentence(text: str) -> str | None:
    """The one value that a short sentence states ("Therefore $x > 5$ is the solution", "The largest $n$ is 34")."""
    if len(text) > MAX_SENTENCE or {word.lower() for word in re.findall("[A-Za-z]+", text)} & (HEDGES | {"or", "and"}):
        return None
    segments = list(_SEGMENT.finditer(text))
    if len(segments) == 1:
        before, after = text[: segments[0].start()], text[segments[0].end() :]
        if _BEFORE.fullmatch(before) and (_CLOSING.fullmatch(after) or _BEHIND.fullmatch(after)):
            return segments[0][0] + ("" if _CLOSING.fullmatch(after) else after)
    states = _STATES.fullmatch(text)
    return states[2].strip() if states and ". " not in text else None


def equal(gold: str, answer: str) -> bool:
    r"""Whether the answer is the gold one: equal as exact numbers, or as normalised text. Symmetric; never raises.

    Numbers are plain ones (``mulligan.verify.typography.number``), with a sign and with thousands separators (``1,000``
    or ``1, 000``).

    >>> equal("1,000", r"\$1000.00"), equal("0.1", r"10\%"), equal(r"\text{east}", "east")
    (True, False, True)
    """
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return bool(gold.strip()) and gold.strip() == answer.strip()
    left, right = normalise(gold), normalise(answer)
    if not left or not right:
        return False
    if left == right:
        return True
    one, other = number(left), number(right)
    return one is not None and one == other

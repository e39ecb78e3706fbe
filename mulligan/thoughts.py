"""What a response thinks: where its thinking ends, and its thoughts by kind, in English.

The taxonomy is SEAL's (arXiv 2504.07986); "From P(y|x) to P(y)" (arXiv 2604.14142) reports its effect as such counts,
relative to the base model. It is a count of phrases, not of thinking: compare models on the same problems by it, and
read nothing into a single number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK, END_OF_THINKING = "<think>", "</think>"  # as most published chat templates have it
REFLECTION_START = "wait"
REFLECTION = re.compile(r"verify|make sure|hold on|think again|'s correct|'s incorrect|let me check|seems right")
TRANSITION_START = "alternatively"
TRANSITION = re.compile(r"think differently|another (?:way|approach|method|solution|strategy|technique)")
_BLANK_LINES = re.compile(r"\n\s*\n")


def after_thinking(response: str) -> str:
    r"""What stands behind a response's thinking: nothing where that has not ended, everything where there is none.

    >>> after_thinking(r"<think>\boxed{1}? No.</think>It is \boxed{2}.")
    'It is \\boxed{2}.'
    >>> after_thinking(r"<think>\boxed{1}? No.")
    ''
    """
    _, ended, final = response.rpartition(END_OF_THINKING)
    return final if ended or THINK not in final else ""


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How many thoughts a response has, and how many of them are of each kind; the others execute the plan."""

    total: int
    reflection: int
    transition: int


def thought_counts(text: str) -> Thoughts:
    """The thoughts of a response, which are its pieces between blank lines.

    A thought is a *reflection* when it starts with "Wait" or holds one of a few phrases ("verify", "make sure", ...),
    else a *transition* when it starts with "Alternatively" or holds one of others ("another way", ...).

    Capitals make no difference, in starts and phrases alike, as in SEAL's release. Phrases match anywhere, within words
    too ("verifying"), and so do starts ("Waiting"). Three points differ from the release:

    1. It looks for token ids that hold two line breaks; here the text is split, which needs no tokenizer.
    2. It takes the text before the first blank line for the prompt; here the text is the response alone, and all of it
       counts.
    3. Its "think differenly" is misspelled and never found.

    >>> thought_counts("So x = 3.\\n\\nWait, is there another way?\\n\\nAlternatively, factor.")
    Thoughts(total=3, reflection=1, transition=1)
    """
    thoughts = [piece.strip().lower() for piece in _BLANK_LINES.split(text) if piece.strip()]
    kinds = [_kind(thought) for thought in thoughts]
    return Thoughts(len(thoughts), kinds.count("reflection"), kinds.count("transition"))


def _kind(thought: str) -> str:
    """Of a thought in small letters."""
    if thought.startswith(REFLECTION_START) or REFLECTION.search(thought):
        return "reflection"
    if thought.startswith(TRANSITION_START) or TRANSITION.search(thought):
        return "transition"
    return "execution"

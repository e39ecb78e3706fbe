"""The two kinds of failure: what a user can mend, and what the project must mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The command line prints it as one line and exits with 2.

    The message names the key, the file (with the line) or the row, and what would be right.
    """


class ContractError(UserError):
    """A method and the data it asks for do not fit; the message names the method and the field."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'steps'?)" or a list of what is known; never empty.

    Args:
        word: what was given.
        known: the valid names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(names)})"

"""What is trained: from a forest to rows. A select may move a row to another group or leave samples out."""

from __future__ import annotations

from collections.abc import Callable

from mulligan.types import DIAGNOSIS, Forest, Row, Verdict

Select = Callable[[Forest], list[Row]]


def everything(forest: Forest) -> list[Row]:
    """Every graded sample, in its own group; unscorable ones are neither trained nor counted."""
    graded = (Verdict.PASS, Verdict.FAIL)
    return [
        Row(sample=sample, context=(), group=sample.group)
        for sample in forest.samples
        if sample.origin != DIAGNOSIS and sample.grade.verdict in graded
    ]

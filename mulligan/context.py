"""What the learner conditions on. The sampler's context is the request's; this is the term's own choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mulligan.texts import Texts
from mulligan.types import Sample, Tokens


@dataclass(frozen=True, slots=True)
class Context:
    """A named way from a sample to the tokens before its response."""

    name: str
    build: Callable[[Sample, Texts], Tokens]


prompt = Context("prompt", lambda sample, texts: texts.prompt(sample.request.problem))
"""The plain prompt, whatever hint the sampler saw."""

sampling = Context("sampling", lambda sample, texts: sample.request.context)
"""Exactly what the sampler saw."""

nothing = Context("nothing", lambda sample, texts: texts.nothing())
"""BOS alone: the update is on log P(y) (PreRL, arXiv 2604.14142)."""

CONTEXTS = {c.name: c for c in (prompt, sampling, nothing)}

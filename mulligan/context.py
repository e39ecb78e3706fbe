"""What the learner conditions on. The sampler's context is the request's; this is the term's own choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mulligan.seeds import seed_of
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


def behind(token: str) -> Context:
    """A token of the user's choice in place of BOS, for P(y) with a tokenizer that has none (Qwen's, for one)."""
    return Context(f"behind {token}", lambda sample, texts: texts.behind(token))


def _other_prompt(sample: Sample, texts: Texts) -> Tokens:
    problem = sample.request.problem
    other = problem.index + 1 + seed_of("shuffled", problem.uid) % 1000
    size = texts.task.size(problem.split)
    if size is not None and problem.split != "train":
        other %= size
    return texts.prompt(texts.task.problem(problem.split, other))


shuffled = Context("shuffled", _other_prompt)
"""Another problem's prompt: what tells "no question" from "not this question" (a placebo of PreRL)."""

CONTEXTS = {c.name: c for c in (prompt, sampling, nothing, shuffled)}

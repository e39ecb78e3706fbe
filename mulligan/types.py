"""Everything that crosses a stage boundary.

Shapes: a response has T tokens, of which the first ``branch`` were re-entered by a reset (0 for a
fresh sample) and the remaining ``T - branch`` are its *own* tokens, drawn by the sampler.
Log-probs are in nats, at the sampling temperature, and named by who computed them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

Tokens = tuple[int, ...]

# Origins are plain strings, so that a method in a user's own file can name its own.
FRESH = "fresh"  # an ordinary rollout of the plain prompt
HINTED = "hinted"  # sampled with the model's own wrong answers in the prompt
RESET = "reset"  # a continuation of a failed chain from one of its steps
DIAGNOSIS = "diagnosis"  # the model's own judgement of a chain; never trained by default
ORIGINS = (FRESH, HINTED, RESET, DIAGNOSIS)
EXTRA = "extra"  # a second round without any hint, LTE's control


class Verdict(StrEnum):
    """What the verifier says. Apart from the reward, which is a number and may be shaped."""

    PASS = "pass"
    FAIL = "fail"
    UNSCORABLE = "unscorable"  # left out of the group's statistics, and counted
    UNGRADED = "ungraded"  # never shown to the verifier: a diagnosis, a probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question with its truth. ``task``/``split``/``index`` name it for ever.

    Example: ``Problem(task="chain", split="train", index=7, prompt="x=3,y=8,z=1:1x+y,2z*7?",
    answer="187", data={...})``.
    """

    task: str
    split: str
    index: int
    prompt: str  # the text of the question, as the task words it
    answer: str  # the gold answer; hidden from every context
    data: Mapping[str, Any] = field(default_factory=dict)  # the task's own, JSON-able

    @property
    def uid(self) -> str:
        """``"chain/train/7"``."""
        return f"{self.task}/{self.split}/{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verifier's word on one response."""

    verdict: Verdict
    reward: float  # 1.0 or 0.0 unless the task shapes it
    answer: str | None = None  # what was extracted; None when there was no final answer
    reason: str = ""
    process_correct: bool | None = None  # every step right; None where no oracle exists
    first_wrong_step: int | None = None  # 1-based; None when all steps are right or no oracle exists
    steps: int = 0  # number of steps in the response, the answer's own included
    mentions_hint: bool = False  # the response speaks of a hint, which its reader may not have


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sampling order: n samples from one context.

    Samples with the same ``group`` share one baseline. It is made by counting, never derived from
    text, tokens or position.
    """

    problem: Problem
    group: int
    n: int
    context: Tokens  # all that the sampler sees before the response: plain, hinted or a diagnosis
    seeds: tuple[int, ...]  # one per sample
    prefix: Tokens = ()  # response tokens re-entered by a reset
    origin: str = FRESH
    parent: int | None = None  # uid of the sample whose prefix this is
    max_new_tokens: int | None = None  # None: the run's setting
    temperature: float | None = None  # None: the run's setting; 0 is greedy
    stop: tuple[str, ...] = ()  # besides EOS; a stop string stays in the response
    graded: bool = True  # False: the response is not an answer (a diagnosis), so the verifier never sees it


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a sampler returns for one seed of a request. Only its own tokens: no prefix."""

    tokens: Tokens  # EOS included when it was drawn
    behavior_logprobs: tuple[float, ...]  # one per token, at the sampling temperature
    finish: str  # "stop" (EOS or stop string) or "length"


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One graded response. ``eq`` is identity: two equal texts are two samples."""

    uid: int  # unique in the step, in the order of asking
    request: Request
    attempt: int  # 0..n-1 within the request
    tokens: Tokens  # T tokens: the prefix, then its own
    behavior_logprobs: tuple[float, ...]  # T - branch numbers
    finish: str
    text: str  # the decoded response, without special tokens
    grade: Grade

    @property
    def branch(self) -> int:
        """Index of the first own token."""
        return len(self.request.prefix)

    @property
    def origin(self) -> str:
        return self.request.origin

    @property
    def group(self) -> int:
        return self.request.group

    @property
    def passed(self) -> bool:
        return self.grade.verdict is Verdict.PASS

    @property
    def failed(self) -> bool:
        return self.grade.verdict is Verdict.FAIL

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


@dataclass(slots=True, eq=False)
class Tree:
    """Every sample of one problem in one step, untrained ones too, in the order of asking."""

    problem: Problem
    samples: list[Sample] = field(default_factory=list)

    def of(self, *origins: str) -> list[Sample]:
        """The samples of these origins."""
        return [s for s in self.samples if s.origin in origins]

    def groups(self) -> dict[int, list[Sample]]:
        """Samples by group id, in the order of asking."""
        out: dict[int, list[Sample]] = {}
        for sample in self.samples:
            out.setdefault(sample.group, []).append(sample)
        return out

    def any_pass(self) -> bool:
        return any(s.passed for s in self.samples)


@dataclass(slots=True, eq=False)
class Forest:
    """All trees of one step."""

    step: int
    trees: list[Tree]
    filtered: list[Tree] = field(default_factory=list)  # sampled, then left out by the method's group filter

    @property
    def samples(self) -> list[Sample]:
        return [s for t in self.trees for s in t.samples]


QUANTITIES = ("logprobs", "entropy", "exit_probability")
MODELS = ("policy", "start", "reference", "behavior")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A quantity per response token, from a named model in a named context at one loop.

    Example: the learner's own log-prob before the batch's first update, given the hinted prompt,
    is ``Stream(quantity="logprobs", model="start", context="sampling")``, named
    ``start_logprobs@sampling``.

    Raises:
        ValueError: a quantity or loop that does not exist; it must not be taken for the default. Whether the model
            exists is checked against the method, which may bring models of its own (``Method.models``).
    """

    quantity: str = "logprobs"  # logprobs | entropy | exit_probability
    model: str = "start"  # policy | start | reference | behavior, or a name in the method's `models`
    context: str = "learner"  # learner (the term's own context) | sampling | prompt | nothing | shuffled
    loop: int | None = None  # 1-based; None is the last loop that is run

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ValueError(f"stream '{self.name}': quantity must be one of {', '.join(QUANTITIES)}")
        if self.loop is not None and self.loop < 1:
            raise ValueError(f"stream '{self.name}': loops count from 1")
        if self.model == "behavior" and (self.quantity != "logprobs" or self.loop is not None):
            raise ValueError(f"stream '{self.name}': the sampler gives the log-probs of the last loop alone")

    @property
    def name(self) -> str:
        where = "" if self.context == "learner" else f"@{self.context}"
        loop = "" if self.loop is None else f"#{self.loop}"
        return f"{self.model}_{self.quantity}{where}{loop}"


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """One trainable response. The sampling context and the scoring context are apart.

    ``mask`` and ``advantages`` have one entry for each of the T response tokens; a row may hold
    several trainable spans.
    """

    sample: Sample
    context: Tokens  # what the learner conditions on; the term's choice
    group: int  # whose baseline it shares; select may move a row to another group
    term: int = 0  # index of the method's term that made it
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # bool [T]
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # float32 [T]
    streams: dict[str, torch.Tensor] = field(default_factory=dict)  # detached, float32 [T]
    as_start: frozenset[str] = frozenset()  # streams that equal this row's start log-probs, so nobody computes them

    @property
    def tokens(self) -> Tokens:
        """The T response tokens."""
        return self.sample.tokens

    @property
    def reward(self) -> float:
        return self.sample.grade.reward


Metrics = dict[str, float]
Progress = Callable[[Mapping[str, Any]], None]

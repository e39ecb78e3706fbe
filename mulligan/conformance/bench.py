"""What the tests stand on: tiny models, a script that answers any pass, and a learner that shows its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mulligan.assign import assign
from mulligan.contract import check_loops, check_schedule
from mulligan.errors import ContractError
from mulligan.learner.update import Learner, Plan, frozen_models
from mulligan.memory import Memory
from mulligan.method import Method
from mulligan.methods import build_schedule
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.objective import START
from mulligan.rollout import rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.schedule import constant
from mulligan.seeds import seed_of
from mulligan.tasks.chain import Chain, ChainSettings
from mulligan.texts import Texts
from mulligan.types import Forest, Problem, Request, Row

TOKENIZER = pico_tokenizer()
TASK = Chain(ChainSettings(min_steps=2, max_steps=2))  # two operations and the answer: three steps
TEXTS = Texts(TASK, TOKENIZER)
MOST = 64  # max_new_tokens
TEMPERATURE = 0.5  # exact in float32
WIDE = 1 << 20  # a budget that puts all rows into one micro-batch
LOOPS = (3, 2, 4, 5, 6, 7, 8)  # what a looped model is tried with

# What comes of a problem's first group: which of its samples pass, which failures are truncated.
PATTERNS: tuple[tuple[Callable[[int], bool], Callable[[int], bool]], ...] = (
    (lambda k: False, lambda k: False),
    (lambda k: k % 2 == 0, lambda k: False),
    (lambda k: True, lambda k: False),
    (lambda k: False, lambda k: True),
    (lambda k: False, lambda k: k % 2 == 0),
    (lambda k: k != 1, lambda k: True),
)


def problem_of(index: int) -> Problem:
    """The problem at a cursor; as many as there are patterns, again and again."""
    return TASK.problem("train", index % len(PATTERNS))


def answer(request: Request, attempt: int, turn: int = 0) -> tuple[str, str]:
    """The script: a response and how it ends, for any request of any pass.

    The first group of a problem follows its pattern, whatever is sampled later passes and fails by turns. Failures
    have a wrong step or only a wrong answer, and both may skip steps, so that lengths differ.

    Args:
        turn: by how many patterns the problems are moved on: what fails in one step passes in another.
    """
    if not request.graded:
        return "\\boxed{2}", "stop"
    passes, cut = PATTERNS[(request.problem.index + turn) % len(PATTERNS)]
    number = request.group & 0xFFFFF  # groups count from 0 in each tree
    right = passes(attempt) if number == 0 else (attempt + number) % 2 == 0
    steps = TASK.true_steps(request.problem)
    done = len(TASK.split_steps(TEXTS.decode(request.prefix)))
    rest = steps[min(done, len(steps) - 1) :]
    if attempt % 4 == 2:
        rest = rest[-1:]
    if right:
        return "".join(rest), "stop"
    if number == 0 and cut(attempt):
        return "".join(rest)[:-3], "length"
    if attempt % 2 == 1 and len(rest) > 1:
        rest[0] = f"{rest[0][:-2]}{(int(rest[0][-2]) + 1) % 10};"
    wrong = "".join(str((int(digit) + 1 + attempt % 3) % 10) for digit in request.problem.answer)
    return "".join([*rest[:-1], f"\\boxed{{{wrong}}}"]), "stop"


@cache
def tiny(kind: str, loops: int, scale: float = 1.0) -> PreTrainedModel:
    """A float64 model: "qwen3" or "looped". Another scale of the weights gives another model."""
    sizes = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "pad_token_id": TOKENIZER.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: PreTrainedModel
        if kind == "qwen3":
            config = Qwen3Config(**sizes, head_dim=8, initializer_range=0.2, tie_word_embeddings=False)
            model = Qwen3ForCausalLM(config)
        else:
            model = LoopedForCausalLM(LoopedConfig(**sizes, total_ut_steps=loops))
            model.model.early_exit_gate.weight.data.normal_(0.0, 0.5)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= scale
    return model.double().eval()


@dataclass(eq=False)
class Bench:
    """A learner whose rate is 0, so that one model serves every test, and the gradient of its last step."""

    kind: str
    loops: int
    models: tuple[str, ...]  # frozen ones; each differs from the policy and from the others
    gradient: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.model = tiny(self.kind, self.loops)
        self.learner = Learner(
            self.model,
            TOKENIZER,
            torch.optim.SGD(self.model.parameters(), lr=0.0),
            Plan(temperature=TEMPERATURE, max_new_tokens=MOST, clip_norm=0.0),
            rate=lambda _: 0.0,
            frozen={name: tiny(self.kind, self.loops, 1.1 + 0.1 * k) for k, name in enumerate(self.models)},
        )
        self.learner.guard = self._note

    def _note(self) -> None:
        self.gradient = torch.cat([_gradient(p).flatten() for p in self.model.parameters()])

    def update(
        self, rows: Sequence[Row], method: Method, budget: int = WIDE, pad: int = 0
    ) -> tuple[float, torch.Tensor]:
        """Loss and gradient (float64, all weights end to end) of one optimizer step.

        Args:
            budget: tokens of a micro-batch.
            pad: the token that fills it up.
        """
        self.learner.plan.tokens_per_micro_batch, self.learner.pad = budget, pad
        loss = self.learner.update([copied(row) for row in rows], method, 0)["update/loss"]
        return loss, self.gradient


@cache
def bench_of(kind: str, loops: int, models: tuple[str, ...]) -> Bench:
    """One for all cases that need the same models."""
    return Bench(kind, loops, models)


@dataclass(eq=False)
class Case:
    """One method, in one of its phases, on one kind of model."""

    label: str
    method: Method
    kind: str  # qwen3 | looped
    loops: int

    @property
    def bench(self) -> Bench:
        return bench_of(self.kind, self.loops, tuple(frozen_models([self.method])))

    def grow(self, only: Sequence[int] | None = None) -> tuple[Forest, Memory]:
        """What the passes make of the script; a method that remembers is given a step to remember first.

        Args:
            only: the cursors of the problems to sample, in order; None is one of each pattern, by the method's own
                filter (dynamic sampling may take more).
        """
        memory = Memory()
        if self.method.remember is not None:
            self._step(0, memory, None)
        return self._step(1, memory, only), memory

    def _step(self, step: int, memory: Memory, only: Sequence[int] | None) -> Forest:
        cursors = iter(only or ())

        def draw() -> tuple[int, Problem]:
            cursor = memory.next_index() if only is None else next(cursors)
            return cursor, problem_of(cursor)

        forest = rollout(
            draw,
            len(PATTERNS) if only is None else len(only),
            self.method.passes,
            step=step,
            seed=7,
            texts=TEXTS,
            sampler=ScriptedSampler(TOKENIZER, lambda request, attempt: answer(request, attempt, 1 - step)),
            grade=TASK.grade,
            keep=self.method.keep if only is None else None,
            score=self.bench.learner.score_samples,
            memory=memory,
        )
        if self.method.remember is not None:
            self.method.remember(forest, memory)
        memory.commit()
        return forest

    @cached_property
    def forest(self) -> Forest:
        return self.grow()[0]

    def assigned(self, forest: Forest, method: Method | None = None) -> list[Row]:
        """The rows of a forest, as training makes them, with start log-probs that are not the policy's: the ratios are
        those of a second update, and clips bite."""
        rows = assign(method or self.method, forest, TEXTS, self.bench.learner.fill_streams, MOST)
        assert rows, f"{self.method.name}: select and credit leave no row of {len(forest.samples)} samples"
        self.bench.learner.fill_streams(rows, [START], lambda row, _: row.context)
        for row in rows:
            generator = torch.Generator().manual_seed(seed_of("start", *row.tokens))
            row.streams[START.name] += 0.3 * torch.randn(len(row.tokens), generator=generator)
        return rows

    @cached_property
    def rows(self) -> list[Row]:
        """All of the forest's rows."""
        return self.assigned(self.forest)

    @cached_property
    def some(self) -> list[Row]:
        """At most 20 of the rows: two of each origin, sign of the advantage, term and length of the prefix first."""
        seen: dict[tuple[object, ...], int] = {}
        first, rest = [], []
        for row in self.rows:
            sign = float((row.advantages * row.mask).sum().sign())
            key = (row.term, row.sample.origin, sign, bool(row.sample.branch), row.sample.truncated)
            seen[key] = seen.get(key, 0) + 1
            (first if seen[key] <= 2 else rest).append(row)
        return [copied(row) for row in [*first, *rest][:20]]

    def live(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that the learner forwards: an advantage is not 0, or a regulariser reads them."""
        return [
            row for row in rows if self.method.terms[row.term].regularisers or bool((row.advantages * row.mask).any())
        ]


def copied(row: Row) -> Row:
    """A row whose tensors may be changed."""
    return replace(
        row,
        mask=row.mask.clone(),
        advantages=row.advantages.clone(),
        streams={name: values.clone() for name, values in row.streams.items()},
    )


def cases_of(text: str) -> list[Case]:
    """Every phase of a method on every kind of model that it permits.

    Raises:
        UserError: it cannot be built.
    """
    methods = build_schedule(text).schedule.methods
    name = text.replace("\\", "/").rsplit("/", 1)[-1] if ".py:" in text and "+" not in text else text
    out = []
    for number, method in enumerate(methods, 1):
        phase = f"-phase{number}" if len(methods) > 1 else ""
        out += [Case(f"{name}{phase}-{kind}", method, kind, loops) for kind, loops in kinds_of(method)]
    return out


def kinds_of(method: Method) -> list[tuple[str, int]]:
    """The models that a method permits, with their loops. One that the contract refuses everywhere gets those that
    have the loops it names, so that the tests can say what is wrong."""
    for fits in (_passes, _has_loops):
        loops = next((loops for loops in LOOPS if fits(method, loops)), None)
        found = [("qwen3", 1)] * fits(method, 1) + ([] if loops is None else [("looped", loops)])
        if found:
            return found
    return [("qwen3", 1)]


def check(method: Method, loops: int) -> None:
    """The contract, as a run holds a method to it before it begins.

    Raises:
        ContractError: what does not fit.
    """
    problems = [problem_of(index) for index in range(2)]
    check_schedule(constant(method), TASK, TEXTS, problems, max_new_tokens=MOST, loops=loops)


def _passes(method: Method, loops: int) -> bool:
    try:
        check(method, loops)
    except Exception:  # whatever a user's own code raises, a test shall show it
        return False
    return True


def _has_loops(method: Method, loops: int) -> bool:
    try:
        for term in method.terms:
            check_loops(method, term, loops)
    except ContractError:
        return False
    return True


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def assert_equal_updates(
    left: tuple[float, torch.Tensor], right: tuple[float, torch.Tensor], what: str, near: float = 1e-6
) -> None:
    """Two losses with their gradients agree but for rounding, and there is a gradient.

    Args:
        near: largest difference, as a share of the gradient's norm. Qwen3 norms in float32 whatever its dtype, and a
            row stores advantages and streams in float32.
    """
    size = float(left[1].norm())
    assert size > 0, "there is no gradient at all: nothing is learned from a forest of passes and failures"
    off = abs(left[0] - right[0])
    assert off <= near * max(abs(left[0]), 1e-2), f"{what} the loss: {left[0]:.9g} is now {right[0]:.9g}"
    share = float((left[1] - right[1]).norm()) / size
    assert share <= near, f"{what} the gradient by {share:.2g} of its norm"

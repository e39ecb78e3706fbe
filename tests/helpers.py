"""Samples, rows and tiny models made by hand, and a learner that shows its gradients."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mulligan.learner.update import Learner, Plan
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.rollout import Grader
from mulligan.tasks.chain import Chain, ChainSettings
from mulligan.texts import Texts
from mulligan.types import FRESH, Forest, Grade, Problem, Request, Row, Sample, Tree, Verdict

needs_compiler = pytest.mark.skipif(
    "CXX" not in os.environ and not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
TOKENIZER = pico_tokenizer()
TASK = Chain(ChainSettings(level=1))
TEXTS = Texts(TASK, TOKENIZER)
LOOPS = 3
VOCABULARY = len(TOKENIZER)

Weights = dict[str, torch.Tensor]


@cache
def _model(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, initializer_range=0.2, tie_word_embeddings=False))
        else:
            model = LoopedForCausalLM(LoopedConfig(**sizes, total_ut_steps=LOOPS))
            model.model.early_exit_gate.weight.data.normal_(0.0, 0.5)
    return model.to(dtype).eval()


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model of its own: "qwen3" or "looped"."""
    return copy.deepcopy(_model(kind, dtype))


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens, none of them special."""
    drawn = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.tolist())


def make_sample(
    *,
    uid: int = 0,
    reward: float = 0.0,
    verdict: Verdict | None = None,
    response: Sequence[int] = (5, 6, 7),
    prefix: Sequence[int] = (),
    context: Sequence[int] = (1, 4),
    group: int = 0,
    origin: str = FRESH,
    finish: str = "stop",
    parent: int | None = None,
    temperature: float | None = None,
    problem: Problem | None = None,
) -> Sample:
    """One graded response; ``response`` is its own part, after the prefix."""
    problem = problem or Problem(task="toy", split="train", index=uid, prompt="1+1?", answer="2")
    request = Request(
        problem=problem,
        group=group,
        n=1,
        context=tuple(context),
        seeds=(uid,),
        prefix=tuple(prefix),
        origin=origin,
        parent=parent,
        temperature=temperature,
    )
    return Sample(
        uid=uid,
        request=request,
        attempt=0,
        tokens=(*prefix, *response),
        behavior_logprobs=(-0.5,) * len(response),
        finish=finish,
        text="",
        grade=Grade(verdict=verdict or (Verdict.PASS if reward > 0 else Verdict.FAIL), reward=reward),
    )


def make_row(sample: Sample, advantage: float | Sequence[float] = 0.0, *, term: int = 0) -> Row:
    """A row as ``assign`` makes it, with the sampler's context."""
    own = torch.arange(len(sample.tokens)) >= sample.branch
    given = torch.tensor(advantage, dtype=torch.float32)
    advantages = torch.where(own, given, torch.zeros(()))
    return Row(
        sample=sample, context=sample.request.context, group=sample.group, term=term, mask=own, advantages=advantages
    )


def make_forest(*trees: Sequence[Sample]) -> Forest:
    return Forest(0, [Tree(samples[0].request.problem, list(samples)) for samples in trees])


class Probe:
    """A learner on one model, with the gradient of every optimizer step, before any weight changes.

    The rate is 0 unless said otherwise, so that a model serves many updates.
    """

    def __init__(
        self, model: PreTrainedModel, *, rate: float = 0.0, reference: PreTrainedModel | None = None, **plan
    ) -> None:
        self.model = model
        self.gradients: list[Weights] = []
        self.learner = Learner(
            model,
            TOKENIZER,
            torch.optim.SGD(model.parameters(), lr=rate),
            Plan(**({"clip_norm": 0.0} | plan)),
            rate=lambda _: rate,
            frozen={} if reference is None else {"reference": reference},
        )
        self.learner.guard = self._note

    def _note(self) -> None:
        self.gradients.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}
        )

    def update(self, rows: Sequence[Row], method, step: int = 0) -> tuple[float, Weights]:
        """Loss and gradient; with several optimizer steps their mean loss and the last gradient."""
        loss = self.learner.update(rows, method, step)["update/loss"]
        return loss, self.gradients[-1]


def flat(gradient: Weights) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def assert_near(left: Weights, right: Weights, relative: float = 1e-9, *, may_vanish: bool = False) -> None:
    """The difference is small beside the whole gradient's norm, and the gradient is not nothing.

    transformers' Qwen3 norms in float32 whatever its dtype, so a scaled loss scales its gradient only to about
    1e-8; the looped model is float64 throughout.
    """
    size = float(flat(right).norm())
    assert size > 0 or may_vanish
    assert left.keys() == right.keys()
    assert float((flat(left) - flat(right)).norm()) <= relative * size


def assert_same_gradients(ours: torch.nn.Module, plain: torch.nn.Module, tokens: torch.Tensor, **more) -> None:
    """Two models of one kind have the same loss on tokens [rows, length], parameter names and gradients."""
    loss, expected = (model(tokens, labels=tokens, **more).loss for model in (ours, plain))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    plain.zero_grad()
    expected.backward()
    for (name, mine), (its_name, its) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == its_name
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)


def each(verify: Callable[[Problem, str], Grade]) -> Grader:
    """A word on one response as a word on several, which is what a rollout wants."""
    return lambda problem, responses, tokens: [verify(problem, response) for response in responses]

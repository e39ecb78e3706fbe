"""The learner against plain code: one row at a time, no padding, a softmax over the whole vocabulary.

The reference shares nothing with the learner but the model's own forward. It rounds where a row stores
float32 (advantages and start log-probs), and is float64 otherwise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import sqrt

import pytest
import torch

from mulligan.assign import assign
from mulligan.method import Method
from mulligan.methods.dapo import dapo
from mulligan.methods.dr_grpo import dr_grpo
from mulligan.methods.grpo import grpo
from mulligan.objective import START
from mulligan.types import Forest, Row, Sample
from tests.helpers import TASK, TEXTS, Probe, Weights, assert_near, make_forest, make_sample, tiny, tokens

MAX_NEW_TOKENS = 12
TEMPERATURE = 0.5  # exact in float32
METHODS = {"grpo": grpo, "dr-grpo": dr_grpo, "dapo": dapo}
MODELS = ["qwen3", "looped"]


def forest_of() -> Forest:
    """Two problems with groups of four and three: unequal lengths, a re-entered prefix, one truncated, one of
    a temperature of its own; a third problem whose group has no variance."""
    trees = []
    rewards = [(1, 0, 0, 1), (0, 1, 0), (1, 1)]
    lengths = [(3, 12, 7, 1), (5, 2, 11), (4, 6)]
    for slot, (group_rewards, group_lengths) in enumerate(zip(rewards, lengths, strict=True)):
        problem = TASK.problem("train", slot)
        trees.append(
            [
                make_sample(
                    uid=10 * slot + k,
                    problem=problem,
                    context=TEXTS.prompt(problem),
                    group=slot,
                    reward=float(reward),
                    response=tokens(length, seed=10 * slot + k),
                    prefix=tokens(4, seed=99) if (slot, k) == (1, 2) else (),
                    finish="length" if length == 12 else "stop",
                    temperature=1.0 if (slot, k) == (0, 2) else None,
                )
                for k, (reward, length) in enumerate(zip(group_rewards, group_lengths, strict=True))
            ]
        )
    return make_forest(*trees)


def rows_of(method: Method, probe: Probe) -> list[Row]:
    return assign(method, forest_of(), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)


def make_probe(kind: str, **more) -> Probe:
    plan = {"temperature": TEMPERATURE, "max_new_tokens": MAX_NEW_TOKENS, "tokens_per_micro_batch": 70}
    return Probe(tiny(kind), **(plan | more))


# ---- the reference -----------------------------------------------------------------------------


def single(value: float) -> float:
    """Rounded to float32, as a row stores it."""
    return torch.tensor(value, dtype=torch.float32).item()


def reference_logprobs(model, sample: Sample) -> torch.Tensor:
    """Of the sample's own tokens, at its temperature."""
    prompt = list(TEXTS.prompt(sample.request.problem))
    temperature = TEMPERATURE if sample.request.temperature is None else sample.request.temperature
    logits = model(torch.tensor([prompt + list(sample.tokens)])).logits[0]
    table = torch.log_softmax(logits / temperature, dim=-1)
    first = len(prompt) + len(sample.request.prefix)
    return torch.stack(
        [table[first + t - 1, token] for t, token in enumerate(sample.tokens[len(sample.request.prefix) :])]
    )


def reference_advantages(name: str, group: list[Sample]) -> list[float]:
    rewards = [s.grade.reward for s in group]
    if name == "dapo":  # free up to 80 % of the longest response, then down to -1 in a straight line
        rewards = [
            r + (-1 if s.finish == "length" else -min(1.0, max(0.0, (len(s.tokens) - 0.8 * 12) / (0.2 * 12))))
            for r, s in zip(rewards, group, strict=True)
        ]
    centre = sum(rewards) / len(rewards)
    if name == "dr-grpo":
        return [single(r - centre) for r in rewards]
    std = sqrt(sum((r - centre) ** 2 for r in rewards) / len(rewards))
    return [single((r - centre) / (std + 1e-6)) for r in rewards]


@dataclass
class Reference:
    """Loss, gradient and steps of plain gradient descent."""

    name: str
    model: torch.nn.Module
    start: dict[int, list[float]]  # by sample's uid; rounded to float32

    @classmethod
    def of(cls, name: str, model) -> Reference:
        own = copy.deepcopy(model)
        with torch.no_grad():
            start = {s.uid: [single(x) for x in reference_logprobs(own, s).tolist()] for s in forest_of().samples}
        return cls(name, own, start)

    def loss_and_gradient(self, groups: list[list[Sample]]) -> tuple[float, Weights]:
        high = 1.28 if self.name == "dapo" else 1.2
        samples = [s for group in groups for s in group]
        if self.name == "dr-grpo":
            denominator = len(samples) * MAX_NEW_TOKENS
        else:
            denominator = sum(len(s.tokens) - len(s.request.prefix) for s in samples)
        self.model.zero_grad()
        total = 0.0
        for group in groups:
            for sample, advantage in zip(group, reference_advantages(self.name, group), strict=True):
                loss = torch.zeros((), dtype=torch.float64)
                for policy, start in zip(reference_logprobs(self.model, sample), self.start[sample.uid], strict=True):
                    ratio = torch.exp(policy - start)
                    loss = loss - torch.min(ratio * advantage, torch.clamp(ratio, 0.8, high) * advantage) / denominator
                loss.backward()
                total += loss.item()
        return total, {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()
        }

    def descend(self, gradient: Weights, rate: float) -> None:
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight -= rate * gradient[name]


def groups_of(forest: Forest) -> list[list[Sample]]:
    return [tree.samples for tree in forest.trees]


# ---- the tests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_one_update_from_another_start(name, kind):
    """Start log-probs that are not the policy's, far enough off for both clips to bite."""
    probe = make_probe(kind)
    reference = Reference.of(name, probe.model)
    rows = rows_of(METHODS[name](), probe)
    generator = torch.Generator().manual_seed(3)
    for row in rows:
        own = torch.tensor(reference.start[row.sample.uid]) + 0.4 * torch.randn(
            int(row.mask.sum()), generator=generator
        )
        reference.start[row.sample.uid] = own.tolist()
        row.streams[START.name] = torch.cat([torch.zeros(row.sample.branch), own])
    loss, gradient = probe.update(rows, METHODS[name]())
    expected, slope = reference.loss_and_gradient(groups_of(forest_of()))
    assert loss == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert_near(gradient, slope)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_the_second_update_of_a_batch(name, kind):
    """Two epochs: after the first update the policy has moved, and the ratios and clips are those of the start."""
    rate = 0.5
    probe = make_probe(kind, rate=rate, epochs=2)
    reference = Reference.of(name, probe.model)
    rows = rows_of(METHODS[name](), probe)
    loss, _ = probe.update(rows, METHODS[name]())
    groups = groups_of(forest_of())
    first_loss, first = reference.loss_and_gradient(groups)
    reference.descend(first, rate)
    second_loss, second = reference.loss_and_gradient(groups)

    assert len(probe.gradients) == 2
    assert_near(probe.gradients[0], first)
    assert_near(probe.gradients[1], second)
    assert loss == pytest.approx((first_loss + second_loss) / 2, rel=1e-9, abs=1e-12)
    # The case is worth something: the second step's ratios are far from 1, and some are clipped.
    with torch.no_grad():
        ratios = torch.cat(
            [
                torch.exp(reference_logprobs(reference.model, s) - torch.tensor(reference.start[s.uid]))
                for s in forest_of().samples
            ]
        )
    assert (ratios > 1.2).any() and (ratios < 0.8).any() and ((ratios - 1).abs() < 0.2).any()


@pytest.mark.parametrize("kind", MODELS)
def test_updates_on_parts_of_a_batch(kind):
    """Two updates on different groups: each has denominators of its own, and no group is cut or used twice."""
    rate = 0.5
    probe = make_probe(kind, rate=rate, updates_per_batch=2)
    reference = Reference.of("grpo", probe.model)
    rows = rows_of(grpo(), probe)
    probe.update(rows, grpo())
    groups = groups_of(forest_of())
    # Which groups came first is the learner's own draw: one of two and one of one, in either order.
    splits = [([a], [b for b in range(3) if b != a]) for a in range(3)]
    found = []
    for first, second in [*splits, *((b, a) for a, b in splits)]:
        try_out = copy.deepcopy(reference)
        _, one = try_out.loss_and_gradient([groups[i] for i in first])
        try_out.descend(one, rate)
        _, two = try_out.loss_and_gradient([groups[i] for i in second])
        near = [
            all(torch.allclose(a[n], b[n], rtol=1e-8, atol=1e-13) for n in a)
            for a, b in ((probe.gradients[0], one), (probe.gradients[1], two))
        ]
        found.append(all(near))
    assert found.count(True) == 1

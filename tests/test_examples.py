"""The examples are methods of users: short, on public names alone, and each does on the shipped base what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from mulligan.assign import assign
from mulligan.config import MethodSection, ModelSection, OptimizerSection, Run, SamplingSection, TaskSection
from mulligan.rollout import rollout
from mulligan.session import Session, prepare
from mulligan.types import Forest, Problem, Row, Sample, Stream
from tests.e2e.helpers import call

FOLDER = Path(__file__).parents[1] / "examples" / "methods"
VINEPPO = f"{FOLDER}/vineppo.py:vineppo"
DISTILLATION = f"{FOLDER}/on_policy_distillation.py:on_policy_distillation"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ready(model: str, method: str, prompts: int = 4, rate: float = 4e-4, **settings: object) -> Session:
    """A run on short chains, prepared as the command line would."""
    return prepare(
        Run(
            model=ModelSection(name=model, device="cpu"),
            task=TaskSection.model_validate({"name": "chain", "level": 1}),
            method=MethodSection.model_validate({"name": method} | settings),
            sampling=SamplingSection(prompts=prompts, max_new_tokens=48),
            optimizer=OptimizerSection(learning_rate=rate),
        )
    )


def drawn(session: Session, step: int) -> tuple[Forest, list[Row]]:
    """What one step samples and learns from; each step has problems of its own."""
    method, sampling = session.schedule.at(0), session.run.sampling
    cursors = iter(range(step * sampling.prompts, (step + 1) * sampling.prompts))

    def draw() -> tuple[int, Problem]:
        cursor = next(cursors)
        return cursor, session.task.problem("train", cursor)

    forest = rollout(
        draw,
        sampling.prompts,
        method.passes,
        step=step,
        seed=0,
        texts=session.texts,
        sampler=session.sampler,
        grade=session.task.grade,
        score=session.learner.score_samples,
    )
    return forest, assign(method, forest, session.texts, session.learner.fill_streams, sampling.max_new_tokens)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short_and_uses_public_names(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert not any(name.name.startswith("_") for name in node.names)
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")


@pytest.mark.parametrize(("model", "method"), [("pico", VINEPPO), ("pico-qwen3", DISTILLATION)])
def test_an_example_trains(model, method, tmp_path):
    small = ["task.level=1", "sampling.prompts=2", "sampling.max_new_tokens=40", "eval.problems=2", "eval.samples=1"]
    said = call(
        *("train", "--method", method, "--model", model, "--steps", "2", "--out", tmp_path / "run", "eval.every=0"),
        *small,
    )
    assert said.code == 0, said.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "update/loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["update/gradient_norm"] > 0 for record in steps)


# ---- VinePPO -----------------------------------------------------------------------------------


def value(samples: list[Sample]) -> float:
    return sum(s.grade.reward for s in samples) / len(samples)


def test_branch_values_credit_each_step_on_its_own():
    session = ready("pico", VINEPPO, chains=3, probes=2)
    forest, rows = drawn(session, 0)
    assert [row.sample.uid for row in rows] == [s.uid for s in forest.samples if s.origin == "fresh"]
    by_uid = {s.uid: tree for tree in forest.trees for s in tree.samples}
    differ = 0
    for row in rows:
        chain, tree = row.sample, by_uid[row.sample.uid]
        ends = session.texts.step_ends(chain.tokens)
        probes = [s for s in tree.of("probe") if s.request.parent == chain.uid]
        assert len(probes) == 2 * (len(ends) - 1)  # none behind the last step
        worth = [value(tree.of("fresh"))]
        worth += [value([p for p in probes if p.tokens[: p.branch] == chain.tokens[:end]]) for end in ends[:-1]]
        worth += [chain.grade.reward]
        at = 0
        for step, end in enumerate(ends):
            gain = worth[step + 1] - worth[step]
            assert row.advantages[at:end].tolist() == pytest.approx([gain] * (end - at), abs=1e-6), (chain.text, step)
            at = end
        differ += len(set(row.advantages.tolist())) > 1
    assert differ > len(rows) / 2  # most chains are blamed or praised for some step and not for others
    before = [p.clone() for p in session.learner.model.parameters()]
    session.learner.update(rows, session.schedule.at(0), 0)
    assert any(not torch.equal(p, q) for p, q in zip(before, session.learner.model.parameters(), strict=True))


# ---- on-policy distillation --------------------------------------------------------------------


def spoiled(session: Session) -> None:
    """Noise of 0.7 standard deviations on every weight matrix: the policy has something to learn back."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in session.learner.model.parameters():
            if weight.dim() > 1:
                weight += 0.7 * weight.std() * torch.randn(weight.shape, generator=generator)


def test_the_policy_moves_toward_its_teacher():
    session = ready("pico-qwen3", DISTILLATION, prompts=8, group_size=4, teacher="pico-qwen3")
    method, learner = session.schedule.at(0), session.learner
    spoiled(session)

    def gaps(samples: list[Sample]) -> list[torch.Tensor]:
        """policy - teacher, by token."""
        policy, teacher = (learner.score_samples(samples, Stream(model=name)) for name in ("policy", "teacher"))
        return [one - other for one, other in zip(policy, teacher, strict=True)]

    def apart() -> tuple[float, float]:
        """KL(policy, teacher) in nats a token, on the policy's samples for problems that are not trained on, and its
        standard error by sample."""
        means = torch.stack([gap.mean() for gap in gaps(drawn(session, 50)[0].samples)])
        return float(means.mean()), float(means.std()) / len(means) ** 0.5

    before, error = apart()
    for step in range(4):
        forest, rows = drawn(session, step)
        assert [row.sample for row in rows] == forest.samples  # no verdict chooses among them
        drawn_kl = float(torch.cat(gaps(forest.samples)).mean())
        # On-policy the ratio is 1, so the loss is the mean of policy - teacher by token.
        assert learner.update(rows, method, step)["update/loss"] == pytest.approx(drawn_kl, rel=1e-4)
    after, later = apart()
    assert before - after > 4 * (error**2 + later**2) ** 0.5, (before, after)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn():
    session = ready("pico", DISTILLATION, prompts=2, group_size=2)
    _, rows = drawn(session, 0)
    assert all(not bool(row.advantages.any()) for row in rows)

"""What a run is built of."""

from __future__ import annotations

import pytest
import torch

from mulligan.assign import assign
from mulligan.config import MethodSection, ModelSection, OptimizerSection, Run
from mulligan.session import prepare
from mulligan.types import Stream
from tests.helpers import make_forest, make_sample, tokens


def test_the_reference_stays_where_the_policy_began():
    run = Run(
        model=ModelSection(name="pico", device="cpu"),
        method=MethodSection.model_validate({"name": "grpo", "kl": 0.5}),
        optimizer=OptimizerSection(learning_rate=0.01),
    )
    session = prepare(run)
    learner, method = session.learner, session.schedule.at(0)
    problem = session.task.problem("train", 0)
    samples = [
        make_sample(
            uid=i, problem=problem, context=session.texts.prompt(problem), response=tokens(4 + i), reward=float(i)
        )
        for i in range(2)
    ]

    def scores(model: str) -> list[torch.Tensor]:
        return learner.score_samples(samples, Stream(model=model))

    def update() -> dict[str, float]:
        rows = assign(method, make_forest(samples), session.texts, learner.fill_streams, run.sampling.max_new_tokens)
        return learner.update(rows, method, 0)

    began = scores("reference")
    assert all(torch.equal(a, b) for a, b in zip(began, scores("policy"), strict=True))
    assert update().get("update/penalty", 0.0) == pytest.approx(0.0, abs=1e-6)  # but for rounding
    assert all(torch.equal(a, b) for a, b in zip(began, scores("reference"), strict=True))
    assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(began, scores("policy"), strict=True))
    # k3 of what the second update sees: the mean over its tokens of exp(d) - d - 1, d = reference - policy.
    d = torch.cat(began) - torch.cat(scores("policy"))
    assert update()["update/penalty"] == pytest.approx(0.5 * float((d.exp() - d - 1).mean()), rel=1e-4)

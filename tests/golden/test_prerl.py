"""PreRL, its two halves and DSRL (arXiv 2604.14142) as exact numbers, and what an update forwards.

The batch, two groups: P passes and N fails, both with the ratios 0.5, 0.9, 1, 1.1, 2; D and E fail and are a group of
their own, with three and two tokens of ratio 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mulligan.assign import assign
from mulligan.config import Run
from mulligan.context import nothing, prompt, shuffled
from mulligan.errors import UserError
from mulligan.method import Method, Term
from mulligan.methods import PRESETS, build_schedule
from mulligan.methods.dsrl import dsrl
from mulligan.methods.grpo import grpo
from mulligan.methods.prerl import nsr_prerl, prerl
from mulligan.objective import START
from mulligan.session import prepare
from mulligan.texts import Texts
from mulligan.train import train
from mulligan.types import Row
from tests.golden.tables import (
    DOWN_LOSSES,
    DOWN_SLOPES,
    MAX_NEW_TOKENS,
    PROBLEM,
    RATIOS,
    UP_LOSSES,
    UP_SLOPES,
    check,
    method_of,
    rows_of,
    sample_of,
    table,
    times,
)
from tests.helpers import TASK, TEXTS, TOKENIZER, Probe, make_forest, tiny

P, N, D, E = range(4)
GROUPS = (
    [sample_of(P, 1.0), sample_of(N, 0.0)],
    [sample_of(D, 0.0, 3, group=1), sample_of(E, 0.0, 2, group=1)],
)
BOS = TOKENIZER.bos_token_id


def lines(name: str, **settings):
    return table(method_of(name, **settings), *GROUPS, ratios={P: RATIOS, N: RATIOS})


def test_prerl():
    # r - mean: 1/2, -1/2; 0, 0. 5 + 5 + 3 + 2 = 15 tokens: half of (-4.7 + 5.8) over 15.
    found = lines("prerl")
    check(found[P], advantage=0.5, weight=1 / 15, losses=times(0.5, UP_LOSSES), slopes=times(0.5, UP_SLOPES))
    check(found[N], advantage=-0.5, weight=1 / 15, losses=times(0.5, DOWN_LOSSES), slopes=times(0.5, DOWN_SLOPES))
    check(found[D], advantage=0, weight=1 / 15, losses=[0] * 3, slopes=[0] * 3)
    assert sum(line.loss for line in found.values()) == pytest.approx(0.55 / 15)


def test_nsr_prerl():
    # Only A < 0: N. The group without variance has A = 0 and is gone, from the denominator too: 2.9 / 5.
    found = lines("nsr-prerl")
    assert set(found) == {N}
    check(found[N], advantage=-0.5, weight=1 / 5, losses=times(0.5, DOWN_LOSSES), slopes=times(0.5, DOWN_SLOPES))
    # credit="nsr" has A = -1 for every wrong sample: 10 tokens, (5.8 + 3 + 2) / 10.
    found = lines("nsr-prerl", credit="nsr")
    assert set(found) == {N, D, E}
    check(found[N], advantage=-1, weight=1 / 10, losses=DOWN_LOSSES, slopes=DOWN_SLOPES)
    check(found[E], advantage=-1, weight=1 / 10, losses=[1] * 2, slopes=[1] * 2)
    assert sum(line.loss for line in found.values()) == pytest.approx(1.08)


def test_psr_prerl():
    found = lines("psr-prerl")
    assert set(found) == {P}
    check(found[P], advantage=0.5, weight=1 / 5, losses=times(0.5, UP_LOSSES), slopes=times(0.5, UP_SLOPES))
    found = lines("psr-prerl", credit="nsr")
    assert set(found) == {P}
    check(found[P], advantage=1, weight=1 / 5, losses=UP_LOSSES, slopes=UP_SLOPES)


def test_dual_clip_and_factor():
    # Dual clip 1.5: for A = -1/2 no loss is above 3/4, so rho = 2 has 3/4 and slope 0; A > 0 is as before.
    found = lines("prerl", dual_clip=1.5, weight=0.5)
    check(found[P], advantage=0.5, weight=1 / 30, losses=times(0.5, UP_LOSSES), slopes=times(0.5, UP_SLOPES))
    check(found[N], advantage=-0.5, weight=1 / 30, losses=[0.4, 0.45, 0.5, 0.55, 0.75], slopes=[0, 0.45, 0.5, 0.55, 0])
    # Published: dual clip 10, factor 0.01. A = -1/2: rho = 9 costs 4.5, rho = 20 costs 5 and has no slope.
    ratios = {N: (9.0, 20.0, 1.0, 1.0, 1.0)}
    found = table(method_of("nsr-prerl-published"), *GROUPS, ratios=ratios)
    check(found[N], advantage=-0.5, weight=0.01 / 5, losses=[4.5, 5, 0.5, 0.5, 0.5], slopes=[4.5, 0, 0.5, 0.5, 0.5])
    with pytest.raises(UserError, match=r"dual clip is 0\.5, but must be above 1"):
        method_of("nsr-prerl", dual_clip=0.5)


def test_published_presets():
    run = {"optimizer.weight_decay": 0.01, "optimizer.betas": [0.9, 0.999], "optimizer.clip_norm": 1.0}
    for name in ("prerl", "nsr-prerl", "psr-prerl", "dsrl"):
        method, preset = method_of(f"{name}-published"), PRESETS[f"{name}-published"]
        assert method.terms[0].weight == 0.01 and preset.run == run
        dual = None if name == "psr-prerl" else 10.0  # it bounds A < 0 alone
        assert method.terms[0].surrogate.dual == dual
    assert method_of("prerl").terms[0].weight == 1.0 and not PRESETS["prerl"].run


# ---- the context -------------------------------------------------------------------------------


def test_the_update_sees_bos_and_the_response():
    for name in ("prerl", "nsr-prerl", "psr-prerl", "dsrl"):
        rows = rows_of(method_of(name), *GROUPS)
        assert rows and {row.context for row in rows} == {(BOS,)}
        assert all(bool(row.mask.all()) for row in rows)  # the first token and EOS too
    (row, _) = rows_of(prerl(bos="?"), GROUPS[0])
    assert row.context == (TOKENIZER.get_vocab()["?"],)
    with pytest.raises(UserError, match="no token '<start>' to stand for BOS"):
        rows_of(prerl(bos="<start>"), GROUPS[0])


def test_a_tokenizer_without_bos_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(UserError, match="BOS"):
        assign(prerl(), make_forest(*GROUPS), Texts(TASK, bare), lambda *_: None, MAX_NEW_TOKENS)


def log_p(model, context: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """Of each token, with a softmax over the whole vocabulary."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0]
    table_ = torch.log_softmax(logits.double(), -1)[len(context) - 1 : -1]
    return table_.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_nsr_prerl_pushes_wrong_samples_down_in_p_of_y(kind):
    """Two real updates. The ratio of the second is one of P(y): its start is log P(y) from before the first."""
    model = tiny(kind)
    probe = Probe(model, rate=0.02, epochs=2)
    method = nsr_prerl(credit="nsr")
    rows = assign(method, make_forest(*GROUPS), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    assert [row.sample.uid for row in rows] == [N, D, E]
    before = [log_p(model, (BOS,), row.tokens) for row in rows]
    probe.update(rows, method)
    for row, start in zip(rows, before, strict=True):
        assert torch.allclose(row.streams[START.name].double(), start, atol=1e-5)
        assert not torch.allclose(start, log_p(tiny(kind), row.sample.request.context, row.tokens), atol=1e-2)
        assert float(log_p(model, (BOS,), row.tokens).sum()) < float(start.sum()) - 1e-3
    first, second = probe.gradients
    assert all(float(torch.cat([g.flatten() for g in gradient.values()]).norm()) > 0 for gradient in (first, second))


# ---- the schedule ------------------------------------------------------------------------------


def test_dsrl_is_exactly_so_many_steps_of_nsr_prerl_and_then_the_other():
    schedule = build_schedule("dsrl").schedule
    assert [schedule.at(step).name for step in (0, 19, 20, 21, 10**6)] == ["nsr-prerl"] * 2 + ["grpo"] * 3
    assert schedule.at(19) == nsr_prerl() and schedule.at(20) == grpo()
    schedule = build_schedule("dsrl(lte(group_size=4), steps=3)").schedule
    assert [schedule.at(step).name for step in range(5)] == ["nsr-prerl"] * 3 + ["lte"] * 2
    assert schedule.at(0) == nsr_prerl(group_size=4) and schedule.at(3) == method_of("lte", group_size=4)
    # srpo's second pass needs a failure of the first: the warm-up has its four fresh chains alone.
    assert build_schedule("dsrl(srpo)").schedule.at(0) == nsr_prerl(group_size=4)
    assert build_schedule("dsrl(steps=1)").schedule.at(1) == grpo()


def test_dsrls_settings_are_the_warm_ups():
    settings = {"credit": "nsr", "clip": 0.1, "dual_clip": 3.0, "weight": 0.5, "bos": "?"}
    warm_up = build_schedule("dsrl", settings).schedule.at(0).terms[0]
    expected = nsr_prerl(credit="nsr", clip=0.1, dual_clip=3.0, weight=0.5).terms[0]
    assert (warm_up.credit, warm_up.surrogate, warm_up.weight) == (expected.credit, expected.surrogate, 0.5)
    assert warm_up.context.build(GROUPS[0][0], TEXTS) == (TOKENIZER.get_vocab()["?"],)


def test_dsrl_needs_fresh_samples_to_warm_up_on():
    def elsewhere(problem, tree, ask):
        yield ask.samples(2)

    with pytest.raises(UserError, match="dsrl: mine draws no fresh samples to warm up on"):
        dsrl(Method(name="mine", passes=(elsewhere,), terms=(Term(),)))
    with pytest.raises(UserError, match="steps: Input should be greater than or equal to 1"):
        build_schedule("dsrl", {"steps": 0})


def test_the_controls_change_the_warm_ups_context_alone():
    dsrl_, conditional, other = (build_schedule(n).schedule for n in ("dsrl", "dsrl-conditional", "dsrl-shuffled"))
    for control, name, context in ((conditional, "nsr-conditional", prompt), (other, "nsr-shuffled", shuffled)):
        assert control.at(0).replace(name="nsr-prerl", context=nothing) == dsrl_.at(0)
        assert control.at(0).name == name and control.at(0).terms[0].context is context
        assert control.at(19).name == name and control.at(20) == grpo()
    (own,) = rows_of(conditional.at(0), *GROUPS)
    assert own.sample.uid == N and own.context == TEXTS.prompt(PROBLEM)
    (row,) = rows_of(other.at(0), *GROUPS)
    assert row.context[0] == BOS and len(row.context) > 1 and row.context != TEXTS.prompt(PROBLEM)
    assert TEXTS.decode(row.context)[-1] == "?"  # a question like any other


# ---- a real run --------------------------------------------------------------------------------


class Silent:
    """Nobody is told anything."""

    def __getattr__(self, name: str):
        return lambda *args, **more: None


def packed(ids: torch.Tensor) -> list[tuple[int, ...]]:
    """The sequences of a batch without their padding, which stands on the right."""
    out = []
    for row in ids.tolist():
        while row[-1] == TOKENIZER.pad_token_id:
            row.pop()
        out.append(tuple(row))
    return out


def test_a_run_has_its_warm_up_updates_without_a_question_and_then_others(tmp_path: Path):
    """What the training forwards of each step hold, token by token: for two steps BOS and a wrong response, then the
    question before every one."""
    steps, warm_up = 4, 2
    run = Run.model_validate(
        {
            "steps": steps,
            "out": str(tmp_path / "run"),
            "model": {"name": "pico", "device": "cpu"},
            "task": {"name": "chain", "level": 3},
            "method": {"name": f"dsrl(grpo(group_size=4), steps={warm_up}, credit=nsr)"},
            "sampling": {"prompts": 3, "max_new_tokens": 64},
            "optimizer": {"learning_rate": 1e-5, "tokens_per_micro_batch": 400, "share_prefixes": False},
            "eval": {"problems": 1, "samples": 1, "every": 0},
        }
    )
    session = prepare(run)
    seen: list[list[tuple[int, ...]]] = [[] for _ in range(steps)]

    def note(module, args, given, out) -> None:
        if module.training:  # the sampler and the scoring of streams run in evaluation mode
            seen[session.step].extend(packed(given["input_ids"]))

    session.loaded.model.base_model.register_forward_hook(note, with_kwargs=True)
    train(session, Silent())

    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    fates: dict[bool, set[str]] = {True: set(), False: set()}  # by whether the warm-up is on
    forwarded = {True: 0, False: 0}
    for step in range(steps):
        mine = [r for r in records if r["step"] == step + 1]
        wrong = [r for r in mine if r["verdict"] == "fail"]
        assert len(mine) == 12
        fates[step < warm_up] |= {r["verdict"] for r in mine}
        if step < warm_up:
            expected = [(BOS, *r["tokens"]) for r in wrong]
        else:
            mixed = {r["group"] for r in wrong} & {r["group"] for r in mine if r["verdict"] == "pass"}
            expected = [(*r["context_tokens"], *r["tokens"]) for r in mine if r["group"] in mixed]
            assert all(len(r["context_tokens"]) > 10 for r in mine)
        assert sorted(seen[step]) == sorted(expected)
        forwarded[step < warm_up] += len(expected)
    assert all(fates[part] == {"pass", "fail"} and forwarded[part] for part in (True, False))
    assert session.learner.updates == steps


def test_a_warm_up_scores_nothing_for_what_comes_after():
    """With several updates a batch, the start log-probs are of P(y) and of the wrong samples alone."""
    model = tiny("qwen3")
    forwarded: list[tuple[int, ...]] = []
    model.base_model.register_forward_hook(
        lambda _, __, given, ___: forwarded.extend(packed(given["input_ids"])), with_kwargs=True
    )
    method = build_schedule("dsrl(lte, credit=nsr)").schedule.at(0)
    probe = Probe(model, epochs=2)
    forwarded.clear()
    rows: list[Row] = assign(method, make_forest(*GROUPS), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    assert forwarded == []
    probe.update(rows, method)
    wrong = [(BOS, *s.tokens) for group in GROUPS for s in group if s.failed]
    assert sorted(forwarded) == sorted(3 * wrong)  # scored once, then updated twice

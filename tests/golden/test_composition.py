"""Laws of ``a + b``, in loss and gradient: the order, whose part is whose, what all weight on the last loop means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mulligan.assign import assign
from mulligan.context import nothing
from mulligan.credit import ByVerdict, OneSign
from mulligan.errors import UserError
from mulligan.method import Method, Term
from mulligan.methods import build_schedule
from mulligan.methods.dapo import dapo, mixed
from mulligan.methods.dr_grpo import dr_grpo
from mulligan.methods.grpo import grpo
from mulligan.methods.lte import lte
from mulligan.methods.nsr import nsr
from mulligan.methods.prerl import nsr_prerl
from mulligan.methods.reinforce import reinforce
from mulligan.methods.rltt import rltt
from mulligan.methods.srpo import rrpo, srpo
from mulligan.objective import (
    KL,
    SAMPLED,
    START,
    AllLoops,
    Clipped,
    EntropyBonus,
    LastLoop,
    Reinforce,
    SequenceClipped,
    constant,
    token_mean,
)
from mulligan.reset import remember_shares
from mulligan.rollout import fresh
from mulligan.types import HINTED, RESET, Forest, Row
from tests.golden.tables import MAX_NEW_TOKENS, method_of, sample_of
from tests.helpers import LOOPS, TEXTS, TOKENIZER, Probe, Weights, assert_near, flat, make_forest, tiny

LAST = (0.0,) * (LOOPS - 1) + (1.0,)


def forest_of() -> Forest:
    """A mixed group; a failed one with two rescues behind a hint; a mixed one with resets of a failure, one of which
    passes. Lengths differ."""
    mixed_ = [sample_of(uid, float(uid == 1), 3 + uid) for uid in range(3)]
    failed = [sample_of(10 + k, 0.0, 4 + k, group=1) for k in range(3)]
    rescues = [sample_of(13 + k, 1.0, 5 + k, group=2, origin=HINTED) for k in range(2)]
    chains = [sample_of(20 + k, float(k == 2), 6 - k, group=3) for k in range(3)]
    prefix = chains[0].tokens[:2]
    resets = [sample_of(23 + k, float(k == 0), 4, group=4, origin=RESET, prefix=prefix, parent=20) for k in range(2)]
    return make_forest(mixed_, [*failed, *rescues], [*chains, *resets])


def result(method: Method, kind: str = "looped", *, off: bool = True) -> tuple[float, Weights, list[Row]]:
    """Loss and gradient on the forest; ``off`` moves every start away from the policy, so that ratios are none of 1."""
    probe = Probe(tiny(kind), tokens_per_micro_batch=90, max_new_tokens=MAX_NEW_TOKENS)
    rows = assign(method, forest_of(), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    probe.learner.fill_streams(rows, [START], lambda row, _: row.context)
    if off:
        for row in rows:
            noise = 0.3 * torch.randn(len(row.tokens), generator=torch.Generator().manual_seed(row.sample.uid))
            for name in {START.name, SAMPLED.name} & set(row.streams):
                row.streams[name] = row.streams[name] + noise
    return *probe.update(rows, method), rows


METHODS: dict[str, Callable[[], Method]] = {
    "grpo": grpo,
    "srpo": srpo,
    "lte": lambda: lte(3),
    "lte-separate": lambda: lte(3, separate=True),
    "rrpo-clipped": lambda: rrpo(surrogate="clipped"),
    "nsr-prerl": nsr_prerl,
    "gspo": lambda: method_of("gspo"),
}


@pytest.mark.parametrize("name", METHODS)
def test_all_weight_on_the_last_loop_changes_nothing(name):
    method = METHODS[name]()
    loss, gradient, rows = result(method)
    both = method + rltt().replace(readout=AllLoops(weighting=LAST))
    assert both.terms[0].readout == AllLoops(weighting=LAST)
    other_loss, other, others = result(both)
    assert [row.sample.uid for row in rows] == [row.sample.uid for row in others]
    assert other_loss == pytest.approx(loss, rel=1e-12) and abs(loss) > 1e-3
    assert_near(other, gradient)
    # And with the method's own weights it is another gradient for the same loss.
    third_loss, third, _ = result(method + rltt(weighting="uniform"))
    assert third_loss == pytest.approx(loss, rel=1e-12)
    assert float((flat(third) - flat(gradient)).norm()) > 0.05 * float(flat(gradient).norm())


@pytest.mark.parametrize("text", ["srpo+rltt", "lte+rltt", "nsr-prerl+rltt", "nsr+gspo", "dapo+rltt"])
def test_the_order_makes_no_difference(text):
    one, two = text.split("+")
    left, right = method_of(text), method_of(f"{two}+{one}")
    assert left == right and left.name == "+".join(sorted((one, two)))
    loss, gradient, _ = result(left)
    other_loss, other, _ = result(right)
    assert other_loss == loss
    assert_near(other, gradient, 1e-12)


def test_grouping_makes_no_difference():
    parts = (nsr(), rltt(), dr_grpo().replace(name="constant", credit=Term().credit))
    left = (parts[0] + parts[1]) + parts[2]
    right = parts[0] + (parts[1] + parts[2])
    assert left.terms == right.terms and left.changes == right.changes == {"credit", "readout", "aggregation"}
    (term,) = left.terms
    assert (term.credit, term.aggregation) == (ByVerdict(passed=None, failed=-1.0), constant)


# ---- whose part is whose -----------------------------------------------------------------------


def test_rltt_gives_its_readout_alone():
    for method in (grpo(5), srpo(), lte(3), reinforce(6)):
        both = method + rltt()
        assert both.terms[0].readout == AllLoops(weighting="exit")
        assert both.replace(name=method.name, readout=LastLoop(), contributes=None) == method
    # Its objective is REINFORCE by sequence; of that nothing comes along.
    assert (grpo() + rltt()).terms[0].surrogate == Clipped() and (grpo() + rltt()).terms[0].aggregation is token_mean
    assert rltt().terms[0].surrogate == Reinforce()


def test_rltt_gives_its_kl_too():
    both = srpo() + rltt(kl=0.1)
    assert both.terms[0].regularisers == (KL(coefficient=0.1),) and both.changes >= {"regularisers", "readout"}


def test_what_is_no_part_of_a_term_comes_along():
    assert (dapo() + rltt()).keep is mixed
    assert method_of("srpo-permuted+rltt").remember is remember_shares
    assert (rltt() + lte(5)).passes == lte(5).passes
    teacher = Method(name="taught", models={"teacher": "somewhere"})
    assert (teacher + rltt()).models == {"teacher": "somewhere"}


def test_what_neither_changes_is_grpos():
    (term,) = (nsr() + method_of("gspo")).terms
    assert term.surrogate == SequenceClipped(low=3e-4, high=4e-4) and term.credit == nsr().terms[0].credit
    assert (term.context.name, term.readout, term.weight) == ("prompt", LastLoop(), 1.0)
    assert (nsr() + method_of("gspo")).passes == (fresh(8),)


@pytest.mark.parametrize(
    ("one", "other", "part"),
    [
        (lte(), srpo(), "passes"),
        (nsr(), nsr_prerl(), "credit"),
        (reinforce(), nsr(), "credit"),
        (srpo(), dr_grpo(), "aggregation"),
        (lte(), method_of("gspo"), "surrogate"),
        (rltt(), method_of("rltt-distillation"), "readout"),
        (rltt(kl=0.1), lte(entropy_bonus=0.1), "regularisers"),
        (dapo(), Method(name="other", keep=lambda tree: True), "keep"),
        (grpo(4), grpo(6), "passes"),
    ],
)
def test_two_changes_of_one_part_are_refused_with_its_name(one, other, part):
    for left, right in ((one, other), (other, one)):
        with pytest.raises(UserError, match=f"both change '{part}'$") as refused:
            left + right
        assert str(refused.value).startswith("+".join(sorted((one.name, other.name))) + ": ")


def test_a_part_goes_to_every_term():
    terms = (Term(weight=0.5), Term(surrogate=Reinforce(), regularisers=(EntropyBonus(coefficient=0.1),)))
    two = Method(name="two", terms=terms)
    for both in (two + rltt(), rltt() + two):
        assert [term.readout for term in both.terms] == [AllLoops(weighting="exit")] * 2
        assert [term.weight for term in both.terms] == [0.5, 1.0]
        assert [term.regularisers for term in both.terms] == [(), (EntropyBonus(coefficient=0.1),)]
    for clash in (rltt(kl=0.1), method_of("lte")):
        with pytest.raises(UserError, match=r"both change '(regularisers|surrogate)'"):
            two + clash
    with pytest.raises(UserError, match="two and three both change 'terms'"):
        two + Method(name="three", terms=terms)


# ---- the readout's chain rule ------------------------------------------------------------------


def test_lte_through_all_loops():
    """sum_j sum_t w_t c_j log P_t(y_j), with c_j = d loss / d log P_last(y_j) worked out by hand: of hinted tokens
    -A gamma u / (u + gamma)^2, of the others -A rho where the clip is open, each by the step's token count."""
    method = lte(3) + rltt(weighting="progressive")
    _, gradient, rows = result(method)
    model = tiny("looped")
    total = sum(int(row.mask.sum()) for row in rows)
    assert {row.sample.origin for row in rows} >= {"fresh", HINTED} and total > 30
    for row in rows:
        out = model(torch.tensor([[*row.context, *row.tokens]]), output_loops=True)
        target = torch.tensor(row.tokens)[:, None]
        tables = [torch.log_softmax(model.lm_head(h[0]), -1)[len(row.context) - 1 : -1] for h in out.loop_hidden_states]
        logprobs = torch.stack([t.gather(1, target)[:, 0] for t in tables])[:, row.mask]
        last, a = logprobs[-1].detach(), row.advantages[row.mask].double()
        if row.sample.origin == HINTED:
            u = (last - row.streams[SAMPLED.name][row.mask]).exp()
            c = -a * 0.1 * u / (u + 0.1) ** 2
        else:
            rho = (last - row.streams[START.name][row.mask]).exp()
            c = torch.where(((a > 0) & (rho > 1.2)) | ((a < 0) & (rho < 0.8)), 0.0, -a * rho)
        for t in range(LOOPS):
            ((t + 1) / 6 * c * logprobs[t] / total).sum().backward(retain_graph=True)
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_near(gradient, expected)


def test_resets_through_all_loops_leave_the_prefix_alone():
    """As many hidden states go through the head as there are own tokens, for each loop."""
    method = srpo() + rltt()
    probe = Probe(tiny("looped"))
    rows = assign(method, forest_of(), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    live = [row for row in rows if bool(row.advantages.any())]
    seen: list[int] = []
    probe.model.lm_head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[0]))
    probe.update(rows, method)
    own = sum(len(row.sample.behavior_logprobs) for row in live)
    assert seen == [own] * LOOPS and own < sum(len(row.tokens) for row in live)


# ---- phases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dsrl(lte(group_size=3), steps=20)+rltt", "rltt+dsrl(lte(group_size=3), steps=20)"])
def test_dsrl_of_lte_through_all_loops(text):
    """Twenty steps of NSR-PreRL on LTE's fresh samples, then LTE, both through every loop."""
    schedule = build_schedule(text).schedule
    assert [steps for steps, _ in schedule.phases] == [20, None]
    assert [schedule.at(step).name for step in (0, 19, 20)] == ["nsr-prerl+rltt"] * 2 + ["lte+rltt"]
    warm_up, after = schedule.methods
    assert warm_up == nsr_prerl(3) + rltt() and after == lte(3) + rltt()
    assert warm_up.passes == (fresh(3),) and isinstance(warm_up.terms[0].credit, OneSign)
    assert all(method.terms[0].readout == AllLoops(weighting="exit") for method in schedule.methods)
    loss, gradient, rows = result(warm_up)
    assert warm_up.terms[0].context is nothing
    assert rows and all(row.context == (TOKENIZER.bos_token_id,) and row.sample.failed for row in rows)
    assert loss > 0 and float(flat(gradient).norm()) > 0
    _, _, rows = result(after)
    assert {row.sample.origin for row in rows} == {"fresh", HINTED, RESET}


def test_a_schedule_inside_is_refused():
    for text in ("dsrl(dsrl-shuffled)", "dsrl-shuffled+dsrl"):
        with pytest.raises(UserError, match=r"not one that changes over time|both sides of '\+' change over time"):
            build_schedule(text)

"""Rows as trees: what they share is computed once, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mulligan.learner.packing import Item, layouts, micro_batches
from mulligan.learner.sharing import _trial, layer_costs, shares_prefixes
from mulligan.learner.trees import Costs, Node, Trees, common, plant, plant_within
from mulligan.method import Method
from mulligan.methods.grpo import grpo
from mulligan.models import flex
from mulligan.models.adapters import Lora, add_adapter
from mulligan.models.attention import Branches, branches_of, tree_attention
from mulligan.models.kernels import take_kernels
from mulligan.models.norms import take_norms
from mulligan.models.rotary import take_rotary
from mulligan.objective import START
from mulligan.types import Row, Tokens
from tests.helpers import Probe, flat, make_row, make_sample, needs_compiler, tiny, tokens
from tests.learner.test_invariance import Loops
from tests.models.test_architectures import ARCHITECTURES, build

few = settings(max_examples=12, deadline=None, derandomize=True)
many = settings(max_examples=60, deadline=None, derandomize=True)


class Always(Costs):
    """Trees, whatever they cost."""

    def of_trees(self, trees: Trees) -> float:
        return -1.0


ALWAYS: Costs = Always(token=1.0, width=1)


KERNELS = ("blocks", "flex")  # of the CPU, and of CUDA


@contextmanager
def reading_by(kernel: str) -> Iterator[None]:
    """Trees go through FlexAttention as they do on CUDA, padding and trial included, by torch's own reference of it.

    torch differentiates the reference only when it is not asked on which device, and calls it slow in a warning.
    """
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "flex":
            patch.setattr(flex, "is_for", lambda device: True)
            patch.setattr(flex, "BLOCK", 16)
            patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
            patch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@st.composite
def families(draw, most: int = 12) -> list[Tokens]:
    """Rows that part anywhere: continuations of earlier rows, copies, prefixes, and rows of their own."""
    rows: list[Tokens] = []
    for uid in range(draw(st.integers(1, most))):
        own = tokens(draw(st.integers(1, 40)), seed=uid)
        kind = draw(st.sampled_from(["own", "continued", "continued", "copy", "prefix"]))
        if not rows or kind == "own":
            rows.append(own)
            continue
        parent = rows[draw(st.integers(0, len(rows) - 1))]
        cut = draw(st.integers(1, len(parent)))
        rows.append({"continued": parent[:cut] + own, "copy": parent, "prefix": parent[:cut]}[kind][:100])
    return rows


# ---- layout ------------------------------------------------------------------------------------


def test_a_layout_by_hand():
    """A prompt of 30 tokens; two responses of 20, the second of which a third leaves after 18; a stranger of 4."""
    prompt, one, two, three = tuple(range(100, 130)), (1,) * 20, (2,) * 20, (2,) * 18 + (3, 4)
    rows = [prompt + two, (500, 501, 502, 503), prompt + one, prompt + three, prompt + two]
    trees = plant(rows)
    assert trees.tokens == [*prompt, *one, *((2,) * 18), 2, 2, 3, 4, 500, 501, 502, 503]
    assert trees.nodes == [
        Node(0, 30, 0, None),  # the prompt
        Node(30, 50, 30, 0),
        Node(50, 68, 30, 0),  # what two and three share: 18 tokens, for 3 rows
        Node(68, 70, 48, 2),
        Node(70, 72, 48, 2),
        Node(72, 76, 0, None),
    ]
    assert trees.ends == [3, 5, 1, 4, 3]
    assert trees.columns(3).tolist() == [*range(30), *range(50, 68), 70, 71]
    assert trees.positions().tolist() == [*range(50), *range(30, 48), 48, 49, 48, 49, 0, 1, 2, 3]
    assert trees.branches() == Branches(
        runs=((0, 30, 1), (30, 20, 1), (50, 18, 1), (68, 2, 2), (72, 4, 1)), shared=((0, 30, 72), (50, 68, 72))
    )


def test_a_few_tokens_in_common_are_not_worth_a_branch():
    rows = [(7,) * 3 + (k,) * 30 for k in (1, 2)]
    assert len(plant(rows).tokens) == 66 and len(plant(rows).nodes) == 2
    assert len(plant([rows[0], rows[0][:5]]).tokens) == 38
    assert len(plant([rows[0], rows[0]]).tokens) == 33  # a copy needs no branch


@many
@given(families())
def test_every_row_is_a_path_that_sees_itself_alone(rows):
    trees = plant(rows)
    ids, positions = torch.tensor(trees.tokens), trees.positions()
    sees = visible(trees.branches(), len(ids))
    for k, row in enumerate(rows):
        path = trees.columns(k)
        assert tuple(ids[path].tolist()) == row
        assert torch.equal(positions[path], torch.arange(len(row)))
        for i in range(len(row)):
            assert torch.equal(sees[path[i]].nonzero()[:, 0], path[: i + 1])
    assert len(set(rows)) <= len(trees.nodes) <= 2 * len(rows)
    assert len(ids) <= sum(map(len, rows))


def visible(branches: Branches, length: int) -> torch.Tensor:
    """[N, N]: what each token attends to, taken literally."""
    out = torch.zeros(length, length, dtype=torch.bool)
    for start, size, count in branches.runs:
        for s in range(start, start + size * count, size):
            out[s : s + size, s : s + size] = torch.ones(size, size, dtype=torch.bool).tril()
    for start, end, last in branches.shared:
        out[end:last, start:end] = True
    return out


@many
@given(families(20), st.sampled_from([1, 30, 90, 200, 10_000]))
def test_groups_stay_within_the_budget_and_lose_no_row(rows, budget):
    found = plant_within(rows, budget)
    assert sorted(i for part, _ in found for i in part) == list(range(len(rows)))
    for part, trees in found:
        assert len(trees.tokens) <= budget or len(part) == 1
        assert trees.tokens == plant([rows[i] for i in part]).tokens
    assert len(found) == 1 or budget < 10_000


def test_rows_that_share_go_together():
    first, second = tokens(50, 1), tokens(50, 2)
    rows = [(*(first, second)[i % 2], i) for i in range(8)]
    found = plant_within(rows, 54)
    assert sorted(sorted(part) for part, _ in found) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert plant_within([], 54) == []


def test_nested_rows_are_no_recursion():
    """Each of 2,000 rows is the beginning of the next."""
    row = tokens(2000)
    trees = plant([row[: i + 1] for i in range(2000)])
    assert len(trees.columns(1999)) == 2000


def test_what_is_common():
    assert common((), (1,)) == 0 and common((1, 2), (1, 2)) == 2 and common((1, 2, 3), (2, 2, 3)) == 0


# ---- which layout ------------------------------------------------------------------------------


def items_of(rows: list[Tokens]) -> list[Item]:
    return [Item(row[:1], row[1:], torch.ones(len(row) - 1, dtype=torch.bool), 1.0) for row in rows]


def chosen(rows: list[Tokens], costs: Costs | None) -> set[bool]:
    """Whether the batches are trees."""
    return {trees is not None for _, trees in layouts(items_of(rows), 4096, costs)}


def test_the_cheaper_layout_is_taken():
    costs = Costs(token=400_000, width=128)
    prompt = tokens(100)
    alike = [(*prompt, *tokens(20, seed)) for seed in range(1, 9)]
    assert chosen(alike, costs) == {True}
    assert chosen(alike, None) == {False}
    apart = [tokens(40, seed) for seed in range(20)]  # one length: no padding, nothing shared, and more calls
    assert chosen(apart, costs) == {False}
    assert chosen(alike, Costs(token=100, width=1)) == {False}  # calls cost more than all there is to compute
    spread = [tokens(4 + 12 * seed, seed) for seed in range(20)]  # nothing shared, but much padding
    assert chosen(spread, costs) == {True}


def test_flat_batches_are_those_of_before():
    rows = [tokens(length, length) for length in (3, 9, 4, 8)]
    found = layouts(items_of(rows), 10)
    assert found == [(part, None) for part in micro_batches([3, 9, 4, 8], 10)]


# ---- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@few
@given(families(), st.sampled_from([1, 2]), st.sampled_from([None, 0.3]))
def test_attention_is_a_softmax_over_what_is_visible(kernel, rows, groups, scale):
    """float64, against the whole table of scores; gradients as well."""
    branches, length = plant(rows).branches(), len(plant(rows).tokens)
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, heads, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (2 * groups, 2, 2)
    )
    with reading_by(kernel):
        found = tree_attention(q, k, v, branches, scale)
    wide = [x.repeat_interleave(groups, 1) for x in (k, v)]
    scores = (q @ wide[0].mT) * (8**-0.5 if scale is None else scale)
    right = scores.masked_fill(~visible(branches, length), -torch.inf).softmax(-1) @ wide[1]
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    slope = torch.randn(right.shape, dtype=torch.float64, generator=generator)
    with reading_by(kernel):
        gradients = torch.autograd.grad(found, (q, k, v), slope)
    for mine, its in zip(gradients, torch.autograd.grad(right, (q, k, v), slope), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-11)


def test_a_mask_that_is_not_understood_fails():
    """Copied or cut, it no longer says what it stands for, and no attention takes it for leave to see everything."""
    mask = Branches(((0, 4, 1),), ()).mask(torch.device("cpu"))
    assert branches_of(mask) is not None and branches_of(mask[:, :, :4]) is None
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, :, :4])


def test_shapes_that_the_kernel_does_not_know_are_refused():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="no attention over trees"):
        tree_attention(x, x, x[..., :4], Branches(((0, 4, 1),), ()))


# ---- learner -----------------------------------------------------------------------------------


@st.composite
def updates(draw) -> list[Row]:
    """Groups of fresh rows, continuations from anywhere of a parent, hinted rows, rows of P(y), copies and prefixes."""
    rows: list[Row] = []
    for group in range(draw(st.integers(1, 3))):
        prompt = (1, *tokens(draw(st.sampled_from([0, 3, 30])), seed=group))
        members: list[Row] = []
        for kind in draw(st.lists(st.sampled_from(KINDS_OF_ROWS), min_size=1, max_size=5)):
            uid = len(rows) + len(members)
            parent = members[draw(st.integers(0, len(members) - 1))] if members else None
            own, prefix, context = tokens(draw(st.integers(1, 25)), seed=100 + uid), (), prompt
            if kind == "hinted":
                context = (*prompt, *tokens(6, seed=60 + group))
            if parent is not None and kind == "continued":
                prefix, context = parent.tokens[: draw(st.integers(1, len(parent.tokens)))][:40], parent.context
            if parent is not None and kind in ("copy", "prefix"):
                cut = len(parent.tokens) if kind == "copy" else draw(st.integers(1, len(parent.tokens)))
                own, context = parent.tokens[:cut], parent.context
            temperature = draw(st.sampled_from([None, 0.7]))
            sample = make_sample(
                uid=uid, group=group, context=context, prefix=prefix, response=own, temperature=temperature
            )
            row = make_row(sample, draw(st.sampled_from([1.0, -0.5, 0.7, 0.0])))
            members.append(replace(row, context=(1,)) if kind == "alone" else row)
        rows += members
    return rows


KINDS_OF_ROWS = ("fresh", "fresh", "continued", "hinted", "alone", "copy", "prefix")
KL_AND_ENTROPY = grpo(kl=0.1, entropy_bonus=0.05)
LOOPED = KL_AND_ENTROPY.replace(readout=Loops(weights_=(0.2, 0.3, 0.5)))
EXITS = KL_AND_ENTROPY.replace(readout=Loops())
CASES = {"qwen3": ("qwen3", KL_AND_ENTROPY), "looped": ("looped", LOOPED), "exits": ("looped", EXITS)}
KINDS_OF_MODELS = ("plain", "checkpointing", "lora")


@functools.cache
def probe(kind: str, more: str, layout: str, kernel: str = "blocks") -> Probe:
    """Its rate is 0, so that it can be used for ever."""
    dtype = torch.float64 if kernel == "flex" else torch.float32
    model, reference = tiny(kind, dtype), tiny(kind, dtype)
    with torch.no_grad():
        for weight in reference.parameters():
            weight *= 1.05
    if more == "kernels":
        take_norms(model)
        take_rotary(model)
        take_kernels(model)
    if more == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    if more == "lora":
        add_adapter(model, Lora(3, 8.0, ("all-linear",)), 0)
        generator = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(0.0, 0.1, generator=generator)
    with reading_by(kernel):
        out = Probe(model, reference=reference, max_new_tokens=40, share_prefixes=layout != "flat")
    assert len(out.learner._costs) == (0 if layout == "flat" else 2)  # policy and reference
    out.learner._costs = dict.fromkeys(out.learner._costs, ALWAYS)
    return out


def trained(on: Probe, rows: list[Row], method: Method, budget: int) -> tuple[float, torch.Tensor, list[Row]]:
    """Loss, gradient and the rows with their streams, which the same layout has filled."""
    on.learner.plan.tokens_per_micro_batch = budget
    mine = [copy.deepcopy(row) for row in rows]
    streams = list(dict.fromkeys(stream for term in method.terms for stream in term.reads))
    on.learner.fill_streams(mine, streams, lambda row, _: row.context)
    for row in mine:  # not the policy's own, so that ratios are not 1
        generator = torch.Generator().manual_seed(row.sample.uid)
        row.streams[START.name] = row.streams[START.name] + 0.3 * torch.randn(len(row.tokens), generator=generator)
    on.model.zero_grad(set_to_none=True)
    loss, gradient = on.update(mine, method)
    return loss, flat(gradient), mine


@pytest.mark.parametrize("more", [*KINDS_OF_MODELS, pytest.param("kernels", marks=needs_compiler)])
@pytest.mark.parametrize("case", CASES)
@few
@given(rows=updates(), budget=st.sampled_from([60, 150, 10_000]))
def test_loss_and_gradient_are_those_of_whole_rows(case, more, rows, budget):
    """To 1e-5 of the gradient's norm, in float32; streams to 1e-5 nats."""
    kind, method = CASES[case]
    loss, gradient, filled = trained(probe(kind, more, "flat"), rows, method, 10_000)
    other_loss, other, other_filled = trained(probe(kind, more, "trees"), rows, method, budget)
    for row, its in zip(filled, other_filled, strict=True):
        for name, values in row.streams.items():
            torch.testing.assert_close(its.streams[name], values, rtol=1e-5, atol=1e-5)
    assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert float((other - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-9


@pytest.mark.parametrize("more", KINDS_OF_MODELS)
@pytest.mark.parametrize("case", CASES)
# torch's reference is slow, so a failure is not made smaller.
@settings(max_examples=3, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(rows=updates(), budget=st.sampled_from([150, 10_000]))
def test_so_they_are_through_flex_attention(case, more, rows, budget):
    """In float64, to the float32 of the streams: the reference's rounding would say nothing of a GPU's."""
    kind, method = CASES[case]
    loss, gradient, filled = trained(probe(kind, more, "flat", "flex"), rows, method, 10_000)
    with reading_by("flex"):
        other_loss, other, other_filled = trained(probe(kind, more, "trees", "flex"), rows, method, budget)
    for row, its in zip(filled, other_filled, strict=True):
        for name, values in row.streams.items():
            torch.testing.assert_close(its.streams[name], values, rtol=1e-6, atol=1e-6)
    assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert float((other - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max())


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_shared_tokens_are_read_once(kind):
    """8 rows of a 30-token prompt and 10 tokens of their own: 31 + 80 tokens, not 8 x 41."""
    prompt = (1, *tokens(30))
    rows = [make_row(make_sample(uid=i, context=prompt, response=tokens(10, 9 + i)), 0.5 - i) for i in range(8)]
    widths = {}
    for layout in ("flat", "trees"):
        on, seen = probe(kind, "plain", layout), []
        on.learner.plan.tokens_per_micro_batch = 10_000
        hook = on.model.get_input_embeddings().register_forward_hook(lambda _, x, __, seen=seen: seen.append(x[0]))
        on.update(rows, grpo())
        hook.remove()
        widths[layout] = [tuple(x.shape) for x in seen]
    assert widths == {"flat": [(8, 41)], "trees": [(1, 31 + 80)]}


def test_a_learner_that_may_not_share_does_not():
    model = tiny("qwen3")
    learner = Probe(model, share_prefixes=False).learner
    assert learner._costs == {} and model.config._attn_implementation == "sdpa"


# ---- which models ------------------------------------------------------------------------------

FLAT = {"Mistral", "Gemma2", "Gemma3", "Olmo3"}  # windows of 5 tokens; Gemma 2 caps its scores, too


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_which_architectures_share(name):
    model = build(name)
    before = model.config._attn_implementation
    assert shares_prefixes(model) is (name not in FLAT)
    assert model.config._attn_implementation == (before if name in FLAT else "mulligan")
    costs = layer_costs(model)
    assert costs.width == model.config.num_attention_heads * getattr(model.config, "head_dim", 12)
    assert costs.token > 2 * 3 * 24 * 40  # the three projections of the MLP at least


@pytest.mark.parametrize("size", [11, 68, 50_000])
def test_the_trial_has_a_branch_below_a_branch(size):
    rows = _trial(size)
    trees = plant(rows)
    (first, second) = trees.branches().shared
    assert first[1] == second[0] < second[2] <= first[2] and len(trees.tokens) < sum(map(len, rows))
    assert [node.parent for node in trees.nodes].count(None) == 2
    assert max(map(len, rows)) < 32


def test_a_window_beyond_every_row_is_none(monkeypatch):
    for window in (127, 128):  # max_position_embeddings is 128
        monkeypatch.setitem(ARCHITECTURES, "Mistral", {"sliding_window": window})
        assert shares_prefixes(build("Mistral")) is (window == 128)


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_a_model_that_does_not_do_what_it_says_reads_whole_rows(kind):
    """One that drops the positions that it is given; one that looks past its mask."""
    model = tiny(kind)
    right = model.base_model.forward

    @functools.wraps(right)
    def without_positions(*args, position_ids=None, **more):
        return right(*args, **more)

    assert shares_prefixes(model)
    if kind == "qwen3":
        model.set_attn_implementation("sdpa")
    model.base_model.forward = without_positions
    assert not shares_prefixes(model)
    assert model.config._attn_implementation == "sdpa"

    @functools.wraps(right)
    def without_mask(*args, attention_mask=None, **more):
        return right(*args, **more)

    model.base_model.forward = without_mask
    assert not shares_prefixes(model)
    model.base_model.forward = right
    assert shares_prefixes(model)


def test_what_is_saved_says_nothing_of_it(tmp_path):
    model = tiny("qwen3")
    assert shares_prefixes(model) and model.config._attn_implementation == "mulligan"
    model.save_pretrained(tmp_path)
    assert "mulligan" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))

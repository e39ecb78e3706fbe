"""The kernels of one decoding step against float64, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.native.decode import Columns, DecodeKernels
from tests.helpers import needs_compiler

pytestmark = needs_compiler

several = settings(max_examples=60, deadline=None, derandomize=True)
NEAR = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


@several
@given(
    dtype=dtypes,
    size=st.sampled_from([2, 8, 24, 32, 40, 64, 96, 128]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    own=st.lists(st.integers(0, 35), min_size=1, max_size=7),
    normed=st.booleans(),
    place=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_attention_of_a_step(dtype, size, heads, lengths, own, normed, place, seed):
    """Padding holds NaN, which would be noticed; so does what lies behind the columns in use."""
    (queries, shared), rows, (first, room) = heads, len(own), place
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    q, k, v = normal(rows, queries * size), normal(rows, shared * size), normal(rows, shared * size)
    norms = (normal(size).abs() + 0.5, normal(size).abs() + 0.5) if normed else (None, None)
    angles = torch.randn(rows, size // 2, generator=random)
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (angles.cos(), angles.sin()))
    column, long = first + max(own), max(lengths)
    cache = [torch.full((rows + 2, shared, column + 1 + room, size), torch.nan, dtype=dtype) for _ in range(2)]
    prompts = [torch.full((len(lengths), shared, first + long + room, size), torch.nan, dtype=dtype) for _ in range(2)]
    pads = torch.tensor([max(own) - n for n in own])
    prompt_pads = torch.tensor([long - n for n in lengths])
    of = torch.tensor([(seed + row) % len(lengths) for row in range(rows)])
    for buffer in cache:
        for row, n in enumerate(own):
            buffer[row, :, column - n : column] = normal(shared, n, size)
    for buffer in prompts:
        for row, n in enumerate(lengths):
            buffer[row, :, first + long - n : first + long] = normal(shared, n, size)
    exact = [x.double() for x in (q, k, v, cos, sin)]
    before = [buffer.clone() for buffer in cache]

    found = DecodeKernels(dtype).attend(
        q,
        k,
        v,
        norms,
        1e-6,
        cos,
        sin,
        Columns(*cache, first, column + 1),
        Columns(*prompts, first, first + long),
        (of.argsort(), of, prompt_pads, pads),
        0.7 * size**-0.5,
    )

    wide = [None if norm is None else norm.double() for norm in norms]
    asked, told = (
        turned(rms(x.view(rows, -1, size), norm, 1e-6), *exact[3:]) for x, norm in zip(exact[:2], wide, strict=True)
    )
    for row, (n, prompt) in enumerate(zip(own, of.tolist(), strict=True)):
        keys, values = (
            torch.cat(
                [
                    above[prompt, :, first + long - lengths[prompt] : first + long].double(),
                    mine[row, :, column - n : column].double(),
                    new[row].double().view(shared, 1, size),
                ],
                1,
            ).repeat_interleave(queries // shared, 0)
            for above, mine, new in zip(prompts, before, (told, exact[2]), strict=True)
        )
        weights = (0.7 * size**-0.5 * (keys @ asked[row][:, :, None])[..., 0]).softmax(-1)
        right = (weights[:, None] @ values)[:, 0]
        torch.testing.assert_close(found[row].view(queries, size).double(), right, rtol=0, atol=4 * NEAR[dtype])
        torch.testing.assert_close(cache[0][row, :, column].double(), told[row], rtol=NEAR[dtype], atol=NEAR[dtype])
        assert torch.equal(cache[1][row, :, column].flatten(), v[row])
    for buffer, was in zip(cache, before, strict=True):  # nothing else is written
        buffer[:rows, :, column] = was[:rows, :, column]
        assert torch.equal(buffer.nan_to_num(7.0), was.nan_to_num(7.0))


@several
@given(dtype=dtypes, shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 16, 48, 130])), seed=st.integers(0, 99))
def test_sums_and_norms(dtype, shape, seed):
    random, kernels = torch.Generator().manual_seed(seed), DecodeKernels(dtype)
    x, h = (torch.randn(*shape, generator=random).to(dtype) for _ in range(2))
    weight, its = (torch.rand(shape[1], generator=random).to(dtype) + 0.5 for _ in range(2))
    for added, added_norm in ((None, None), (h, None), (h, its)):
        total, found = kernels.add_norm(x, added, added_norm, weight, 1e-5)
        right = x.double()
        if added is not None:
            right = right + rms(added.double(), None if added_norm is None else its.double(), 1e-5)
        torch.testing.assert_close(total.double(), right, rtol=NEAR[dtype], atol=NEAR[dtype])
        normed = rms(total.double(), weight.double(), 1e-5)
        torch.testing.assert_close(found.double(), normed, rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR)
def test_gates(dtype):
    """From where silu is 0 to where it is its argument, and what is no number."""
    gate = torch.tensor([-200.0, -88.5, -87.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 87.0, 200.0]).to(dtype)
    up = torch.linspace(-2, 3, len(gate)).to(dtype)
    found = DecodeKernels(dtype).gated(gate[None], up[None])[0]
    right = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(found.double(), right, rtol=NEAR[dtype] / 4, atol=1e-30)
    bad = torch.tensor([[torch.nan, 1.0]]).to(dtype)
    assert DecodeKernels(dtype).gated(bad, torch.ones_like(bad)).isnan().tolist() == [[True, False]]


def test_rows_and_threads_change_nothing():
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(700, 96, generator=random), torch.rand(96, generator=random)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = DecodeKernels(torch.float32)
    finally:
        torch.set_num_threads(threads)
    alone = [DecodeKernels(torch.float32).add_norm(row[None], None, None, weight, 1e-6)[1] for row in x]
    assert torch.equal(both.add_norm(x, None, None, weight, 1e-6)[1], torch.cat(alone))
    assert torch.equal(both.gated(x, x)[:1], DecodeKernels(torch.float32).gated(x[:1], x[:1]))

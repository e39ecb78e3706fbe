from __future__ import annotations

import math

import torch

from mulligan.sampling import embedded
from mulligan.sampling.embedded import draw
from mulligan.seeds import uniforms

LARGEST = 1 - 2.0**-53  # what `uniforms` can return at most


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_intervals_of_the_inverse():
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log().expand(6, 4)
    token, logprob = draw(logits, torch.ones(6), double(1e-9, 0.2499, 0.2501, 0.7499, 0.7501, 0.8751))
    assert token.tolist() == [0, 0, 1, 1, 2, 3]
    assert torch.allclose(logprob.exp(), torch.tensor([0.25, 0.25, 0.5, 0.5, 0.125, 0.125]))


def test_impossible_tokens_are_never_drawn():
    impossible = -math.inf
    logits = torch.tensor([[impossible, 0.0, 0.0, impossible], [impossible, -200.0, 0.0, -200.0]])
    for u, expected in ((2.0**-53, [1, 2]), (LARGEST, [2, 2])):
        token, logprob = draw(logits, torch.ones(2), double(u, u))
        assert token.tolist() == expected
        assert logprob.isfinite().all()


def test_the_largest_uniform_stays_in_a_large_vocabulary():
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    token, _ = draw(logits, torch.ones(8), torch.full((8,), LARGEST, dtype=torch.float64))
    assert token.max() < 50_000
    assert (logits.gather(1, token[:, None]) > -math.inf).all()


def test_a_threshold_at_the_total_is_safe():
    logits = torch.randn(2000, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 6:] = -math.inf
    token, _ = draw(logits, torch.ones(2000), torch.ones(2000, dtype=torch.float64))
    assert (token == 5).all()


def test_zero_temperature_is_the_first_maximum_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    for temperature in (torch.zeros(2), torch.tensor([0.0, 0.5])):
        token, logprob = draw(logits, temperature, double(0.9, 0.9))
        assert token[0] == 1
        assert torch.equal(logprob[0], logits.log_softmax(-1)[0, 1])
    assert draw(logits, torch.zeros(2), double(0.9, 0.9))[0].tolist() == [1, 0]
    assert draw(logits, torch.tensor([0.0, 0.5]), double(0.9, 0.9))[0].tolist() == [1, 3]


def test_blocks_do_not_change_anything(monkeypatch):
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    u = uniforms(torch.arange(7), torch.zeros(7, dtype=torch.long))
    whole = draw(logits, torch.ones(7), u)
    monkeypatch.setattr(embedded, "_DRAW_NUMBERS", 22)
    assert all(torch.equal(a, b) for a, b in zip(whole, draw(logits, torch.ones(7), u), strict=True))


def test_not_a_number_gives_a_token_in_range():
    token, logprob = draw(torch.full((2, 5), math.nan), torch.tensor([1.0, 0.5]), double(0.5, LARGEST))
    assert token.max() < 5 and token.min() >= 0
    assert logprob.isnan().all()

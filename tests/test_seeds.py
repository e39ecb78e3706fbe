"""Counter-based randomness: pure, in range, uniform, and different wherever a label is."""

from __future__ import annotations

import hashlib

import torch

from mulligan.seeds import rng_of, seed_of, uniforms

LARGEST = 2**63 - 1


def test_uniforms_are_strictly_inside():
    seeds = torch.tensor([0, 1, LARGEST, -1, -(2**63), 12345])[:, None].expand(-1, 2000)
    drawn = uniforms(seeds, torch.arange(2000).expand_as(seeds))
    assert drawn.dtype == torch.float64 and drawn.shape == seeds.shape
    assert float(drawn.min()) > 0 and float(drawn.max()) < 1
    # The ends of the range themselves: 52 bits of 0 and of 1.
    bits = torch.tensor([0, (1 << 52) - 1])
    low, high = ((bits.double() + 0.5) * 2.0**-52).tolist()
    assert low > 0 and high < 1


def test_uniforms_are_splitmix64():
    """By Python's integers, with a seed and a counter that wrap around."""

    def one(seed: int, counter: int) -> float:
        mask = (1 << 64) - 1
        x = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        return ((x >> 12) + 0.5) * 2.0**-52

    pairs = [(s, c) for s in (0, 1, LARGEST, seed_of("a")) for c in (0, 1, 2, 77, 10**6)]
    drawn = uniforms(torch.tensor([s for s, _ in pairs]), torch.tensor([c for _, c in pairs]))
    assert drawn.tolist() == [one(s, c) for s, c in pairs]


def test_uniforms_are_pure():
    seeds = torch.tensor([seed_of(i) for i in range(50)])
    counters = torch.arange(50)
    drawn = uniforms(seeds, counters)
    torch.manual_seed(1)
    assert torch.equal(uniforms(seeds, counters), drawn)
    order = torch.randperm(50)
    assert torch.equal(uniforms(seeds[order], counters[order]), drawn[order])
    assert torch.equal(torch.stack([uniforms(s, c) for s, c in zip(seeds, counters, strict=True)]), drawn)
    assert torch.equal(seeds, torch.tensor([seed_of(i) for i in range(50)]))  # left as they were


def test_uniforms_are_uniform_along_tokens_and_along_samples():
    """Twenty bins of 1,000; a fair share strays by 5 standard deviations about once in 100,000 runs, and the
    numbers are fixed anyway."""
    sigma = (20_000 * 0.05 * 0.95) ** 0.5
    along_tokens = uniforms(torch.full((20_000,), seed_of("x")), torch.arange(20_000))
    along_samples = uniforms(torch.tensor([seed_of("y", i) for i in range(20_000)]), torch.zeros(20_000).long())
    for drawn in (along_tokens, along_samples):
        counts = torch.histc(drawn, bins=20, min=0.0, max=1.0)
        assert float((counts - 1000).abs().max()) < 5 * sigma
        assert abs(float(drawn.mean()) - 0.5) < 0.01
        neighbours = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
        assert abs(float(neighbours)) < 0.03


def test_neighbouring_seeds_are_unrelated():
    counters = torch.arange(5000)
    one, two = (uniforms(torch.full((5000,), seed), counters) for seed in (41, 42))
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.06


def test_seeds_depend_on_every_label_its_type_and_its_place():
    labels = [
        (),
        (0,),
        ("0",),
        (0, 0),
        (0, 1),
        (1, 0),
        ("01",),
        ("0", "1"),
        (10,),
        (1, "0"),
        ("sample", 1),
        ("pass", 1),
        ("", ""),
        ("",),
    ]
    seeds = [seed_of(*label) for label in labels]
    assert len(set(seeds)) == len(labels)
    assert all(0 <= seed <= LARGEST for seed in seeds)


def test_seeds_are_the_same_on_every_machine():
    digest = hashlib.blake2b(b"int:0\x1fstr:sample\x1fint:1", digest_size=8).digest()
    assert seed_of(0, "sample", 1) == int.from_bytes(digest, "big") % 2**63


def test_seeds_do_not_collide():
    assert len({seed_of(step, problem) for step in range(100) for problem in range(100)}) == 10_000


def test_rng_of_is_fresh_each_time():
    assert [rng_of("a", 1).random() for _ in range(3)] == [rng_of("a", 1).random()] * 3
    assert rng_of("a", 1).random() != rng_of("a", 2).random()

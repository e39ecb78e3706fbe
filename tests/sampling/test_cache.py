from __future__ import annotations

import torch

from mulligan.sampling.cache import GrowingCache
from mulligan.seeds import rng_of


def states(rows, new, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, new, 4, generator=generator), torch.randn(rows, 2, new, 3, generator=generator)


def test_update_appends_and_survives_growth():
    cache = GrowingCache(room=2)
    pieces = [states(3, new, seed) for seed, new in enumerate((5, 1, 1, 1, 4, 1))]
    for keys, values in pieces:
        all_keys, all_values = cache.update(keys, values, 0)
    assert torch.equal(all_keys, torch.cat([k for k, _ in pieces], 2))
    assert torch.equal(all_values, torch.cat([v for _, v in pieces], 2))
    assert cache.get_seq_length() == 13
    assert cache.get_mask_sizes(1, 0) == (14, 0)


def test_a_token_is_written_in_place():
    cache = GrowingCache(room=8)
    first, _ = cache.update(*states(2, 3, 0), 0)
    then, _ = cache.update(*states(2, 1, 1), 0)
    assert first.data_ptr() == then.data_ptr()


def test_slots_appear_on_demand():
    cache = GrowingCache()
    cache.update(*states(2, 3, 0), 4)  # a looped model's slots are not its layers
    assert len(cache) == 5
    assert (cache.get_seq_length(4), cache.get_seq_length(3), cache.get_seq_length(7)) == (3, 0, 0)


def test_admit_copies_rows():
    cache, forked = GrowingCache(room=0), GrowingCache(room=1)
    keys, values = states(2, 3, 0)
    cache.update(keys, values, 0)
    index = torch.tensor([0, 0, 1, 0])
    forked.admit([(cache, index)])
    more = states(4, 1, 1)
    all_keys, all_values = forked.update(*more, 0)
    assert torch.equal(all_keys, torch.cat([keys[index], more[0]], 2))
    assert torch.equal(all_values, torch.cat([values[index], more[1]], 2))
    assert torch.equal(cache.layers[0].keys, keys)  # the original is untouched


def test_admit_pads_shorter_caches_on_the_left_with_zeros():
    short, long = GrowingCache(room=0), GrowingCache(room=3)
    short.update(*states(2, 2, 0), 0)
    long.update(*states(1, 5, 1), 0)
    joined = GrowingCache()
    joined.admit([(short, torch.tensor([1, 1])), (long, torch.tensor([0]))])
    keys = joined.layers[0].keys
    assert keys.shape == (3, 2, 5, 4)
    assert keys[:2, :, :3].abs().max() == 0
    assert torch.equal(keys[0, :, 3:], states(2, 2, 0)[0][1])
    assert torch.equal(keys[2], states(1, 5, 1)[0][0])


def test_rows_join_leave_and_columns_go_as_in_a_model_of_lists():
    """Against rows kept as separate tensors, over random histories of everything a sampler does."""
    for seed in range(20):
        draw = rng_of("cache", seed)
        cache, rows, used = GrowingCache(room=draw.choice((0, 1, 5))), [], 0
        for step in range(60):
            new, length = draw.randint(1, 3), draw.randint(1, 9)
            what = draw.random() if rows else 0.0
            if what < 0.25 and len(rows) < 9:
                source = GrowingCache(room=0)
                keys, values = states(2, length, 1000 * seed + step)
                source.update(keys, values, 0)
                index = [draw.randrange(2) for _ in range(new)]
                cache.admit([(source, torch.tensor(index))])
                rows += [keys[i] for i in index]
                used = max(used, length)
            elif what < 0.4:
                kept = draw.sample(range(len(rows)), draw.randint(1, len(rows)))
                cache.keep(torch.tensor(kept))
                rows = [rows[i] for i in kept]
                unused = used - max(row.shape[1] for row in rows)
                cache.drop(unused)
                used -= unused
            else:
                keys, values = states(len(rows), 1, 1000 * seed + step)
                cache.update(keys, values, 0)
                rows = [torch.cat([row, k], 1) for row, k in zip(rows, keys, strict=True)]
                used += 1
            there = cache.layers[0].keys
            assert cache.get_seq_length() == there.shape[2] == used
            assert len(there) == len(rows)
            assert there.isfinite().all() and cache.layers[0].values.isfinite().all()
            for row, expected in zip(there, rows, strict=True):
                assert torch.equal(row[:, used - expected.shape[1] :], expected)


def test_keep_drops_and_moves_rows_then_grows():
    cache = GrowingCache(room=1)
    keys, values = states(5, 3, 0)
    for slot in (0, 1):
        cache.update(keys, values, slot)
    index = torch.tensor([0, 4, 2])  # rows 1 and 3 have finished; 4 fills a hole
    cache.keep(index)
    for slot in (0, 1):
        assert torch.equal(cache.layers[slot].keys, keys[index])
        assert torch.equal(cache.layers[slot].values, values[index])
    kept = keys[index]
    for seed in (1, 2, 3):
        more = states(3, 1, seed)
        kept = torch.cat([kept, more[0]], 2)
        assert torch.equal(cache.update(*more, 0)[0], kept)


def test_keep_takes_any_order():
    cache = GrowingCache()
    keys, values = states(4, 3, 0)
    cache.update(keys, values, 0)
    cache.keep(torch.tensor([1, 0, 3, 2]))  # sources that are targets too
    assert torch.equal(cache.layers[0].keys, keys[[1, 0, 3, 2]])

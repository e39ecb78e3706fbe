"""What prompts share is computed once, and nothing else changes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.sampling import prefill
from mulligan.sampling.cache import GrowingSlot
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.prefill import Part, common_length, continued, groups, stems
from mulligan.sampling.prompts import Prompts
from tests.sampling.helpers import ask, collect
from tests.sampling.test_embedded import contexts

SHORT = st.lists(st.integers(0, 2), max_size=7).map(tuple)


@given(SHORT, SHORT)
def test_common_length(a, b):
    length = common_length(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


@given(st.lists(SHORT.filter(len), max_size=8), st.lists(SHORT.filter(len), max_size=8, unique=True))
def test_a_prompt_goes_on_from_the_one_it_has_most_in_common_with(prompts, stored):
    least, prefill._SHARED = prefill._SHARED, 1
    try:
        parts = continued(prompts, stored)
    finally:
        prefill._SHARED = least
    for part, prompt in zip(parts, prompts, strict=True):
        best = max((common_length(prompt, each) for each in stored), default=0)
        # Its last token is always computed, since the next is drawn from what comes out of it.
        assert part.prompt == prompt
        assert part.common == min(best, len(prompt) - 1)
        assert not part.common or prompt[: part.common] == stored[part.source][: part.common]


def test_stems_by_hand():
    long, other = tuple(range(100)), tuple(range(50, 90))
    few_shot = [(*long, 1, 2), (*long, 1, 3, 4), (*long, 7), (*long, 8)]
    assert stems([(9, 9), *few_shot, (5,)]) == [long]  # 3 x 100 tokens are saved
    assert stems(few_shot[:2]) == []  # 101 tokens are too few
    assert stems([(*other, i) for i in range(8)]) == [other]  # 7 x 40
    assert stems([(*other, i) for i in range(7)]) == []  # 6 x 40 are 240
    assert stems([]) == stems([long]) == []


def test_groups_by_hand():
    parts = [Part(tuple(range(n))) for n in (5, 3, 9, 12)] + [
        Part(tuple(range(40)), 0, 30),
        Part(tuple(range(19)), 1, 16),
    ]
    found = [[len(part.rest) for part in group] for group in groups(parts)]
    assert found == [[3, 5], [9, 12], [3], [10]]  # nothing is padded to over twice itself


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_any_tree_of_prompts_gives_the_states_of_prompts_alone(qwen, looped, tokenizer, seed):
    """Random prompts that begin like stored ones or like each other, in two lots; keys, values and logits."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    every: list[tuple[int, ...]] = []
    for _ in range(7):
        begin = every[number(0, len(every))][: number(0, 30)] if every and number(0, 3) else ()
        every.append(begin + tuple(number(3, 29) for _ in range(number(1, 20))))
    every = list(dict.fromkeys(every))
    model = (qwen, looped)[seed % 2]
    sampler, prompts = EmbeddedSampler(model, tokenizer), Prompts()
    before = prefill._SHARED, prefill._SAVED
    prefill._SHARED, prefill._SAVED = 2, 4
    try:
        with torch.no_grad():
            sampler._compute(prompts, sorted(every[:4], key=len))
            sampler._compute(prompts, sorted(every[4:], key=len))
    finally:
        prefill._SHARED, prefill._SAVED = before
    assert prompts.after is not None
    assert len(set(prompts.tokens)) == len(prompts.tokens)
    assert sampler.stats["prefill_tokens"] <= sum(map(len, prompts.tokens))
    pads = prompts.pads(torch.device("cpu")).tolist()
    for prompt in every:
        alone, i = Prompts(), prompts.tokens.index(prompt)
        with torch.no_grad():
            sampler._compute(alone, [prompt])
        assert alone.after is not None
        assert torch.allclose(prompts.after.logits[i], alone.after.logits[0], atol=1e-4, rtol=0)
        for mine, its in zip(prompts.cache.layers, alone.cache.layers, strict=True):
            assert isinstance(mine, GrowingSlot)
            assert isinstance(its, GrowingSlot)
            for one, two in zip(mine.states(), its.states(), strict=True):
                assert torch.allclose(one[i, :, pads[i] :], two[0], atol=1e-4, rtol=0)


def test_a_reset_goes_on_from_its_prompt(model, tokenizer):
    """30 tokens of prompt are computed once for the fresh samples and both continuations."""
    (context,) = contexts(30)
    sampler = EmbeddedSampler(model, tokenizer, max_new_tokens=6)
    sampler._eos = sampler._eos[:0]
    done = []

    def on_done(request, completions):
        done.append(completions)
        if request.prefix:
            return ()
        return [ask(context, 2, seed=i, prefix=completions[0].tokens[: 3 + i]) for i in range(2)]

    sampler.run([ask(context, 4)], on_done)
    # The first continuation computes its 3 tokens, and so does the second with its 4, in the same pass.
    assert sampler.stats["prefill_tokens"] == 30 + 3 + 4
    assert len(done) == 3
    (alone,) = collect(EmbeddedSampler(model, tokenizer, max_new_tokens=6), [ask(context, 4)])
    assert alone[0].tokens[:3] == done[0][0].tokens[:3]

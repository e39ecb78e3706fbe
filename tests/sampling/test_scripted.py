from __future__ import annotations

import pytest

from mulligan.errors import UserError
from mulligan.sampling import Sampler
from mulligan.sampling.scripted import LOGPROB, ScriptedSampler
from tests.sampling.helpers import ask, collect


def test_callable_script(tokenizer):
    sampler = ScriptedSampler(tokenizer, lambda request, attempt: "ab" if attempt == 0 else ("abc", "length"))
    assert isinstance(sampler, Sampler)
    ((stopped, cut),) = collect(sampler, [ask([5], n=2)])
    assert stopped.tokens == (*tokenizer.encode("ab"), tokenizer.eos_token_id)
    assert stopped.behavior_logprobs == (LOGPROB,) * 3
    assert (stopped.finish, cut.finish) == ("stop", "length")
    assert cut.tokens == tuple(tokenizer.encode("abc"))


def test_lines_are_used_up_in_the_order_of_asking(tokenizer):
    sampler = ScriptedSampler(tokenizer, {"toy/test/0": ["a", "b", "c"], "toy/test/1": ["d"]})
    texts = []

    def on_done(request, completions):
        texts.append([tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions])
        return [ask([6], index=0)] if request.problem.index == 0 and request.n == 2 else []

    sampler.run([ask([5], n=2, index=0), ask([5], index=1)], on_done)
    assert texts == [["a", "b"], ["d"], ["c"]]
    assert [r.problem.index for r in sampler.requests] == [0, 1, 0]


def test_missing_lines_and_bad_finish(tokenizer):
    with pytest.raises(UserError, match="1 lines for toy/test/0"):
        collect(ScriptedSampler(tokenizer, {"toy/test/0": ["a"]}), [ask([5], n=2)])
    with pytest.raises(UserError, match="eos"):
        collect(ScriptedSampler(tokenizer, lambda r, a: ("a", "eos")), [ask([5])])

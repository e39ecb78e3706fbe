from __future__ import annotations

import pytest
import torch

from mulligan.sampling.stops import StopFinder
from tests.sampling.helpers import byte_tokenizer, character_tokenizer


def first_end(tokenizer, stops, ids):
    """The number of tokens after which the finder stops, as a sampler asks it."""
    finder = StopFinder(tokenizer, stops, len(tokenizer))
    for end in range(1, len(ids) + 1):
        last = torch.tensor(ids[end - 1 : end])
        if bool(finder.may_end(last)) and finder.ends(ids[max(0, end - finder.window) : end]):
            return end
    return None


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (("cd",), "abcdef", 4),
        (("e", "cd"), "abcdef", 4),
        (("dc",), "abcdef", None),
        (("a",), "abcdef", 1),
        ((" ",), "ab cd", 3),
        (("d<end>",), "abd<end>ef", 4),  # special tokens count as text
        (("<eos>",), "ab<eos>", 3),
        (("a much longer one",), "this is a much longer one", 25),
    ],
)
def test_ends_where_the_text_first_contains_a_stop_string(stops, text, expected):
    tokenizer = character_tokenizer()
    assert first_end(tokenizer, stops, tokenizer.encode(text)) == expected


@pytest.mark.parametrize(("stop", "text"), [("é", "caféteria"), ("→ x", "a → x"), ("日本", "こ日本語")])
def test_characters_of_several_tokens(stop, text):
    tokenizer = byte_tokenizer()
    expected = len(text[: text.index(stop) + len(stop)].encode())
    assert first_end(tokenizer, (stop,), tokenizer.encode(text)) == expected


def test_most_tokens_are_never_looked_at():
    tokenizer = character_tokenizer()
    finder = StopFinder(tokenizer, ("xyz", "q"), len(tokenizer))
    every = torch.arange(len(tokenizer))
    assert finder.may_end(every).nonzero().squeeze(1).tolist() == tokenizer.encode("qz")

"""The character tokenizer: ids that never move, and text that comes back exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mulligan.models.tokenizer import ALPHABET, BOXED, pico_tokenizer

TOKENIZER = pico_tokenizer()
texts = st.lists(st.one_of(st.sampled_from(ALPHABET), st.just(BOXED))).map("".join)


def test_ids_are_frozen():
    # Shipped weights depend on every one of these.
    assert [TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id] == [0, 1, 2]
    assert TOKENIZER.encode(BOXED + "0a") == [3, 4, 14]
    assert TOKENIZER.encode(" \n") == [65, 66]
    assert (TOKENIZER.unk_token_id, len(TOKENIZER)) == (67, 68)
    assert len(set(ALPHABET)) == len(ALPHABET) == 63


@given(texts)
def test_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode([1, *ids, 2, 0], skip_special_tokens=True) == text
    assert len(ids) == len(text.replace(BOXED, "?"))
    assert TOKENIZER.encode(text, add_special_tokens=False) == ids


@given(texts, texts)
def test_tokens_do_not_merge(left, right):
    assert TOKENIZER.encode(left + right) == TOKENIZER.encode(left) + TOKENIZER.encode(right)


def test_unknown_characters():
    assert TOKENIZER.encode("aZ\\") == [14, 67, 67]
    assert TOKENIZER.decode([14, 67]) == "a<unk>"
    assert TOKENIZER.encode("\\boxed") == [67, *TOKENIZER.encode("boxed")]


def test_text_cannot_forge_special_tokens():
    assert not {0, 1, 2} & set(TOKENIZER.encode("<eos><bos><pad>"))


def test_batches():
    assert TOKENIZER.model_input_names == ["input_ids", "attention_mask"]
    batch = TOKENIZER(["12", "3"], padding=True)
    assert batch["input_ids"] == [[5, 6], [0, 7]]
    assert batch["attention_mask"] == [[1, 1], [0, 1]]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(texts)
def test_saved_and_loaded(reloaded, text):
    text += "<eos>"
    assert reloaded.encode(text) == TOKENIZER.encode(text)
    assert reloaded.decode(reloaded.encode(text)) == text


def test_saved_attributes(reloaded):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "padding_side", "model_input_names"):
        assert getattr(reloaded, name) == getattr(TOKENIZER, name)

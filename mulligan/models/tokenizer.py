"""The character tokenizer of the pico models."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2
BOXED = r"\boxed{"  # one token, so that opening an answer is one decision
ALPHABET = string.digits + string.ascii_lowercase + "TFB" + "+-*/,;:=?!@()&|<>~^}.# \n"
UNKNOWN = "<unk>"


def pico_tokenizer() -> PreTrainedTokenizerFast:
    r"""A tokenizer with one token a character, and ``\boxed{`` as a single token.

    Ids: ``<pad>`` 0, ``<bos>`` 1, ``<eos>`` 2, ``\boxed{`` 3, then the characters of ``ALPHABET`` in
    order, then ``<unk>`` for anything else. Nothing is added on encoding, and
    ``decode(encode(text)) == text`` for every text over the alphabet.
    """
    tokens = (*SPECIAL, BOXED, *ALPHABET, UNKNOWN)
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    # Not a dot, because a newline is a character too.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # the default would put a space between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",  # as generation needs it
        split_special_tokens=True,  # a model that writes out "<eos>" must not forge the token
    )

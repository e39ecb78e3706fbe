"""Tokenizers and models without files, and short ways to ask a sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mulligan.seeds import seed_of
from mulligan.types import Completion, Problem, Request

SPECIAL = ("<pad>", "<eos>", "<end>")


SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(model, config, **sizes):
    """A model with random weights large enough that its greedy texts do not repeat themselves at once."""
    torch.manual_seed(3)
    net = model(config(**(SIZES | sizes)))
    with torch.no_grad():
        net.get_output_embeddings().weight.normal_(0.0, 0.35)
        net.get_input_embeddings().weight.normal_(0.0, 1.0)
    return net.eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """26 letters and a space after three special tokens: 31 tokens with ``<unk>``."""
    tokens = (*SPECIAL, *"abcdefghijklmnopqrstuvwxyz ", "<unk>")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<end>"]
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that a character may need several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ask(context: Sequence[int], n: int = 1, *, index: int = 0, seed: int = 0, **fields) -> Request:
    """A request with n seeds that are derived from ``seed``."""
    problem = Problem(task="toy", split="test", index=index, prompt="", answer="")
    seeds = tuple(seed_of(seed, attempt) for attempt in range(n))
    return Request(problem=problem, group=index, n=n, context=tuple(context), **({"seeds": seeds} | fields))


def collect(sampler, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """The completions of each request, in the order given; checks that each is done exactly once."""
    done: dict[int, tuple[Completion, ...]] = {}

    def on_done(request, completions):
        assert id(request) not in done
        done[id(request)] = tuple(completions)
        return ()

    sampler.run(requests, on_done)
    return [done[id(request)] for request in requests]


def drawn(sampler, requests: Sequence[Request]) -> list[list[tuple[int, ...]]]:
    """Only the tokens of :func:`collect`."""
    return [[completion.tokens for completion in group] for group in collect(sampler, requests)]

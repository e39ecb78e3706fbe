"""Models whose work is known beforehand, for the benchmarks: Qwen3 with random weights and a given response length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS, UNK = range(3)
WORDS = 500  # tokens beside those, where a work does not say
HEAD = 32  # width of an attention head


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row of a table: the model, the prompts and how long the responses are."""

    name: str
    goal: float  # the ratio of times that is wanted
    width: int = 128
    layers: int = 4
    prompts: int = 32
    samples: int = 8  # of each prompt
    prompt: int = 16  # tokens
    new: int = 64  # tokens of a response at most
    vocabulary: int = UNK + 1 + WORDS  # tokens
    mean: int | None = None  # of a response without the limit; None: each has ``new`` tokens
    precisions: tuple[str, ...] = ("float32",)

    @property
    def words(self) -> int:
        """Tokens beside padding, EOS and unknown."""
        return self.vocabulary - UNK - 1


def make_model(work: Work, folder: Path) -> int:
    """Saves a model that ends a response with probability 1 / mean after each token, or never; its parameters' number.

    Channel 0 of the residual stream is 1 from the embedding on, because no layer writes to it, and the final norm
    divides it by a root mean square that hardly varies. The head reads the logits of EOS and of the padding from this
    channel alone, and those of the words from the others.
    """
    torch.manual_seed(0)
    tokens = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(work.words))])}
    inner = Tokenizer(models.WordLevel(tokens, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=work.width,
        intermediate_size=3 * work.width,
        num_hidden_layers=work.layers,
        num_attention_heads=work.width // HEAD,
        num_key_value_heads=work.width // HEAD,
        head_dim=HEAD,
        max_position_embeddings=max(2048, work.prompt + work.new),
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        layers: Any = model.model.layers
        for layer in layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[PAD, EOS]] = 0.0
        states = model.model(torch.arange(EOS + 1, min(len(tokens), UNK + 1 + WORDS))[None]).last_hidden_state[0]
        # Log of the summed weights of all words, behind some of them; EOS at this much minus log(mean - 1) has
        # probability 1 / mean.
        total = (states @ model.lm_head.weight[UNK:].T).logsumexp(-1).mean()
        unit = states[:, 0].mean()
        model.lm_head.weight[PAD, 0] = -20.0 / unit
        ends = -20.0 if work.mean is None else float(total) - math.log(work.mean - 1)
        model.lm_head.weight[EOS, 0] = ends / unit
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_prompts(work: Work) -> list[tuple[int, ...]]:
    """Distinct random prompts of words."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(UNK + 1, work.vocabulary, (work.prompts, work.prompt), generator=generator)
    return [tuple(row) for row in words.tolist()]

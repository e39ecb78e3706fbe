"""A checkpoint laid out as the published Ouro ones are, at any size, with random weights.

Sources: arXiv 2510.25741, the published model cards, ``configuration_ouro.py`` and the list of 533 tensors of the
2.6B model. Nothing here uses the package, so that the layout is checked and not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REMOTE = 'raise RuntimeError("remote code of the checkpoint was run")\n'


def config(layers: int = 24, **sizes: Any) -> dict[str, Any]:
    """``config.json`` with every key of the published one; the sizes are those of the 1.4B model."""
    return {
        "architectures": ["OuroForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_ouro.OuroConfig",
            "AutoModel": "modeling_ouro.OuroModel",
            "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
        },
        "bos_token_id": 0,
        "early_exit_threshold": 1.0,
        "eos_token_id": 0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 65536,
        "max_window_layers": layers,
        "model_type": "ouro",
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "num_key_value_heads": 16,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "total_ut_steps": 4,
        "transformers_version": "4.55.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 49152,
        **sizes,
    }


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the files."""
    d, ffn = c["hidden_size"], c["intermediate_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (queries, d),
            "self_attn.k_proj": (keys, d),
            "self_attn.v_proj": (keys, d),
            "self_attn.o_proj": (d, queries),
            "mlp.gate_proj": (ffn, d),
            "mlp.up_proj": (ffn, d),
            "mlp.down_proj": (d, ffn),
            "input_layernorm": (d,),
            "input_layernorm_2": (d,),
            "post_attention_layernorm": (d,),
            "post_attention_layernorm_2": (d,),
        }
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    out["model.norm.weight"] = (d,)
    out["model.early_exit_gate.weight"] = (1, d)
    out["model.early_exit_gate.bias"] = (1,)
    out["lm_head.weight"] = (c["vocab_size"], d)
    return out


def small(kv_heads: int = 4) -> dict[str, Any]:
    """The published config with small sizes; room in the vocabulary beyond the tokenizer's, as there."""
    sizes = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    return config(2, **sizes, intermediate_size=44, vocab_size=272, max_position_embeddings=512)


def write(folder: Path, c: dict[str, Any], *, files: int = 1, seed: int = 0) -> Path:
    """The whole directory: config, bfloat16 weights in one or several files, tokenizer, and code that must not run."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(c).items():
        scale = 0.3 if len(shape) == 1 else 1.0 if "embed" in name else shape[1] ** -0.5
        # No gain of 1 and no bias of 0, which would hide a factor or a term that is missing.
        mean = 1.0 if "norm" in name else 0.0
        tensors[name] = (torch.randn(shape, generator=generator) * scale + mean).bfloat16()
    _write_weights(folder, tensors, files)
    _write_json(folder / "config.json", c)
    ids = {key: c[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", {f"{key}_token_id": value for key, value in ids.items()})
    _write_tokenizer(folder)
    for name in ("configuration_ouro.py", "modeling_ouro.py"):
        (folder / name).write_text(REMOTE)
    return folder


def _write_weights(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {name: f"model-{1 + k % files:05}-of-{files:05}.safetensors" for k, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE, as published, but with no merges: one token a byte."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = SPECIAL[0]
    names = {"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", {**names, "additional_special_tokens": list(SPECIAL)})
    more = {"add_prefix_space": False, "model_max_length": 131072, "tokenizer_class": "GPT2Tokenizer"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(i): {"content": token, **flags} for i, token in enumerate(SPECIAL)}
    _write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **names, **more})
    (folder / "chat_template.jinja").write_text(CHATML)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2))

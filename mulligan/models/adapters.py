"""LoRA (arXiv 2106.09685) through PEFT: y = W x + (alpha / rank) B A x, with W frozen.

The adapter is put into the model itself, layer by layer, so that everything else (the looped model, the sampler, the
scorer's own head) sees the architecture it knows. A is drawn from the run's seed, B begins at 0: the first policy is
the base, exactly. Adapter weights are float32 whatever the base is, since small updates vanish in bfloat16.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mulligan.errors import UserError, nearest
from mulligan.files import reason
from mulligan.models.loading import LoadedModel, output_head
from mulligan.seeds import seed_of

ALL_LINEAR = "all-linear"
_NAME = "default"  # PEFT's word for a model's only adapter


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter's settings."""

    rank: int  # at least 1
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)


def add_adapter(model: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Puts a fresh adapter into the model and freezes everything else.

    Args:
        settings: its targets are the last parts of linear layers' names, such as "q_proj", or "all-linear": all but
            the LM head.
        seed: of A, layer by layer; no generator is advanced.

    Raises:
        UserError: PEFT is not installed, an unknown target, or the head of a model that ties it to the embeddings.
    """
    peft = _peft()
    names = _linear_names(model, settings.targets)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # PEFT draws what is overwritten below
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names), model, _NAME
        )
    for name, layer in _layers(model):
        a, b = (getattr(layer, part)[_NAME] for part in ("lora_A", "lora_B"))
        for part in (a, b):
            part.float()
        # Uniform with bound 1 / sqrt(fan in), as PEFT has it, but from the run's seed and this layer's name.
        generator = torch.Generator().manual_seed(seed_of(seed, "lora", name))
        drawn = (2 * torch.rand(a.weight.shape, generator=generator) - 1) * a.weight.shape[1] ** -0.5
        with torch.no_grad():
            a.weight.copy_(drawn)
            b.weight.zero_()


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter was put into the model."""
    return hasattr(model, "peft_config")


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside, the model is its base: no copy is kept, and what is frozen stays frozen. Not for gradients."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(loaded: LoadedModel) -> PreTrainedModel:
    """A copy of the model with W + (alpha / rank) B A in place of each adapted layer: the plain architecture.

    A model without an adapter comes back itself.

    Raises:
        UserError: its logits are not those of base and adapter, within the rounding of the weights' dtype.
    """
    model = loaded.model
    if not has_adapter(model):
        return model
    plain = copy.deepcopy(model)
    for name, layer in list(_layers(plain)):
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(plain.get_submodule(parent), own, layer.get_base_layer())
    del plain.peft_config
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        left, right = (m.eval()(input_ids=ids, use_cache=False).logits.float() for m in (model, plain))
    # Each weight is rounded once more, by eps at most; the factor leaves room for the depth of the model.
    near = 64 * torch.finfo(plain.dtype).eps * float(left.abs().max())
    if not torch.allclose(left, right, rtol=0.0, atol=near):
        raise UserError(
            f"{loaded.name}: merging the adapter moves logits by {float((left - right).abs().max()):.3g}, more than "
            "rounding does; export the adapter by itself"
        )
    return plain


def adapter_names(model: nn.Module) -> set[str] | None:
    """The parameters of the adapter, as ``state_dict`` names them; None for a model without one."""
    if not has_adapter(model):
        return None
    return {f"{name}.{part}.{_NAME}.weight" for name, _ in _layers(model) for part in ("lora_A", "lora_B")}


def fingerprint(model: nn.Module) -> str:
    """A hash of what the adapter stands on: of each frozen tensor its name, shape and at most 64 of its numbers, spread
    evenly. Cheap, and another training run changes it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(loaded: LoadedModel, directory: str | Path, base: str) -> None:
    """Writes the adapter alone as PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        base: the model that it belongs to, a Hub id or a directory, for ``adapter_config.json``.

    Raises:
        UserError: the directory cannot be written.
    """
    names = adapter_names(loaded.model)
    assert names is not None
    state = loaded.model.state_dict()
    tensors = {
        f"base_model.model.{name.replace(f'.{_NAME}.weight', '.weight')}": state[name].cpu().contiguous()
        for name in sorted(names)
    }
    config: Any = copy.copy(loaded.model.peft_config[_NAME])
    config.base_model_name_or_path, config.task_type = base, "CAUSAL_LM"
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(directory))
        save_file(tensors, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})
    except Exception as error:
        raise UserError(f"{directory}: cannot write the adapter: {reason(error)}") from error


def _linear_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The last parts of the names of the layers that get an adapter."""
    head = output_head(model)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    known = {name.rpartition(".")[2] for name in linear}
    heads = {name.rpartition(".")[2] for name, module in linear.items() if module is head}
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            raise UserError(f"lora.targets: '{ALL_LINEAR}' is every layer; leave the others out, or it")
        return sorted(known - heads)
    for target in targets:
        if target not in known:
            raise UserError(f"lora.targets: '{target}' is no linear layer of it{nearest(target, [*known, ALL_LINEAR])}")
    if heads & set(targets) and head.weight is cast(nn.Embedding, model.get_input_embeddings()).weight:
        raise UserError(
            f"lora.targets: '{min(heads)}' is tied to the embeddings, so an adapter of it could not be merged"
        )
    return sorted(set(targets))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("lora.rank needs another package: pip install 'mulligan[lora]'") from None
    return peft

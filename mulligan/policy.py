"""The models of a run: the policy as the settings want it, and the frozen models that methods read beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mulligan.config import LoraSection, ModelSection, Run
from mulligan.errors import UserError
from mulligan.learner.update import frozen_models
from mulligan.method import Method
from mulligan.models.adapters import Lora, add_adapter, has_adapter
from mulligan.models.compiled import compile_layers, is_compiled, warm_up
from mulligan.models.kernels import take_kernels
from mulligan.models.loading import SHIPPED, LoadedModel, choose_device, load_model
from mulligan.models.looped import set_loops
from mulligan.objective import REFERENCE


def choose_dtype(model: ModelSection, lora: LoraSection) -> ModelSection:
    """The settings with ``dtype="auto"`` replaced by what it means here.

    float32 on the CPU, and wherever all weights are trained: bfloat16 has 8 significant bits, so an update below
    1/256 of a weight is lost in rounding. bfloat16 below an adapter on CUDA: that base never changes, and the adapter
    is float32 by itself.
    """
    if model.dtype != "auto":
        return model
    half = lora.rank > 0 and choose_device(model.device).type == "cuda"
    return model.model_copy(update={"dtype": "bfloat16" if half else "float32"})


def choose_precision(run: Run) -> Run:
    """The run with every ``dtype`` that is "auto" replaced by what it means here.

    Sampling and the learner's passes are in the weights' own dtype unless the run says otherwise.
    ``sampling.dtype="measured"`` stays where there is something to measure.

    Raises:
        UserError: float32 is asked for above bfloat16 weights: it would hide that the weights are rounded.
    """
    model, sampling = choose_dtype(run.model, run.lora), run.sampling
    own = model.dtype
    for key, asked in (("model.compute_dtype", model.compute_dtype), ("sampling.dtype", sampling.dtype)):
        if own == "bfloat16" and asked == "float32":
            raise UserError(f"{key} is 'float32', but the weights are bfloat16: leave it out, or model.dtype='float32'")
    if model.compute_dtype == "auto":
        model = model.model_copy(update={"compute_dtype": own})
    if sampling.dtype == "auto" or own == "bfloat16":
        sampling = sampling.model_copy(update={"dtype": own})
    return run.model_copy(update={"model": model, "sampling": sampling})


def micro_batch_tokens(run: Run, device: torch.device) -> int:
    """The size of the learner's passes: the run's, or what suits the device."""
    return run.optimizer.tokens_per_micro_batch or (2048 if device.type == "cpu" else 16384)


def autocast_of(model: ModelSection) -> torch.dtype | None:
    """The dtype of the learner's matrix products where it is another than the weights'."""
    return torch.bfloat16 if (model.dtype, model.compute_dtype) == ("float32", "bfloat16") else None


def load_policy(run: Run) -> LoadedModel:
    """The model to train, in evaluation mode, with its adapter.

    Args:
        run: with a dtype that :func:`choose_precision` has settled.
    """
    loaded = load_base(run.model, run.lora, seed=run.seed)
    if run.model.gradient_checkpointing:
        if not loaded.model.supports_gradient_checkpointing:
            raise UserError(f"model.gradient_checkpointing: {loaded.model.config.model_type} cannot do it")
        loaded.model.activation_checkpointing_enable({"use_reentrant": False})
    if run.model.kernels:
        if run.lora.rank:
            raise UserError("model.kernels: not together with an adapter (lora.rank)")
        take_kernels(loaded.model)
    if run.model.compile:
        if run.lora.rank or run.model.gradient_checkpointing:
            other = "an adapter (lora.rank)" if run.lora.rank else "model.gradient_checkpointing"
            raise UserError(f"model.compile: not together with {other}")
        compile_layers(loaded.model, autocast_of(run.model))
    return loaded


def load_base(model: ModelSection, lora: LoraSection, *, seed: int = 0, device: str | None = None) -> LoadedModel:
    """A run's model as it is before the first step: with a fresh adapter where the run has one.

    Args:
        device: in place of the settings' own.
    """
    loaded = load_model(
        model.name, dtype=model.dtype, device=device or model.device, trust_remote_code=model.trust_remote_code
    )
    if model.loops is not None:
        set_loops(loaded.model, model.loops)
    if lora.rank:
        add_adapter(loaded.model, Lora(lora.rank, lora.alpha, tuple(lora.targets)), seed)
    return loaded


def base_name(name: str) -> str:
    """Where a model is found again from another working directory: a directory's full path; a Hub id as it is."""
    path = Path(name).expanduser()
    return name if name in SHIPPED or not path.is_dir() else str(path.resolve())


def frozen_of(methods: Sequence[Method], policy: LoadedModel, settings: ModelSection) -> dict[str, PreTrainedModel]:
    """The frozen models that the methods read, on the policy's device.

    The reference is a copy of the policy as it is now. With an adapter there is none: the learner switches that off.

    Raises:
        UserError: a model that cannot be loaded, or that reads other tokens than the policy.
    """
    out: dict[str, PreTrainedModel] = {}
    for name, path in frozen_models(methods).items():
        if path is not None:
            out[name] = load_teacher(name, path, policy, settings)
        elif not (name == REFERENCE.model and has_adapter(policy.model)):
            out[name] = copy.deepcopy(policy.model).requires_grad_(False)
            if is_compiled(policy.model):
                warm_up(out[name], autocast_of(settings))
    return out


def load_teacher(name: str, path: str, policy: LoadedModel, settings: ModelSection) -> PreTrainedModel:
    """A frozen model on the policy's device.

    Raises:
        UserError: it cannot be loaded, or reads other tokens than the policy.
    """
    device = str(next(policy.model.parameters()).device)
    found = load_model(path, dtype=settings.dtype, device=device, trust_remote_code=settings.trust_remote_code)
    if found.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"{name} ({path}) has another vocabulary than {policy.name}: its log-probs would be of others")
    return found.model.eval().requires_grad_(False)

"""Models, optimizers and random generators as tensors and JSON, and back, without pickle and bit for bit."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mulligan.errors import UserError

Tensors = dict[str, torch.Tensor]

# What a scheduler moves. Every other hyperparameter is the fresh optimizer's own, so that a changed
# configuration is not silently overruled by the checkpoint.
SCHEDULED = ("lr", "initial_lr")


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


# --- models ---------------------------------------------------------------------------------------------


def model_tensors(model: nn.Module, only: Collection[str] | None = None) -> Tensors:
    """The model's parameters and persistent buffers, as contiguous CPU copies in ``state_dict`` order.

    A tensor with several names (tied weights) is given once, under its first name.

    Args:
        only: names to be taken alone (an adapter's); None is all.

    Raises:
        UserError: the ``state_dict`` holds something that is not a tensor.
    """
    return {name: _copy(tensor) for name, tensor in _own_tensors(model, only).items()}


def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], only: Collection[str] | None = None
) -> None:
    """Copy into the model, in place, what :func:`model_tensors` gave; tied weights stay tied.

    Args:
        tensors: on any device; names, shapes and dtypes must be the model's.
        only: as for :func:`model_tensors`.

    Raises:
        UserError: the first missing or unexpected name, or wrong shape or dtype. The model is then untouched.
    """
    own = _own_tensors(model, only)
    _same_names(own, tensors, "the model")
    for name, tensor in own.items():
        given = tensors[name]
        if (given.shape, given.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"the checkpoint has '{name}' as {_kind(given)}, the model as {_kind(tensor)}; "
                "build the model that was saved"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _own_tensors(model: nn.Module, only: Collection[str] | None) -> Tensors:
    """The live tensors by name, each once."""
    out: Tensors = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():  # keep_vars: tied names give the same object
        if not isinstance(value, torch.Tensor):
            raise UserError(f"'{name}' in the model's state_dict is a {type(value).__name__}, not a tensor")
        if id(value) not in seen and (only is None or name in only):
            seen.add(id(value))
            out[name] = value
    return out


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _same_names(own: Mapping[str, Any], given: Mapping[str, Any], owner: str) -> None:
    for name in own:
        if name not in given:
            raise UserError(f"the checkpoint lacks '{name}', which {owner} has")
    for name in given:
        if name not in own:
            raise UserError(f"the checkpoint has '{name}', which {owner} lacks")


# --- optimizers -----------------------------------------------------------------------------------------


def pack_optimizer(
    optimizer: torch.optim.Optimizer, names: nn.Module | Mapping[nn.Parameter, str]
) -> tuple[Tensors, dict[str, Any]]:
    """The state of any torch optimizer, by parameter names in place of indices.

    Args:
        names: the model, or each parameter's name.

    Returns:
        The tensors, named ``<parameter>/<key>`` such as ``head.weight/exp_avg``, as CPU copies; and a JSON-able
        dict with the optimizer's class, the names and shapes in each parameter group, the hyperparameters in
        :data:`SCHEDULED`, and for each parameter its state, where ``{"tensor": name}`` stands for a tensor.

    Raises:
        UserError: a parameter that has no name, or state that is no tensor, number, None or list of these.
    """
    name_of = _names(names)
    tensors: Tensors = {}

    def pack(value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[key] = _copy(value)
            return {"tensor": key}
        if isinstance(value, list | tuple):
            return [pack(item, f"{key}/{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UserError(f"the optimizer's state '{key}' is a {type(value).__name__}, which a checkpoint cannot hold")

    groups = []
    state: dict[str, Any] = {}
    for group in optimizer.param_groups:
        shapes = {}
        for parameter in group["params"]:
            if parameter not in name_of:
                raise UserError(f"the optimizer has a parameter {list(parameter.shape)} that is not in the model")
            name = name_of[parameter]
            shapes[name] = list(parameter.shape)
            if parameter in optimizer.state:  # a parameter that never had a gradient has none
                values = optimizer.state[parameter]
                state[name] = {key: pack(value, f"{name}/{key}") for key, value in values.items()}
        groups.append({"shapes": shapes, **{key: float(group[key]) for key in SCHEDULED if key in group}})
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    names: nn.Module | Mapping[nn.Parameter, str],
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    """Give a freshly built optimizer the state that :func:`pack_optimizer` took, bit for bit.

    Hyperparameters (betas, weight decay, momentum, ...) stay those of ``optimizer``, except the ones in
    :data:`SCHEDULED`, which a scheduler moves. ``Optimizer.load_state_dict`` is not used, because it casts
    state to the parameter's dtype.

    Raises:
        UserError: another class of optimizer, other groups, or the first parameter or tensor whose name or
            shape differs. The optimizer is then untouched.
    """
    name_of = _names(names)
    if (saved := state["class"]) != (mine := type(optimizer).__name__):
        raise UserError(f"the checkpoint holds the state of {saved}, but the optimizer is {mine}")
    if len(state["groups"]) != len(optimizer.param_groups):
        counts = f"{len(state['groups'])} parameter groups, the optimizer {len(optimizer.param_groups)}"
        raise UserError(f"the checkpoint has {counts}")
    used: set[str] = set()
    fresh: dict[torch.Tensor, dict[str, Any]] = {}

    def unpack(value: Any, where: torch.device) -> Any:
        if isinstance(value, dict):
            key = value["tensor"]
            if key not in tensors:
                raise UserError(f"the checkpoint lacks the optimizer's tensor '{key}'")
            used.add(key)
            return tensors[key].to(where, copy=True)
        return [unpack(item, where) for item in value] if isinstance(value, list) else value

    for group, packed in zip(optimizer.param_groups, state["groups"], strict=True):
        shapes = {name_of.get(p, f"(unnamed {list(p.shape)})"): list(p.shape) for p in group["params"]}
        _same_names(shapes, packed["shapes"], "the optimizer's parameter group")
        for parameter, (name, shape) in zip(group["params"], shapes.items(), strict=True):
            if shape != packed["shapes"][name]:
                raise UserError(f"'{name}' is {shape}, but the checkpoint has it as {packed['shapes'][name]}")
            if name in state["state"]:
                values = state["state"][name]
                fresh[parameter] = {k: unpack(v, _device(k, parameter, group)) for k, v in values.items()}
    for key in tensors:
        if key not in used:
            raise UserError(f"the checkpoint has the tensor '{key}', which no optimizer state names")

    optimizer.state.clear()
    optimizer.state.update(fresh)
    for group, packed in zip(optimizer.param_groups, state["groups"], strict=True):
        for key in SCHEDULED:
            if key in packed:
                if isinstance(group.get(key), torch.Tensor):  # a captured graph keeps reading this very tensor
                    group[key].fill_(packed[key])
                else:
                    group[key] = packed[key]


def _names(names: nn.Module | Mapping[nn.Parameter, str]) -> Mapping[nn.Parameter, str]:
    return {p: n for n, p in names.named_parameters()} if isinstance(names, nn.Module) else names


def _device(key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.device:
    """Where torch wants a state tensor: numbers that every step reads (NAdam's product of momenta is one) on the CPU,
    so that reading them does not wait for the GPU."""
    on_cpu = key in ("step", "mu_product") and not group.get("capturable") and not group.get("fused")
    return torch.device("cpu") if on_cpu else parameter.device


# --- generators -----------------------------------------------------------------------------------------


def rng_state() -> tuple[Tensors, dict[str, Any]]:
    """The states of the global generators: torch's (CPU and every CUDA device), Python's and numpy's legacy one.

    Mulligan's own draws are counter-based and use none of them; dropout and a user's code may.

    Returns:
        Tensors ``torch``, ``cuda/0``, ... (uint8, opaque), ``python`` and ``numpy`` (int64 words); and a
        JSON-able dict with the rest. CUDA is left out when this process has not used it.
    """
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]  # noqa: NPY002
    if legacy["bit_generator"] != "MT19937":
        raise UserError(f"numpy's global generator is {legacy['bit_generator']}; a checkpoint can hold MT19937 only")
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    numpy = {"pos": int(legacy["state"]["pos"]), "has_gauss": int(legacy["has_gauss"]), "gauss": float(legacy["gauss"])}
    return tensors, {"python": {"version": version, "gauss": gauss}, "numpy": numpy}


def set_rng_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Put the global generators back to what :func:`rng_state` returned.

    Raises:
        UserError: the state is of more CUDA devices than this machine has.
    """
    cuda = [tensors[f"cuda/{i}"] for i in range(sum(name.startswith("cuda/") for name in tensors))]
    if len(cuda) > torch.cuda.device_count():
        raise UserError(
            f"the checkpoint has generators of {len(cuda)} CUDA devices, this machine has {torch.cuda.device_count()}"
        )
    torch.set_rng_state(tensors["torch"].cpu())
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["pos"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002

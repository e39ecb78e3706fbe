"""Any optimizer of torch.optim by its name, with the run's settings where its class has them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mulligan.config import OptimizerSection
from mulligan.errors import UserError, nearest

# What a run sets by a key of its own, and what would make it train away from the reward.
_ELSEWHERE = {"params": None, "lr": "optimizer.learning_rate", "maximize": None, "differentiable": None}
_OURS = {"AdamW": {"betas": (0.9, 0.95)}}  # a shorter memory than torch's: policies move
_SPARSE = ("SparseAdam",)


def build_optimizer(settings: OptimizerSection, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of those parameters that are trained.

    Raises:
        UserError: in one line: no such optimizer, one that a batch's gradient cannot drive, or a setting that it
            does not take.
    """
    kind: Any = _class(settings.name)
    given = optimizer_settings(settings)
    trained = [p for p in parameters if p.requires_grad]
    try:
        return kind(trained, lr=settings.learning_rate, **given, **_options(settings, kind, given))
    except (ValueError, TypeError, RuntimeError) as error:
        said = " ".join(str(error).split())
        hint = " (all weights of an adapter are 2-D: lora.rank=8)" if settings.name == "Muon" else ""
        raise UserError(f"optimizer.name='{settings.name}': {said}{hint}") from error


def optimizer_settings(settings: OptimizerSection) -> dict[str, Any]:
    """``weight_decay``, ``betas`` and ``eps`` as the class gets them; those that it does not take are left out.

    What the user has not set is 0 for the weight decay, AdamW's betas are 0.9 and 0.95, all else is torch's.

    Raises:
        UserError: one that was set and is not taken.
    """
    taken = _taken(_class(settings.name))
    out: dict[str, Any] = {}
    for key in ("weight_decay", "betas", "eps"):
        value = getattr(settings, key)
        # Adafactor's eps are two numbers of another meaning.
        fits = key in taken and isinstance(taken[key], tuple) == (key == "betas")
        if value is not None and not fits:
            kinds = "no such argument" if key not in taken else f"another kind of it: optimizer.options.{key}"
            raise UserError(f"optimizer.{key}: {settings.name} has {kinds}")
        if fits:
            out[key] = value if value is not None else _OURS.get(settings.name, {}).get(key, taken[key])
            if value is None and key == "weight_decay":
                out[key] = 0.0
    return out


def learning_rate(settings: OptimizerSection, steps: int) -> Callable[[int], float]:
    """The rate as a function of the optimizer step (from 0)."""
    total = steps * settings.epochs * settings.updates_per_batch

    def rate(update: int) -> float:
        share = min(update / max(total, 1), 1.0)
        down = {"constant": 1.0, "linear": 1 - 0.9 * share, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * share))}
        up = min((update + 1) / settings.warm_up, 1.0) if settings.warm_up else 1.0
        return settings.learning_rate * up * down[settings.decay]

    return rate


def _class(name: str) -> type[torch.optim.Optimizer]:
    base = torch.optim.Optimizer
    known = {n: k for n, k in vars(torch.optim).items() if inspect.isclass(k) and issubclass(k, base) and k is not base}
    usable = {n: k for n, k in known.items() if n not in _SPARSE and not _needs_closure(k)}
    if name in usable:
        return usable[name]
    if name in known:
        what = "reads sparse gradients alone" if name in _SPARSE else "wants the loss again and again (a closure)"
        raise UserError(f"optimizer.name='{name}' {what}; choose one of {', '.join(sorted(usable))}")
    cased = next((n for n in usable if n.lower() == name.lower()), None)
    hint = f" (did you mean '{cased}'?)" if cased else nearest(name, usable)
    raise UserError(f"optimizer.name='{name}' is none of torch.optim{hint}")


def _needs_closure(kind: type[torch.optim.Optimizer]) -> bool:
    return inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty


def _taken(kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """The class's arguments with their defaults."""
    return {n: p.default for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self"}


def _options(settings: OptimizerSection, kind: type[torch.optim.Optimizer], given: dict[str, Any]) -> dict[str, Any]:
    taken = _taken(kind)
    out = {}
    for key, value in settings.options.items():
        if key in given:
            raise UserError(f"optimizer.options.{key}: it is a setting of its own, optimizer.{key}")
        if key in _ELSEWHERE:
            instead = _ELSEWHERE[key]
            raise UserError(f"optimizer.options.{key}: {f'it is {instead}' if instead else 'a run sets it itself'}")
        if key not in taken:
            known = sorted(taken.keys() - _ELSEWHERE.keys() - given.keys())
            raise UserError(f"optimizer.options.{key}: {kind.__name__} has no such argument{nearest(key, known)}")
        out[key] = tuple(value) if isinstance(value, list) else value
    return out

"""``mulligan doctor``: what there is, and whether the smallest real thing works."""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mulligan.errors import UserError
from mulligan.models.loading import load_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.tasks.chain import Chain
from mulligan.texts import Texts
from mulligan.verify.sandbox import layers

PACKAGES = ("mulligan", "torch", "transformers", "safetensors", "tokenizers", "pydantic", "numpy", "math-verify")
EXTRAS = ("datasets", "peft", "reasoning-gym", "tensorboard", "wandb", "trackio")  # null where one is absent


def examine() -> dict[str, Any]:
    """Facts about machine and installation; ``ok`` is whether the shipped base loads and writes tokens."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "packages": {name: _version(name) for name in PACKAGES + EXTRAS},
        "verifier_sandbox": layers(),
    }
    try:
        loaded = load_model("pico")
        task = Chain()
        texts = Texts(task, loaded.tokenizer)
        facts["pico_tokens_per_second"] = _speed(task, texts, EmbeddedSampler(loaded.model, loaded.tokenizer))
        facts["ok"] = True
    except UserError as error:
        facts["problem"], facts["ok"] = str(error), False
        return facts
    try:
        with_kernels = EmbeddedSampler(load_model("pico", device="cpu").model, loaded.tokenizer, kernels=True)
        facts["with_kernels"] = _speed(task, texts, with_kernels)
    except UserError as error:  # they are a choice
        facts["with_kernels"] = str(error)
    return facts


def _speed(task: Chain, texts: Texts, sampler: EmbeddedSampler) -> int:
    """Tokens a second."""
    from mulligan.evaluate import evaluate

    begun = time.monotonic()
    numbers = evaluate(task, texts, sampler, split="dev", problems=16, samples=4).numbers()
    return round(numbers["length"] * 64 / (time.monotonic() - begun))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

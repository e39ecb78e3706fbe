"""A run's newest checkpoint as a plain Hugging Face directory, with a model card that says how it came to be.

| path | what |
|---|---|
| model.safetensors (or shards and an index) | the weights in the run's dtype; adapters are merged |
| config.json, generation_config.json | the architecture; how the run sampled |
| tokenizer.json, tokenizer_config.json, chat_template.jinja | the tokenizer, the template where it has one |
| README.md | the model card |

With ``adapter`` the weights are those of PEFT: adapter_model.safetensors and adapter_config.json.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from mulligan.checkpoint import load_checkpoint
from mulligan.errors import UserError
from mulligan.files import fsync_path, is_alive, reason
from mulligan.models.adapters import has_adapter, merged, save_adapter
from mulligan.models.loading import eos_id, pad_id, save_model
from mulligan.report.card import model_card
from mulligan.rundir import CHECKPOINTS, RUN, checkpoint_model, is_run

CARD = "README.md"


def export_run(run: Path, to: Path | None = None, *, adapter: bool = False) -> Path:
    """Write the newest complete checkpoint of a run, also of one that still trains.

    The directory is written under another name beside ``to`` and renamed, so it is whole or absent.

    Args:
        run: the run's directory.
        to: absent or empty; None: ``export`` (or ``adapter``) in the run's directory.
        adapter: write the LoRA adapter alone, in PEFT's layout, and not the merged model.

    Returns:
        The directory.

    Raises:
        UserError: not a run, no checkpoint yet, a directory in the way, no adapter, or a full disk.
    """
    to = to or run / ("adapter" if adapter else "export")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is {'not empty' if to.is_dir() else 'a file'}")
    if not is_run(run):
        raise UserError(f"{run} is no run: {RUN} is missing")
    found = load_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise UserError(f"{run} has no checkpoint yet")
    loaded = checkpoint_model(run, found)
    if adapter and not has_adapter(loaded.model):
        raise UserError(f"{run} trained all weights and has no adapter; leave out --adapter")
    settings, model = found.state["run"], loaded.model if adapter else merged(loaded)
    generation, left = generation_config(loaded.model, loaded.tokenizer, settings["sampling"])
    card = model_card(run, model, loaded.tokenizer, found.step, settings, stops=left)

    def write(folder: Path) -> None:
        if adapter:
            save_adapter(loaded, folder, found.state["base"]["name"])
            loaded.tokenizer.save_pretrained(folder)
            generation.save_pretrained(folder)
        else:
            model.generation_config = generation
            save_model(model, loaded.tokenizer, folder)
        (folder / CARD).write_text(card, encoding="utf-8")

    _put(to, write)
    return to


def _put(to: Path, write: Callable[[Path], None]) -> None:
    """Write a directory aside and rename it; what is there by then is empty."""
    final = to.resolve()  # so that the parent of "." is another directory
    aside = final.with_name(f".{final.name}.exporting-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_leavings(final)
        aside.mkdir()
        write(aside)
        for entry in (*sorted(aside.rglob("*")), aside):
            if entry.is_file():
                entry.chmod((aside / CARD).stat().st_mode)  # weights are written for their owner's eyes alone
            fsync_path(entry)
        aside.rename(final)
        fsync_path(final.parent)
    except UserError as error:
        raise UserError(str(error).replace(str(aside), str(to))) from error
    except Exception as error:  # safetensors' and tokenizers' Rust raise their own for a full disk
        raise UserError(f"{to}: cannot write: {reason(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already unless something failed


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]
) -> tuple[GenerationConfig, list[str]]:
    """How the run sampled, for ``generate`` and for what else reads ``generation_config.json``.

    Args:
        sampling: the run's ``[sampling]``.

    Returns:
        The config, and those stop strings that are several tokens each, which it cannot hold.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {eos_id(tokenizer), *(configured if isinstance(configured, Sequence) else [configured])} - {None}
    left = []
    for stop in sampling["stop"]:
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if len(ids) == 1:
            ends.add(ids[0])
        else:
            left.append(stop)
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling["temperature"],
        top_k=0,  # transformers' own default is 50; a run samples from the whole distribution
        top_p=1.0,
        max_new_tokens=sampling["max_new_tokens"],
        bos_token_id=cast(Any, tokenizer.bos_token_id),
        eos_token_id=sorted(ends),
        pad_token_id=pad_id(tokenizer),
    )
    return config, left


def _clear_leavings(final: Path) -> None:
    """Remove what killed exports left."""
    prefix = f".{final.name}.exporting-"
    for path in final.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(path)

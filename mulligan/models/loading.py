"""Load any causal LM and its tokenizer, from the package, a directory or the Hub; save one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from mulligan.errors import UserError, nearest
from mulligan.models.looped import LoopedForCausalLM
from mulligan.models.norms import take_norms
from mulligan.models.rotary import take_rotary

SHIPPED = {"pico": "pico", "pico-qwen3": "pico_qwen3"}  # model name -> folder beside this file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

GENERATION = "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal LM in evaluation mode with its tokenizer, and the name it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name_or_path: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal LM and its tokenizer. Weights are read from safetensors only.

    Args:
        name_or_path: "pico" or "pico-qwen3" (shipped with the package), else a directory, else a Hub id.
        dtype: of the weights: float32, bfloat16, float16 or float64.
        device: a torch device, or "auto": CUDA where there is one, else the CPU.
        trust_remote_code: let the checkpoint run its own Python code.

    Raises:
        UserError: in one line, with the path and the file: what is missing, damaged, pickled or of the
            wrong shape. A weight that the checkpoint lacks is an error, never a random number.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype '{dtype}' is not known{nearest(dtype, DTYPES)}")
    where = choose_device(device)
    source = _locate(name_or_path)
    if isinstance(source, Path):
        _check_directory(source, trust_remote_code)
    with _quiet():
        model = _load_weights(str(source), DTYPES[dtype], trust_remote_code)
        tokenizer = _load_tokenizer(str(source), trust_remote_code)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings:
        raise UserError(f"{source}: the tokenizer's largest id is {largest}, beyond the model's vocabulary")
    take_norms(model)  # before it leaves the CPU, where what it is made of is tried out
    take_rotary(model)
    model = cast(Any, model).to(where)
    return LoadedModel(model, tokenizer, name_or_path)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write a directory that :func:`load_model` and transformers read: safetensors, configs, tokenizer."""
    if Path(directory).is_file():  # transformers would only log it, and save nothing
        raise UserError(f"{directory}: a file is in the way of the model's directory")
    with _quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def save_skeleton(loaded: LoadedModel, directory: str | Path) -> None:
    """Write all of a model but its weights: what :func:`load_skeleton` reads. Raises whatever goes wrong."""
    folder, model = Path(directory), loaded.model
    model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        # Not save_pretrained, which refuses what some published models have.
        model.generation_config.to_json_file(folder / GENERATION)
    if getattr(model, "_auto_class", None) is not None:  # a checkpoint's own code
        custom_object_save(model, folder, config=cast(Any, model.config))


def load_skeleton(directory: str | Path, dtype: str, trust_remote_code: bool = False) -> LoadedModel:
    """The model that :func:`save_skeleton` wrote, on the CPU, with random weights.

    Args:
        dtype: of the weights; from the start, since casting afterwards would round the rotary tables, too.

    Raises:
        UserError: the directory cannot be read.
    """
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
            read_generation_config(model, directory)
    except Exception as error:  # damaged tokenizer files raise anything at all
        raise UserError(f"{directory}: cannot be loaded: {_line(error)}") from error
    take_norms(model)
    take_rotary(model)
    return LoadedModel(model.eval(), tokenizer, str(directory))


def read_generation_config(model: PreTrainedModel, directory: str | Path) -> None:
    """Give a model the generation config of a directory, where there is one: it names the ids that end a response."""
    if (Path(directory) / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence in tokens that the model is made for (``max_position_embeddings``)."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UserError(f"{type(model).__name__}: its config has no max_position_embeddings")
    return length


def bos_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that stands for an empty context: the tokenizer's BOS.

    Raises:
        UserError: the tokenizer has none, so the user has to choose a token.
    """
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no BOS; choose a token: method.bos=..."
        )
    return int(cast(Any, tokenizer.bos_token_id))


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that ends a response.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no EOS")
    return int(cast(Any, tokenizer.eos_token_id))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that fills a batch; EOS where the tokenizer has no padding token (nothing ever reads it)."""
    pad = cast(Any, tokenizer.pad_token_id)
    return eos_id(tokenizer) if pad is None else int(pad)


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The LM head: hidden states in, logits out."""
    return cast(torch.nn.Linear, model.get_output_embeddings())


def choose_device(name: str) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is not known to torch (try auto, cpu or cuda)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    try:
        torch.zeros(1, device=device).item()  # 'meta' holds no numbers, and this torch may not know the others
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used here ({_line(error)})") from error
    return device


def _locate(name: str) -> Path | str:
    """A directory, or the Hub id that the name must be when it is no path."""
    if name in SHIPPED:
        folder = Path(__file__).parent / SHIPPED[name]
        if not (folder / _WEIGHTS).is_file():
            raise UserError(f"model '{name}': this installation has no weights for it ({folder / _WEIGHTS})")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name}: a file; give the directory that holds config.json and {_WEIGHTS}")
    parts = path.parts
    # A Hub id is "name" or "owner/name"; anything else, or with a parent that exists here, was meant as a path.
    if name.startswith((".", "/", "~")) or not 1 <= len(parts) <= 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise UserError(f"{name}: no such directory")
    return name


def _check_directory(folder: Path, trust_remote_code: bool) -> None:
    """Find what is wrong with a local checkpoint before transformers does, so that the file is named."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, so this is not a model directory")
    _read_json(folder / "config.json")
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt"):  # reads the header, and compares it with the file's size
                pass
        except SafetensorError as error:
            raise UserError(f"{file}: corrupt or truncated safetensors ({_line(error)})") from error
    # A tokenizer of the checkpoint's own code may keep its vocabulary in any file.
    if not trust_remote_code and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(f"{folder}: no tokenizer (none of {', '.join(_TOKENIZERS)})")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise UserError(f"{folder / _INDEX}: no weight_map")
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: missing, though {_INDEX} lists it")
        return files
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise UserError(f"{folder / pickles[0]}: pickled weights can run code when loaded; convert them to safetensors")
    raise UserError(f"{folder}: no weights ({_WEIGHTS} or {_INDEX})")


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: not a JSON object")
    return value


def _load_weights(source: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        model, info = loaded
    except UserError:
        raise
    except Exception as error:  # a config.json with a wrong type or size raises anything at all
        raise UserError(f"{source}: cannot be loaded as a causal LM ({_line(error)})") from error
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        raise UserError(f"{source}: {key} has shape {tuple(found)}, but config.json asks for {tuple(wanted)}")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{source}: the checkpoint lacks {missing[0]} ({len(missing)} weights are missing)")
    # Other architectures come with weights that a causal LM rightly leaves out (a value head, further predictors).
    if info["unexpected_keys"] and isinstance(model, LoopedForCausalLM):
        extra = sorted(info["unexpected_keys"])
        raise UserError(f"{source}: a looped model has no {extra[0]} ({len(extra)} weights would be left out)")
    return model


def _load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    # Damaged tokenizer files raise anything at all, the bare Exception of the Rust library included.
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"{source}: its tokenizer cannot be loaded ({_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: the tokenizer has no EOS token, so no answer could end")
    return tokenizer


def _line(error: Exception) -> str:
    """The first line of an error's message, and the second where the first only announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints bars and load reports; a library must not, and the findings are errors here."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()

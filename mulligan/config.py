"""A run's settings: TOML and command line in, one validated and complete description out."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mulligan.errors import UserError, nearest
from mulligan.files import reason


class Section(BaseModel):
    """One TOML section; unknown keys are refused, and so is any conversion between types but int to float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class OpenSection(BaseModel):
    """A section with keys of its own beside ``name``: a task's or a method's settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything beside the name."""
        return dict(self.model_extra or {})


class ModelSection(Section):
    """What is trained."""

    name: str = Field(default="pico", description="'pico', 'pico-qwen3', a directory, or a Hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; 'auto': float32, and bfloat16 below an adapter on CUDA"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="of the learner's passes; 'auto': the weights'; 'bfloat16' over float32 weights: mixed precision",
    )
    device: str = Field(default="auto", description="'auto' (CUDA when present), 'cpu', 'cuda', 'cuda:1', ...")
    trust_remote_code: bool = False
    loops: int | None = Field(
        default=None, ge=1, description="of a looped model, in sampling and learning; left out: the model's own number"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, for a second forward pass")
    compile: bool = Field(
        default=False, description="torch.compile of each layer around its attention; half a minute when a run begins"
    )
    kernels: bool = Field(
        default=False, description="on a CPU: decoding and attention over trees in C++, built in seconds and kept"
    )
    chat: Literal["auto", "on", "off"] = Field(
        default="auto", description="prompts as a user's turn; 'auto': where the tokenizer has a chat template"
    )
    thinking: bool | None = Field(default=None, description="the template's enable_thinking; left out: the template's")
    system: str | None = Field(default=None, description="a system prompt before the user's turn")


class LoraSection(Section):
    """Low-rank adapters (arXiv 2106.09685): W + (alpha / rank) B A, and only A and B are trained.

    There is no dropout: the learner's log-probs have to be those of the policy that sampled.
    """

    rank: int = Field(default=0, ge=0, description="0 trains all weights")
    alpha: float = Field(default=32.0, gt=0)
    targets: list[str] = Field(default=["all-linear"], min_length=1, description="names of linear layers")


class TaskSection(OpenSection):
    """What it is trained on; further keys are the task's own (``mulligan tasks``)."""

    name: str = "chain"


class MethodSection(OpenSection):
    """How credit is given; further keys are the method's own (``mulligan methods``)."""

    name: str = "grpo"


class SamplingSection(Section):
    """How rollouts are drawn."""

    prompts: int = Field(default=16, ge=1, description="problems a step")
    temperature: float = Field(default=1.0, gt=0, description="ratios are taken at it too")
    max_new_tokens: int = Field(default=128, ge=1, description="longest response")
    max_rows: int = Field(default=256, ge=1, description="samples that decode at a time")
    stop: list[str] = Field(default=[], description="strings that end a response beside EOS")
    dtype: Literal["auto", "float32", "bfloat16", "measured"] = Field(
        default="auto",
        description="of the weights that sample; 'auto': the model's own; 'measured': bfloat16 where it is faster here",
    )
    draws: int = Field(default=10, ge=1, description="dynamic sampling draws at most this often `prompts`")


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """How rows become updates."""

    name: str = Field(default="AdamW", description="any optimizer of torch.optim that needs no closure")
    options: dict[str, Any] = Field(default={}, description="further arguments of that class, such as momentum")
    learning_rate: float = Field(default=2e-4, gt=0)
    warm_up: int = Field(default=0, ge=0, description="updates over which the rate rises from 0")
    decay: Literal["constant", "linear", "cosine"] = Field(default="constant", description="to a tenth, over all steps")
    weight_decay: float | None = Field(default=None, ge=0, description="left out: 0")
    betas: Annotated[tuple[Beta, Beta] | None, Field(strict=False)] = Field(
        default=None, description="left out: AdamW's are 0.9 and 0.95, another optimizer's its own"
    )
    eps: float | None = Field(default=None, gt=0, description="left out: the optimizer's own")
    clip_norm: float = Field(default=1.0, ge=0, description="largest gradient norm; 0 is off")
    updates_per_batch: int = Field(default=1, ge=1, description="optimizer steps into which a batch is cut")
    epochs: int = Field(default=1, ge=1, description="passes over a batch")
    tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="of the learner's passes, at most; empty: 2,048 on the CPU (its caches), 16,384 elsewhere",
    )
    share_prefixes: bool = Field(default=True, description="compute once what rows begin with alike, where possible")


class EvalSection(Section):
    """Held-out accuracy before, during and after."""

    every: int = Field(default=20, ge=0, description="steps between evaluations; 0: only before and after")
    split: Literal["dev", "test"] = "dev"
    problems: int = Field(default=128, ge=1)
    samples: int = Field(default=4, ge=1, description="samples a problem, at the sampling temperature")
    max_rows: int = Field(default=512, ge=1)


class CheckpointSection(Section):
    """What survives a kill."""

    every: int = Field(default=10, ge=1, description="steps between checkpoints")
    keep: int = Field(default=2, ge=1)


class LogSection(Section):
    """What is written."""

    samples: bool = Field(default=True, description="every rollout to samples.jsonl")
    to: list[str] = Field(default=[], description="'tensorboard', 'wandb', 'trackio' or './mine.py:factory'")
    project: str = Field(default="mulligan", pattern=r"^[A-Za-z0-9_-]{1,64}$", description="as W&B and trackio say")
    name: str | None = Field(default=None, description="there; the run's directory's name when left out")


class DiagnoseSection(Section):
    """What is measured beside the training."""

    alignment: int = Field(
        default=0, ge=0, description="steps between cosines of the gradients of log P(y) and log P(y|x); 0: never"
    )
    samples: int = Field(default=8, ge=1, description="samples a cosine is taken over")


class Run(Section):
    """A whole run."""

    steps: int = Field(default=60, ge=1)
    tokens: int | None = Field(default=None, ge=1, description="end once so many tokens were sampled, of any kind")
    seed: int = 0
    out: str | None = Field(default=None, description="the run's directory; named after the run when left out")
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    task: TaskSection = TaskSection()
    method: MethodSection = MethodSection()
    sampling: SamplingSection = SamplingSection()
    optimizer: OptimizerSection = OptimizerSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    diagnose: DiagnoseSection = DiagnoseSection()

    @model_validator(mode="after")
    def _possible(self) -> Run:
        if self.optimizer.updates_per_batch > self.sampling.prompts:
            raise ValueError(
                f"optimizer.updates_per_batch ({self.optimizer.updates_per_batch}) is above sampling.prompts "
                f"({self.sampling.prompts}): a group is never cut in two"
            )
        return self

    @property
    def directory(self) -> Path:
        """Where everything is written."""
        method = re.sub(r"[^\w.+]+", "-", self.method.name).strip("-.")  # a composition has brackets and paths
        return Path(self.out or f"runs/{self.task.name}-{method}-seed{self.seed}")


# A resumed run may differ from the first in these alone.
MAY_CHANGE = ("steps", "tokens", "out", "log.to", "log.project", "log.name", "model.device")


def load_run(file: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Run:
    """A run from a TOML file, ``section.key=value`` overrides and command-line flags, later ones winning.

    Raises:
        UserError: one line that names the file, the key and the nearest valid key.
    """
    data = read_toml(file) if file is not None else {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"'{override}' is neither a .toml file nor section.key=value")
        _put(data, key.strip(), _parse(value.strip()))
    for key, value in (flags or {}).items():
        if value is not None:
            _put(data, key, value)
    return validate(data, str(file) if file is not None else None)


def validate(data: Mapping[str, Any], source: str | None = None) -> Run:
    """A run from nested dictionaries.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        where = f"{source}: " if source else ""
        if first["type"] == "extra_forbidden":
            raise UserError(f"{where}'{'.'.join(path)}' is no setting{nearest(path[-1], _keys(path[:-1]))}") from None
        if first["type"] == "value_error":
            raise UserError(where + first["msg"].removeprefix("Value error, ")) from None
        if first["type"] == "model_type":
            keys = ", ".join(f"{path[-1]}.{key}" for key in _keys(path))
            raise UserError(f"{where}'{path[-1]}' is a section, not {first['input']!r} (known: {keys})") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{where}{'.'.join(path)}: {message}, not {first['input']!r}") from None


def with_defaults(run: Run, defaults: Mapping[str, Any]) -> Run:
    """The run with a method's own settings of sections (``{"optimizer.updates_per_batch": 4}``) where the user named
    none.

    Raises:
        UserError: they do not go together with the rest.
    """
    data = run.model_dump(exclude_unset=True)
    given = flatten(data)
    for key, value in defaults.items():
        if key not in given:
            _put(data, key, value)
    return validate(data, "the method's own settings") if defaults else run


def resolve(run: Run, method_settings: Mapping[str, Any], task_settings: Mapping[str, Any]) -> dict[str, Any]:
    """The complete run as nested dictionaries, every default written out."""
    out = json.loads(run.model_dump_json())
    out["out"] = str(run.directory)
    out["method"] = {"name": run.method.name, **method_settings}
    out["task"] = {"name": run.task.name, **task_settings}
    return out


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as ``{"section.key": value}``."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines such as ``sampling.prompts: 16 -> 32``, without what may change between a run and its resumption."""
    left, right = flatten(old), flatten(new)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key) and key not in MAY_CHANGE
    ]


def to_toml(data: Mapping[str, Any]) -> str:
    """The resolved run as TOML; None is written as a comment, since TOML has no null."""
    return "\n".join(_toml_table("", data)).lstrip("\n") + "\n"


def _toml_table(name: str, data: Mapping[str, Any]) -> list[str]:
    plain = {k: v for k, v in data.items() if not isinstance(v, Mapping)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"# {k}: not set" if v is None else f"{_toml_key(k)} = {_toml_value(v)}" for k, v in plain.items()]
    for key, value in data.items():
        if isinstance(value, Mapping):
            lines += _toml_table(f"{name}.{_toml_key(key)}" if name else _toml_key(key), value)
    return lines


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """JSON, but for DEL, which TOML wants escaped, and for tables inside of lists; None is left out of those."""
    if isinstance(value, Mapping):
        told = [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None]
        return f"{{{', '.join(told)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries.

    Raises:
        UserError: it cannot be read; the message names the file and the line.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot read: {reason(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}") from None


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"'{key}': '{section}' is no section")
        data = inner
    data[last] = value


def _parse(value: str) -> Any:
    """A TOML value; what is none is a string, so that paths and names need no quotes."""
    try:
        return tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return value


def _keys(path: Sequence[str]) -> list[str]:
    model: Any = Run
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)

"""A model card: what was trained, how, on what, and what came out, in Markdown with YAML in front.

Names, paths and texts of the user's are escaped for the place they stand in, so that none can become markup, end a
block or add a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mulligan import __version__
from mulligan.config import flatten, to_toml
from mulligan.errors import UserError
from mulligan.learner.scoring import is_looped
from mulligan.log import METRICS, SAMPLES, read_metrics
from mulligan.methods import PRESETS, build_schedule
from mulligan.models.adapters import adapter_names
from mulligan.models.loading import SHIPPED
from mulligan.tasks import build_task

LONGEST_PROMPT = 2000  # characters; a longer one would bury the card


def model_card(
    run: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    settings: Mapping[str, Any],
    *,
    stops: Sequence[str],
) -> str:
    """The text of README.md.

    Args:
        run: the run's directory, whose metrics and samples are read.
        model: as it is exported; with an adapter in it where the directory holds that alone.
        step: of the checkpoint; what was measured after it is left out.
        settings: the resolved run.
        stops: stop strings of the run that generation_config.json cannot hold.

    Raises:
        UserError: the run's metrics cannot be read.
    """
    records = [record for record in read_metrics(run / METRICS) if record["step"] <= step]
    totals = next((record for record in reversed(records) if "total/tokens" in record), {})
    trained = adapter_names(model)
    base = settings["model"]["name"]
    return _template().render(
        version=__version__,
        adapter=trained is not None,
        base=base,
        base_id=base if _is_hub_model(base) else None,
        shipped=base in SHIPPED,
        looped=is_looped(model),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for n, p in model.named_parameters() if trained is None or n in trained),
        run=settings,
        toml=to_toml(settings),
        step=step,
        tokens=totals.get("total/tokens"),
        samples=totals.get("total/samples"),
        methods=_methods(settings["method"]["name"]),
        method_settings={k: v for k, v in settings["method"].items() if k != "name"},
        data=_data(settings["task"]),
        datasets=_datasets(settings["task"]),
        results=_results(records),
        reports=list(_reports(run)),
        prompt=_prompt(run, tokenizer),
        stops=stops,
    )


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": yaml_string, "plain": plain, "code": code, "fence": fence}
    return environment.get_template("model_card.md.jinja")


# --- what stands in it ----------------------------------------------------------------------------------


def _is_hub_model(name: str) -> bool:
    """Whether the name is a Hub id and no path: what was loaded from the Hub lies in its cache."""
    if name in SHIPPED or Path(name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        return False
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # not even an id
        return False


def _methods(name: str) -> list[dict[str, Any]]:
    """The presets that a composition names, in its order; none for a method of the user's own file."""
    words = [] if ":" in name else re.findall(r"[\w+.-]*\w\+\+|[\w.-]+", name)
    found = []
    for preset in (PRESETS[word] for word in dict.fromkeys(words) if word in PRESETS):
        changes = {part for method in build_schedule(preset.name).schedule.methods for part in method.changes}
        found.append(
            {
                "name": preset.name,
                "summary": preset.summary.rstrip("."),
                "paper": preset.paper,
                "changes": sorted(changes),
            }
        )
    return found


def _data(task: Mapping[str, Any]) -> dict[str, Any]:
    """What the task says of itself, and what was left out of its data."""
    try:
        built = build_task(task["name"], {key: value for key, value in task.items() if key != "name"})
    except UserError as error:  # the data may have stayed on another machine
        return {"summary": None, "sizes": {}, "notes": [f"The data could not be read for this card: {error}"]}
    sizes = {split: size for split in ("train", "dev", "test") if (size := built.size(split)) is not None}
    return {"summary": built.summary, "sizes": sizes, "notes": built.notes()}


def _datasets(task: Mapping[str, Any]) -> list[str]:
    """Data sets of the Hub that a task's settings name."""
    if task["name"] == "jsonl":
        return []
    paths = [value for key, value in flatten(task).items() if re.search(r"(^|[._])path$", key)]
    ids = [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", path, re.ASCII)]
    return [name for name in dict.fromkeys(ids) if not Path(name).parts[0:1] or not Path(Path(name).parts[0]).exists()]


def _results(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Held-out measurements, the first and the last."""
    measured = [record for record in records if "eval/pass@1" in record]
    if not measured:
        return None
    first, last = measured[0], measured[-1]
    own = {key.removeprefix("eval/"): last[key] for key in last if key.startswith("eval/")}
    size = {key: int(own.pop(key)) for key in ("problems", "samples") if key in own}
    rows = [
        {"name": name, "before": _with_interval(first, f"eval/{name}"), "after": _with_interval(last, f"eval/{name}")}
        for name in own
        if not name.endswith(("_low", "_high"))
    ]
    return {"first": first["step"], "last": last["step"], "rows": rows, **size}


def _reports(run: Path) -> Iterator[dict[str, str]]:
    """A row for each entry of the evaluations (``mulligan eval --out``) in the run's directory."""
    for path in sorted(run.glob("*/report.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # being written, or not ours
        settings = report.get("settings") if isinstance(report, dict) else None
        if not isinstance(settings, dict) or settings.get("probe"):
            continue
        for entry in report.get("grid", [report]):
            how = settings if "task" in settings else settings["evaluate"][entry["task"]]
            most = int(entry["samples"])
            place = {key: entry.get(key, how[key]) for key in ("loops", "exit_threshold", "max_new_tokens")}
            limits = [f"{key.replace('_', ' ')} {value}" for key, value in place.items() if value is not None]
            yield {
                "task": how["task"]["name"],
                "split": how["split"],
                "step": str(settings.get("step", "-")),
                "how": ", ".join([f"temperature {how['temperature']}", *limits]),
                "size": f"{int(entry['problems']):,} x {most}",
                **{key: _with_interval(entry, key) for key in ("pass@1", "length", "truncated")},
                "pass@n": _with_interval(entry, f"pass@{most}"),
                "maj@n": _with_interval(entry, f"maj@{most}"),
            }


def _with_interval(record: Mapping[str, Any], name: str) -> str:
    value, low, high = (record.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return _shown(value) if low is None or high is None else f"{_shown(value)} [{_shown(low)}, {_shown(high)}]"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _prompt(run: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A prompt of the run's first step, as text that gives its tokens again; ``text`` is None where there is none."""
    bos = tokenizer.bos_token_id
    out: dict[str, Any] = {"text": None, "bos": bos is not None}
    try:
        with (run / SAMPLES).open(encoding="utf-8") as file:
            context = json.loads(file.readline() or "{}").get("context_tokens")
    except OSError:
        return out
    if not context:
        return out
    out["bos"] = context[0] == bos
    rest = context[1:] if out["bos"] else context
    text = str(tokenizer.decode(rest, skip_special_tokens=False))
    if tokenizer.encode(text, add_special_tokens=False) == list(rest) and len(text) <= LONGEST_PROMPT:
        out["text"] = text
    return out


# --- escaping -------------------------------------------------------------------------------------------


def yaml_string(text: str) -> str:
    """A double-quoted YAML scalar. JSON's is one, but for characters that YAML does not print."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", quoted
    )


def plain(text: str) -> str:
    """Text that stays text in Markdown, on one line."""
    line = re.sub(r"([\\`*_\[\]<>&|~$#])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"^([+=-]|\d+(?=[.)]))", _as_entity, line)  # a list or a rule where a line begins


def _as_entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0][0])};{found[0][1:]}"


def code(text: str) -> str:
    """A code span, on one line, that may stand in a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    if not line:
        return "(empty)"
    marks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{marks} {line} {marks}" if "`" in line else f"{marks}{line}{marks}"


def fence(text: str, language: str = "") -> str:
    """A fenced block that nothing in the text can end."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{marks}{language}\n{text.rstrip(chr(10))}\n{marks}"

"""Settings: what wins, what is refused and how, and that a run's description reads back as it was."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.config import Run, differences, flatten, load_run, read_toml, resolve, to_toml, validate
from mulligan.errors import UserError
from mulligan.methods import PRESETS, build_schedule
from mulligan.tasks import TASKS, build_task
from mulligan.tasks.base import GeneratedTask

SECTIONS = {name: f.annotation for name, f in Run.model_fields.items() if hasattr(f.annotation, "model_fields")}
KEYS = [(s, k) for s, model in SECTIONS.items() for k in model.model_fields]
TOP = [k for k in Run.model_fields if k not in SECTIONS]


def refused(*parts: object, file=None, overrides=(), **flags) -> str:
    """The message with which a run is refused: one line that holds all the parts."""
    with pytest.raises(UserError) as caught:
        load_run(file, overrides, flags)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    for part in parts:
        assert str(part) in message, (part, message)
    return message


def annotation(section: str, key: str) -> Any:
    return (Run if not section else SECTIONS[section]).model_fields[key].annotation


# --- what wins ------------------------------------------------------------------------------------------


def test_defaults():
    run = load_run(None)
    assert (run.model.name, run.task.name, run.method.name, run.seed) == ("pico", "chain", "grpo", 0)
    assert str(run.directory) == "runs/chain-grpo-seed0"


def test_flags_win_over_overrides_and_these_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 1\nseed = 1\n[sampling]\nprompts = 1\ndraws = 4\n[task]\nname = 'boolean'\nlevel = 2\n")
    run = load_run(file, ["steps=2", "seed=2", "sampling.prompts=2", "sampling.prompts=3"], {"steps": 5, "seed": None})
    assert (run.steps, run.seed, run.sampling.prompts, run.sampling.draws) == (5, 2, 3, 4)
    assert (run.task.name, run.task.settings) == ("boolean", {"level": 2})


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.name=../models/a b", ("model", "name"), "../models/a b"),
        ("model.name='quoted'", ("model", "name"), "quoted"),
        ("out=a=b", ("out",), "a=b"),
        (" sampling.prompts = 3 ", ("sampling", "prompts"), 3),
        ("sampling.temperature=1", ("sampling", "temperature"), 1.0),
        ("optimizer.learning_rate=1e-5", ("optimizer", "learning_rate"), 1e-5),
        ("optimizer.betas=[0.8, 0.99]", ("optimizer", "betas"), (0.8, 0.99)),
        ('sampling.stop=["\\n", "x"]', ("sampling", "stop"), ["\n", "x"]),
        ("log.samples=false", ("log", "samples"), False),
        ("seed=-3", ("seed",), -3),
    ],
)
def test_overrides_are_toml_where_they_can_be(override, path, value):
    found: Any = load_run(None, [override])
    for name in path:
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("section", "key"), [k for k in KEYS if k[0] not in ("task", "method")])
def test_a_misspelt_key_names_the_right_one(section, key):
    wrong = f"{key[0]}{key}"  # a letter too many
    refused(f"'{section}.{wrong}' is no setting (did you mean '{key}'?)", overrides=[f"{section}.{wrong}=1"])


@pytest.mark.parametrize("key", [*TOP, *SECTIONS])
def test_a_misspelt_key_or_section_at_the_top(key):
    wrong = f"{key}{key[-1]}"
    refused(f"'{wrong}' is no setting (did you mean '{key}'?)", overrides=[f"{wrong}=1"])
    refused(f"'{wrong}' is no setting (did you mean '{key}'?)", overrides=[f"{wrong}.x=1"])


def test_a_key_like_no_other_lists_all():
    refused("'eval.zzzzzz'", "(known: every, max_rows, problems, samples, split)", overrides=["eval.zzzzzz=1"])


@pytest.mark.parametrize("name", TASKS)
def test_a_misspelt_setting_of_a_task(name):
    for key in TASKS[name].Settings.model_fields:
        with pytest.raises(UserError, match=rf"task\.{key}q: {name} has no such setting \(did you mean '{key}'\?\)"):
            build_task(name, {f"{key}q": 1})
    with pytest.raises(UserError, match=rf"'{name}q' is unknown \(did you mean '{name}'\?\)"):
        build_task(f"{name}q", {})


@pytest.mark.parametrize("name", PRESETS)
def test_a_misspelt_setting_of_a_method(name):
    for key in PRESETS[name].settings().model_fields:
        with pytest.raises(UserError) as caught:
            build_schedule(name, {f"{key}q": 1})
        assert f"method.{key}q: {name} has no such setting (did you mean '{key}'?)" in str(caught.value)
    with pytest.raises(UserError, match="is unknown"):
        build_schedule(f"{name}q", {})


def wrong_values(kind: Any) -> list[Any]:
    """Values of other types, and numbers that are none."""
    if get_origin(kind) is Literal:
        return [f"{get_args(kind)[0]}x", 3, True]
    return {
        int: ["many", "5", True, 1.5, [1], float("nan")],
        float: ["much", "1.5", True, [1.0], float("nan"), float("inf")],
        bool: [1, 0, "yes", "true"],
        str: [3, True, ["a"], 1.5],
        list[str]: ["a", [1], [True]],
        str | None: [3, True],
        int | None: ["many", "5", True, 1.5, [1]],
        float | None: ["much", "1.5", True, [1.0], float("nan"), float("inf")],
        bool | None: [1, 0, "yes", "true"],
        dict[str, Any]: [1, "momentum=0.9", [0.9], True],
    }.get(kind, [3, "a", [0.9], [0.9, 1.0], [0.9, -0.1], [0.9, 0.9, 0.9], [True, 0.9], ["0.9", 0.9]])  # betas


@pytest.mark.parametrize(("section", "key"), [*KEYS, *(("", k) for k in TOP)])
def test_a_wrong_type_names_the_key_and_the_value(section, key):
    path = f"{section}.{key}".lstrip(".")
    for value in wrong_values(annotation(section, key)):
        data = {section: {key: value}} if section else {key: value}
        with pytest.raises(UserError) as caught:
            validate(data, "mine.toml")
        message = str(caught.value)
        assert message.startswith(f"mine.toml: {path}") and "\n" not in message
        assert "not " in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: input should be greater than or equal to 1, not 0"),
        ("sampling.prompts=0", "sampling.prompts: input should be greater"),
        ("sampling.temperature=0", "sampling.temperature: input should be greater than 0, not 0"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1: input should be less than 1"),
        ("optimizer.decay=lin", "optimizer.decay: input should be 'constant', 'linear' or 'cosine', not 'lin'"),
        ("eval.split=train", "eval.split: input should be 'dev' or 'test', not 'train'"),
        ("checkpoint.keep=0", "checkpoint.keep"),
        ("optimizer.updates_per_batch=17", "optimizer.updates_per_batch (17) is above sampling.prompts (16)"),
        ("steps=", "steps: input should be a valid integer, not ''"),
        ("steps.x=1", "steps: input should be a valid integer, not {'x': 1}"),
        ("sampling=3", "'sampling' is a section, not 3 (known: sampling.prompts, "),
        ("task=chain", "'task' is a section, not 'chain' (known: task.name)"),
        ("=3", "'' is no setting"),
        ("prompts", "'prompts' is neither a .toml file nor section.key=value"),
    ],
)
def test_impossible_values(override, message):
    refused(message, overrides=[override])


def test_a_key_below_a_value():
    refused("'task.level.x': 'level' is no section", overrides=["task.level=1", "task.level.x=1"])


# --- files ------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "run.toml"
    refused(file, "cannot read: No such file", file=file)
    refused(tmp_path, "cannot read: Is a directory", file=tmp_path)
    file.write_text("steps = 3\n[sampling\n")
    refused(file, "line 2", file=file)
    file.write_text("steps = 3\nsteps = 4\n")
    refused(file, "line 2", file=file)
    file.write_bytes(b"steps = 3 # \xff\n")
    refused(file, "utf-8", file=file)
    file.write_text("[sampling]\npromts = 3\n")
    refused(file, "'sampling.promts' is no setting (did you mean 'prompts'?)", file=file)
    file.write_text("sampling = 3\n")
    refused(file, "'sampling' is a section", file=file)
    refused("'sampling.prompts': 'sampling' is no section", file=file, overrides=["sampling.prompts=1"])


# --- the resolved run ---------------------------------------------------------------------------------------


def resolved(run: Run) -> dict[str, Any]:
    task = build_task(run.task.name, run.task.settings)
    return resolve(
        run, build_schedule(run.method.name, run.method.settings).settings, task.settings.model_dump(mode="json")
    )


# Those that need neither data nor a name of what they bridge to.
OWN = [name for name, kind in TASKS.items() if issubclass(kind, GeneratedTask) and name != "reasoning-gym"]


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize(
    "method", [*PRESETS, "srpo+rltt", "dsrl(lte, steps=3)+rltt", "reinforce+++rltt(weighting=uniform)"]
)
def test_a_resolved_run_reads_back(task, method, tmp_path):
    run = load_run(None, [f"task.name={task}", f"method.name={method}", "sampling.stop=['\\n']", 'model.name=a"b'])
    data = resolved(run)
    assert flatten(data).keys() >= {"steps", "out", "sampling.draws", "method.name", "task.seed"}
    file = tmp_path / "run.toml"
    file.write_text(to_toml(data))
    assert resolved(load_run(file)) == data
    assert differences(read_toml(file), data) == []


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(text=TEXT, stop=st.lists(TEXT, max_size=3), rate=st.floats(1e-300, 1e300), seed=st.integers(-(2**62), 2**62))
def test_any_text_and_number_reads_back(text, stop, rate, seed):
    data = {"seed": seed, "out": text, "none": None, "optimizer": {"learning_rate": rate}, "sampling": {"stop": stop}}
    back = tomllib.loads(to_toml(data))
    assert back == {k: v for k, v in data.items() if k != "none"}


def test_differences():
    old = {"steps": 1, "out": "a", "seed": 0, "model": {"device": "cpu", "dtype": "float32"}, "log": {}, "x": None}
    new = {
        "steps": 2,
        "out": "b",
        "seed": 0,
        "model": {"device": "cuda", "dtype": "bfloat16"},
        "log": {"samples": True},
    }
    assert differences(old, new) == ["model.dtype: 'float32' -> 'bfloat16'", "log.samples: None -> True"]
    assert differences(old, old) == []
    assert differences({"a": {"b": 1}}, {}) == ["a.b: 1 -> None"]


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[1] / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_runs(recipe):
    run = load_run(recipe)
    assert load_run(recipe, ["steps=3"]).steps == 3 != run.steps
    assert run.task.name in TASKS

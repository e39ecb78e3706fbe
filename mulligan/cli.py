"""The command line. Only this module and ``console`` print."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mulligan.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning with verifiable rewards: where credit goes and where exploration comes from.",
)
out = Console()

Json = Annotated[bool, typer.Option("--json", help="One JSON document and nothing else.")]


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN.toml] [section.key=value ...]", help="A run file and overrides.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="method.name (mulligan methods)")] = None,
    task: Annotated[str | None, typer.Option(help="task.name (mulligan tasks)")] = None,
    model: Annotated[str | None, typer.Option(help="model.name: pico, pico-qwen3, a directory or a Hub id")] = None,
    steps: Annotated[int | None, typer.Option(help="steps")] = None,
    seed: Annotated[int | None, typer.Option(help="seed")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The run's directory.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the run's directory.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and check everything, train nothing.")] = False,
) -> None:
    """Train a model with reinforcement learning."""
    from mulligan.checkpoint import list_checkpoints
    from mulligan.config import load_run, to_toml
    from mulligan.console import ConsoleReporter, tell_result
    from mulligan.log import METRICS, read_metrics
    from mulligan.report.curve import plot_curve
    from mulligan.rundir import CHECKPOINTS, RUN
    from mulligan.session import prepare
    from mulligan.train import train as run_training

    file, overrides = _split(arguments or [])
    if resume and file is None and to is not None and (to / RUN).is_file():
        file = to / RUN  # a run knows its own settings
    flags = {"method.name": method, "task.name": task, "model.name": model, "steps": steps, "seed": seed}
    run = load_run(file, overrides, {**flags, "out": None if to is None else str(to)})
    session = prepare(run)
    if dry_run:
        out.print(to_toml(session.resolved), highlight=False, markup=False, soft_wrap=True, end="")
        for note in session.notes:
            out.print(f"# contract holds: {note}", highlight=False, markup=False, soft_wrap=True)
        return
    if resume and not list_checkpoints(run.directory / CHECKPOINTS):
        out.print(f"{run.directory} has no checkpoint yet: starting fresh", markup=False, soft_wrap=True)
    reporter = ConsoleReporter(out)
    curve = run.directory / "curve.png"
    try:
        run_training(session, reporter, resume=resume)
    finally:
        reporter.close()
    plot_curve(
        read_metrics(run.directory / METRICS), curve, title=f"{run.method.name} on {run.task.name}, seed {run.seed}"
    )
    tell_result(out, reporter, curve)


@app.command("eval")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(help="A run's directory, pico, pico-qwen3, a model directory or a Hub id.")
    ] = "pico",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[task.key=value ...]", help="Task settings.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task; a run's own when left out.")] = None,
    split: Annotated[str, typer.Option(help="dev or test")] = "test",
    problems: Annotated[int, typer.Option(min=1)] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Samples a problem.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[
        str, typer.Option(metavar="N[,N...]", help="Longest response; with several a table.")
    ] = "128",
    seed: Annotated[int, typer.Option()] = 0,
    loops: Annotated[
        str | None, typer.Option(metavar="N[,N...]|all", help="Loops to run of a looped model; with several a table.")
    ] = None,
    probe: Annotated[str | None, typer.Option(help="localisation, hint or alone, in place of plain accuracy.")] = None,
    relative_to: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model to compare with, problem by problem.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on held-out problems."""
    from mulligan.evalcli import run_evaluation

    given = overrides or []
    if "=" in model and not Path(model).is_dir():  # the model was left out
        model, given = "pico", [model, *given]
    report = run_evaluation(
        model,
        given,
        task=task,
        split=split,
        problems=problems,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        loops=loops,
        probe=probe,
        relative_to=relative_to,
        console=Console(stderr=True),
    )
    if "grid" in report and not as_json:
        out.print(_grid(report.pop("grid")))
    _show(report, as_json)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks and their settings."""
    from mulligan.tasks import TASKS

    rows = [
        {
            "name": t.name,
            "summary": t.summary,
            "oracle": t.has_oracle,
            "settings": _settings(t.Settings),
        }
        for t in TASKS.values()
    ]
    _list(rows, as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods and their settings."""
    from mulligan.methods import PRESETS, build_schedule

    rows = []
    for preset in PRESETS.values():
        built = build_schedule(preset.name)
        phases = built.schedule.methods
        streams = sorted({s.name for m in phases for t in m.terms for s in (*t.reads, *t.credit.reads)})
        rows.append(
            {
                "name": preset.name,
                "summary": preset.summary,
                "paper": preset.paper,
                "changes": sorted({part for m in phases for part in m.changes}),
                "streams": streams,
                "run": built.run,
                "settings": _settings(preset.settings()),
            }
        )
    _list(rows, as_json)


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="pico or pico-qwen3")] = "pico",
    to: Annotated[Path, typer.Option("--to", help="Where to work; run again to go on.")] = Path("runs/base"),
) -> None:
    """Make a pico base from nothing, by the recipe that made the shipped one."""
    from mulligan.base.pretrain import RECIPES, load_recipe, pretrain

    known = sorted(p.stem for p in RECIPES.glob("*.toml"))
    if name not in known:
        raise UserError(f"there is no recipe '{name}' (known: {', '.join(known)})")
    recipe = load_recipe(name)

    def report(record: dict[str, Any]) -> None:
        per = record["seconds"] / record["update"]
        left = (recipe.updates - record["update"]) * per
        out.print(
            f"update {record['update']}/{recipe.updates} phase {record['phase'] + 1}/{len(recipe.phases)} "
            f"{record['nats_per_token']:.3f} nats a token, {left / 60:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )

    pretrain(recipe, to / name, report=report)
    out.print(f"{to / name / 'model'}: mulligan eval {to / name / 'model'}", highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    to: Annotated[Path, typer.Option("--to", help="The directory to write.")],
) -> None:
    """Write a run's newest model as a plain Hugging Face directory."""
    from mulligan.models.loading import save_model
    from mulligan.rundir import load_run_model

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} is {'not empty' if to.is_dir() else 'a file'}")
    loaded, _ = load_run_model(run)
    save_model(loaded.model, loaded.tokenizer, to)
    out.print(f"{to}: AutoModelForCausalLM.from_pretrained({str(to)!r})", highlight=False, markup=False, soft_wrap=True)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[method.key=value ...]", help="The other method's settings.")
    ] = None,
    *,
    step: Annotated[int, typer.Option(min=1, help="A step of the run's log.")],
    method: Annotated[str, typer.Option(help="The other method, as for train.")],
    as_json: Json = False,
) -> None:
    """Show a step's logged rollouts under another method's credit, without training."""
    from mulligan.replay import replay as run_replay

    report = run_replay(run, step, method, overrides or [])
    if as_json:
        print(json.dumps(report, indent=1))
        return
    own, other = report["methods"]["run"], report["methods"]["replay"]
    names = f"run: {_phase(own)}; replay: {_phase(other)}"
    meaning = "A: advantage, the mean over a sample's trained tokens, below it min..max"
    for line in (f"step {step} of {run}", names, report["weights"]["line"], *report["notes"], meaning):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(_advantages(report["samples"]))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("", "run", "replay"):
        table.add_column(name, justify="right" if name else "left")
    for key in ("problems", "rows", "trained_tokens", "gradient_norm", "logged_gradient_norm", "snr"):
        told = [side.get(key) for side in (own, other)]
        table.add_row(key.replace("_", " "), *("-" if n is None else f"{n:.4g}" for n in told))
    out.print(table)
    cosine = report["cosine"]
    out.print(f"cosine of the two gradients {'-' if cosine is None else f'{cosine:.4f}'}", highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and this installation have, and whether the pico base runs."""
    from mulligan.doctor import examine

    facts = examine()
    _show(facts, as_json)
    if not facts["ok"]:
        raise typer.Exit(1)


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """A run file, if one is named first, and the overrides."""
    if arguments and "=" not in arguments[0]:
        return Path(arguments[0]), arguments[1:]
    return None, arguments


def _settings(model: Any) -> dict[str, Any]:
    schema = model.model_json_schema()["properties"]
    return {
        k: {"default": v.get("default"), "type": _type(v)} | ({"choices": v["enum"]} if "enum" in v else {})
        for k, v in schema.items()
    }


def _type(field: dict[str, Any]) -> str:
    """``integer``, or ``integer or null`` where there are several."""
    return " or ".join(_type(kind) for kind in field["anyOf"]) if "anyOf" in field else str(field.get("type", "any"))


def _list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        published = by_name.get(f"{row['name']}-published")
        if row["name"].removesuffix("-published") in by_name.keys() - {row["name"]}:
            continue  # told beside the preset of our own
        note = f" (arXiv {row['paper']})" if row.get("paper") else ""
        lines = [f"{row['summary']}{note}", f"[dim]{_words(_defaults(row))}[/]"]
        if "changes" in row:
            read = ", ".join(row["streams"]) or "policy_logprobs alone"
            lines.append(f"[dim]changes: {', '.join(row['changes']) or 'nothing (the baseline)'}; reads: {read}[/]")
        if published:
            other = {k: v for k, v in _defaults(published).items() if v != row["settings"][k]["default"]}
            lines.append(f"[dim]-published: {_words(other | published['run']) or 'the same'}[/]")
        table.add_row(f"[bold]{row['name']}[/]", "\n".join(lines))
    out.print(table)


def _defaults(row: dict[str, Any]) -> dict[str, Any]:
    return {key: setting["default"] for key, setting in row["settings"].items()}


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{k}={'' if v is None else v}" for k, v in settings.items())


def _grid(entries: list[dict[str, Any]]) -> Table:
    """One row a pair of loops and token limit, at most 80 columns wide."""
    from mulligan.console import interval

    names = ["loops", "limit", "pass@1 [95 %]", "steps", "length", "cut"]
    compared = "pass@1_difference" in entries[0]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in [*names, "points [95 %]"] if compared else names:
        table.add_column(name, justify="right", no_wrap=name in ("loops", "limit"))
    for entry in entries:
        right = entry["process_correct"]
        row = [
            "-" if entry["loops"] is None else str(entry["loops"]),
            str(entry["max_new_tokens"]),
            interval(entry),
            "-" if right is None else f"{right:.3f}",
            f"{entry['length']:.0f}",
            f"{entry['truncated']:.3f}",
        ]
        if compared:
            difference, low, high = (100 * entry[f"pass@1_difference{end}"] for end in ("", "_low", "_high"))
            row.append(f"{difference:+.1f} [{low:.1f}, {high:.1f}]")
        table.add_row(*row)
    return table


def _phase(side: dict[str, Any]) -> str:
    return side["name"] + (f" (now {side['phase']})" if side["phase"] != side["name"] else "")


def _advantages(samples: list[dict[str, Any]]) -> Table:
    """One row a sample, both methods' advantages side by side, 80 columns wide."""
    widths = {"problem": 11, "origin": 9, "verdict": 8, "A run": 14, "A replay": 14, "response": 19}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in widths.items():
        table.add_column(name, width=width, no_wrap=name == "response", justify="right" if name[:2] == "A " else "left")
    before = None
    for sample in samples:
        problem = sample["problem"].partition("/")[2]
        cells = ["" if problem == before else problem, sample["origin"], sample["verdict"]]
        cells += [_advantage(sample["run"]), _advantage(sample["replay"]), " ".join(sample["response"].split())]
        table.add_row(*map(Text, cells))
        before = problem
    return table


def _advantage(told: dict[str, Any] | None) -> str:
    """The mean over the trained tokens, and below it from where to where, unless it is the same on all of them."""
    if told is None:
        return "not trained"
    low, mean, high = (f"{told[key] or 0:+.3g}" for key in ("min", "mean", "max"))
    return mean if told["min"] == told["max"] else f"{mean}\n{low}..{high}"


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for key, value in facts.items():
        shown = (
            f"{value:.4g}"
            if isinstance(value, float)
            else json.dumps(value)
            if isinstance(value, dict | list)
            else str(value)
        )
        table.add_row(key, shown)
    out.print(table)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"mulligan: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(code)


def main() -> None:
    """The entry point: user errors become one line and exit code 2, signals 128 + their number."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mulligan.stopping import Stopped

    try:
        code = app(prog_name="mulligan", standalone_mode=False)
    except UserError as error:
        _fail(" ".join(str(error).split("\n")), 2)
    except Stopped as stopped:
        _fail(f"{stopped}: every completed step is saved; --resume goes on", stopped.exit_code)
    except Exception as error:
        # An unknown option or a wrong type. Which package holds the class of these depends on typer's version.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        message = " ".join(describe().split())
        if not message:  # no arguments at all: the help is printed already
            raise SystemExit(2) from None
        _fail(message, 2)
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

"""The command line. Only this module and ``console`` print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
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
    from mulligan.loggers import build_loggers
    from mulligan.report.curve import plot_curve
    from mulligan.rundir import CHECKPOINTS, RUN
    from mulligan.session import prepare
    from mulligan.train import train as run_training

    file, overrides = _split(arguments or [])
    if resume and file is None and to is not None and (to / RUN).is_file():
        file = to / RUN  # a run knows its own settings
    flags = {"method.name": method, "task.name": task, "model.name": model, "steps": steps, "seed": seed}
    run = load_run(file, overrides, {**flags, "out": None if to is None else str(to)})
    build_loggers(run.log, run.directory)  # before a model is loaded: what is absent is told at once
    session = prepare(run)
    if dry_run:
        out.print(to_toml(session.resolved), highlight=False, markup=False, soft_wrap=True, end="")
        for note in [*session.task.notes(), *session.learner.notes()]:
            out.print(f"# {note}", highlight=False, markup=False, soft_wrap=True)
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
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE.toml] [task.key=value ...]",
            help="A suite, a TOML file with a table for each task; settings of the task, of several label.key=value.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="[LABEL=]NAME", help="A task, several times for several; a run's own when left out."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="dev or test", show_default="test")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Of each task.", show_default="256")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples a problem.", show_default="8")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy.", show_default="a run's own, else 1.0")
    ] = None,
    max_new_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Longest response; a row for each.", show_default="a run's own, else 128"
        ),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a response; several times for several.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", show_default="0")] = None,
    loops: Annotated[
        str | None, typer.Option(metavar="N[,N...]|all", help="Loops to run of a looped model; a row for each.")
    ] = None,
    exit_threshold: Annotated[
        str | None,
        typer.Option(metavar="T[,T...]", help="Exit probability at which a looped model stops; a row for each."),
    ] = None,
    probe: Annotated[str | None, typer.Option(help="localisation, hint or alone, in place of plain accuracy.")] = None,
    relative_to: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model to compare with, problem by problem.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A directory for settings, every sample and the report.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the evaluation in --out.")] = False,
    chat: Annotated[
        str | None, typer.Option(metavar="auto|on|off", help="Prompts as a user's turn; a run's own when left out.")
    ] = None,
    thinking: Annotated[
        str | None, typer.Option(metavar="on|off", help="The chat template's enable_thinking; its own when left out.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; a run has its own")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; CUDA where there is one")] = None,
    kernels: Annotated[
        bool | None, typer.Option("--kernels/--no-kernels", help="Decode with C++ on a CPU; a run has its own")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Samples that decode at a time.")] = 512,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run its own Python code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a model on held-out problems of one task or several."""
    from mulligan.evalcli import numbers_of, run_evaluation, switch_of, thresholds_of
    from mulligan.report.table import evaluation_table
    from mulligan.stopping import Stopped, Stopper

    given = arguments or []
    if ("=" in model or model.endswith(".toml")) and not Path(model).is_dir():  # the model was left out
        model, given = "pico", [model, *given]
    flags: dict[str, Any] = {"split": split, "problems": problems, "samples": samples, "temperature": temperature}
    flags |= {"seed": seed, "stop": stop}
    if max_new_tokens is not None:
        flags["max_new_tokens"] = numbers_of("--max-new-tokens", max_new_tokens)
    if loops is not None:
        flags["loops"] = loops if loops == "all" else numbers_of("--loops", loops, or_else=", or 'all'")
    if exit_threshold is not None:
        flags["exit_threshold"] = thresholds_of("--exit-threshold", exit_threshold)
    how: dict[str, Any] = {"chat": chat, "system": system, "dtype": dtype, "device": device, "kernels": kernels}
    how["thinking"] = None if thinking is None else switch_of("--thinking", thinking)
    how["trust_remote_code"] = trust_remote_code or None
    try:
        with Stopper().listening():
            report = run_evaluation(
                model,
                given,
                tasks=task or [],
                flags={key: value for key, value in flags.items() if value is not None},
                model_flags={key: value for key, value in how.items() if value is not None},
                max_rows=max_rows,
                probe=probe,
                relative_to=relative_to,
                directory=to,
                resume=resume,
                console=Console(stderr=True),
            )
    except Stopped as stopped:
        kept = "nothing is kept without --out DIR" if to is None else "what was sampled is kept; --resume goes on"
        _fail(f"{stopped}: {kept}", stopped.exit_code)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        out.print(evaluation_table(report), highlight=False)


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks and their settings."""
    from mulligan.tasks import TASKS

    rows = [
        {
            "name": t.name,
            "summary": t.summary,
            "oracle": t.has_oracle,
            "preset_of": next((base.name for base in t.__mro__[1:] if getattr(base, "name", "") in TASKS), None),
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
    to: Annotated[
        Path | None, typer.Option("--to", help="The directory to write; 'export' in the run's when left out.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, in PEFT's layout.")] = False,
) -> None:
    """Write a run's newest checkpoint as a plain Hugging Face directory with a model card."""
    from mulligan.export import export_run

    written = export_run(run, to, adapter=adapter)
    loader = "PeftModel.from_pretrained(base, {})" if adapter else "AutoModelForCausalLM.from_pretrained({})"
    out.print(f"{written}: {loader.format(repr(str(written)))}", highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings={"ignore_unknown_options": True})  # so that an answer may be -7
def grade(
    gold: Annotated[str | None, typer.Argument(help="The right answer, or a solution that ends with it.")] = None,
    answer: Annotated[str | None, typer.Argument(help="The answer to judge, or a response that ends with it.")] = None,
    percent: Annotated[
        bool, typer.Option("--percent", help="The task's answers are percentages: 10% and 10 are the same.")
    ] = False,
    jsonl: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows with gold and answer, - for standard input; JSON out.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes side by side.")] = None,
) -> None:
    """Judge an answer: correct, wrong or unscorable, and why. The exit code is 0 for each of them."""
    from mulligan.gradecli import grade_lines

    _print_lines(grade_lines(gold, answer, file=jsonl, percent=percent, workers=workers))


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


def _print_lines(lines: Iterable[str]) -> None:
    """Each as it comes. What the terminal's encoding lacks is escaped; a reader that has seen enough is no error."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        for line in lines:
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends


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
        settings = _defaults(row)
        if row.get("preset_of"):
            usual = _defaults(by_name[row["preset_of"]])
            settings = {k: v for k, v in settings.items() if k not in usual or v != usual[k]}
        told = f"{_words(settings)}; the rest as {row['preset_of']}" if row.get("preset_of") else _words(settings)
        lines = [f"{row['summary']}{note}", f"[dim]{told}[/]"]
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
    shown = {k: json.dumps(v) if isinstance(v, str) and v.strip() != v else v for k, v in settings.items()}
    return " ".join(f"{k}={'' if v is None else v}" for k, v in shown.items())


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

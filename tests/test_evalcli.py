"""``mulligan eval`` over several tasks, from suites, and killed and resumed."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan import evalcli
from mulligan.evalrun import CHUNKS, REPORT, SAMPLES, SETTINGS, EvaluationRun
from mulligan.evalsuite import Cell, parts_of_line, parts_of_suite
from mulligan.models.loading import load_model, save_model
from mulligan.report.table import evaluation_table
from mulligan.tasks.boolean import Boolean
from mulligan.tasks.chain import Chain
from mulligan.types import Grade, Verdict
from tests.e2e.helpers import SMALL, call, make_model, refused
from tests.e2e.kill_at import coin
from tests.e2e.test_real_model import byte_level_bpe
from tests.helpers import needs_compiler

EVAL = ("--problems", "5", "--samples", "4", "--max-new-tokens", "12")
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}={{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a={% if enable_thinking is defined and enable_thinking %}1{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model whose tokenizer has a chat template that reads enable_thinking."""
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = TEMPLATE
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, bos_token_id=None))
    folder = tmp_path_factory.mktemp("models") / "chatty"
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, "verify", coin)  # so that numbers are not all 0
    monkeypatch.setattr(Boolean, "verify", coin)


def told(*argv):
    said = call("eval", *argv, "--json")
    assert (said.code, said.err) == (0, ""), said
    return json.loads(said.out)


def shown(report) -> list[str]:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evaluation_table(report))
    return console.export_text().splitlines()


# --- several tasks --------------------------------------------------------------------------------------


def test_several_tasks_are_their_single_evaluations(tiny):
    report = told(tiny, *EVAL, "--task", "chain", "--task", "hard=chain", "--task", "boolean", "hard.level=4")
    assert tuple(report) == ("grid", "average", "notes", "settings")
    alone = [("--task", "chain"), ("--task", "chain", "task.level=4"), ("--task", "boolean")]
    for entry, label, argv in zip(report["grid"], ["chain", "hard", "boolean"], alone, strict=True):
        single = told(tiny, *EVAL, *argv)
        assert entry == {
            **{"task": label, "loops": None, "exit_threshold": None, "max_new_tokens": 12},
            **{key: value for key, value in single.items() if key not in ("notes", "settings")},
        }
        own = report["settings"]["evaluate"][label]
        assert own == {key: single["settings"][key] for key in own}
    (average,) = report["average"]
    assert average["task"] == "average"
    for name in ("pass@1", "pass@4", "maj@4", "length"):
        assert average[name] == pytest.approx(sum(entry[name] for entry in report["grid"]) / 3)
        assert average[f"{name}_low"] <= average[name] <= average[f"{name}_high"]


def test_the_average_of_a_grid_is_for_each_place(tiny):
    report = told(tiny, *EVAL, "--task", "chain", "--task", "boolean", "--loops", "1,2", "--relative-to", tiny)
    first, second = report["average"]
    assert (first["loops"], second["loops"], len(report["grid"])) == (1, 2, 4)
    of_two = [entry["pass@1"] for entry in report["grid"] if entry["loops"] == 2]
    assert second["pass@1"] == pytest.approx(sum(of_two) / 2)
    assert first["pass@1_difference"] == 0


def test_a_suite_is_what_its_tables_say(tiny, tmp_path):
    (tmp_path / "suite.toml").write_text(
        'samples = 4\nproblems = 5\nmax_new_tokens = 12\n[[evaluate]]\ntask.name = "chain"\n'
        '[[evaluate]]\nlabel = "hard"\ntask = { name = "chain", level = 4 }\n'
        '[[evaluate]]\ntask.name = "boolean"\nsamples = 2\nloops = "all"\ntemperature = 0\nsplit = "dev"\n'
    )
    report = told(tiny, "suite.toml")
    line = told(tiny, *EVAL, "--task", "chain", "--task", "hard=chain", "hard.level=4")
    assert report["grid"][:2] == line["grid"]
    assert [(e["task"], e["loops"], e["samples"]) for e in report["grid"][2:]] == [("boolean", n, 2) for n in (1, 2)]
    assert report["settings"]["evaluate"]["boolean"]["split"] == "dev"
    assert "average" not in report or report["average"] == []  # no place is common to all
    over = told(tiny, "suite.toml", "--samples", "3", "--loops", "2", "hard.level=1")
    assert {entry["samples"] for entry in over["grid"]} == {3}
    assert over["settings"]["evaluate"]["hard"]["task"]["level"] == 1
    assert len(over["average"]) == 1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("samples = 2", ["no [[evaluate]] table"]),
        ("evaluate = []", ["evaluate"]),
        ("[[evaluate]]\nproblms = 3", ["evaluate 1", "'problms'", "did you mean 'problems'"]),
        ("sampels = 2\n[[evaluate]]\ntask.name='chain'", ["'sampels'", "did you mean 'samples'"]),
        ("[[evaluate]]\nproblems = 3", ["evaluate 1", "task"]),
        ("[[evaluate]]\ntask.level = 3", ["evaluate 1", "task.name is missing"]),
        ("[[evaluate]]\ntask = 'chain'", ["evaluate 1", 'task.name = "..."', "'chain'"]),
        ("[[evaluate]]\ntask.name='chain'\n[[evaluate]]\ntask.name='chain'", ["two tasks are called 'chain'", "label"]),
        ("[[evaluate]]\ntask.name='chain'\nlabel='a b'", ["evaluate 1", "label"]),
        ("[[evaluate]]\ntask.name='chain'\nmax_new_tokens=[8, 0]", ["max_new_tokens", "0 must be"]),
        ("[[evaluate]]\ntask.name='chain'\nmax_new_tokens=[8, 8]", ["max_new_tokens", "8 is named twice"]),
        ("[[evaluate]]\ntask.name='chain'\nmax_new_tokens=[]", ["max_new_tokens", "at least one"]),
        ("[[evaluate]]\ntask.name='chain'\nmax_new_tokens=true", ["max_new_tokens"]),
        ("[[evaluate]]\ntask.name='chain'\nexit_threshold=1.5", ["exit_threshold", "1.5", "from 0 to 1"]),
        ("[[evaluate]]\ntask.name='chain'\nloops='some'", ["loops"]),
        ("[[evaluate]]\ntask.name='chain'\nsamples='3'", ["evaluate 1", "samples", "'3'"]),
        ("[[evaluate]]\ntask.name='chain'\nsplit='train'", ["evaluate 1", "split", "'train'"]),
        ("[[evaluate]]\ntask.name='chain'\n[[evaluate]]\ntask={name='boolean', levl=1}", ["boolean.levl", "level"]),
        ("[[evaluate]]\ntask.name='chian'", ["'chian'", "did you mean 'chain'"]),
        ("[[evaluate", ["suite.toml"]),
    ],
)
def test_a_wrong_suite(text, parts, tmp_path, tiny):
    (tmp_path / "suite.toml").write_text(text)
    refused(call("eval", tiny, "suite.toml"), *parts)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--task", "chain", "--task", "chain"], ["two tasks are called 'chain'", "--task first=NAME"]),
        (["--task", "chain", "--task", "boolean", "task.level=2"], ["say which task: chain.level=2", "boolean"]),
        (["--task", "chain", "--task", "boolean", "chian.level=2"], ["'chian.level=2'", "did you mean 'chain'"]),
        (["--task", "chain", "--task", "boolean", "level=2"], ["'level=2'", "label.key=value alone"]),
        (["--task", "a=chain", "--task", "boolean", "a.levl=2"], ["a.levl", "did you mean 'level'"]),
        (["--task", "a=chain", "a.name=boolean"], ["'a' is the task chain"]),
        (["--task", "=chain"], ["--task", "LABEL=NAME"]),
        (["--task", "a="], ["--task", "LABEL=NAME"]),
        (["boolean.level=2"], ["'boolean.level=2'", "known: chain"]),
        (["nowhere.toml"], ["nowhere.toml", "cannot read"]),
        (["pico"], ["'pico' is neither"]),
        (["suite.toml", "--task", "chain"], ["--task", "suite.toml"]),
        (["--exit-threshold", "2"], ["--exit-threshold", "'2'", "from 0 to 1"]),
        (["--exit-threshold", "0.5,0.50"], ["--exit-threshold", "0.5 is named twice"]),
        (["--exit-threshold", "nan"], ["--exit-threshold", "'nan'"]),
        (["--resume"], ["--resume", "--out"]),
        (["--probe", "hint", "--out", "new"], ["--out", "--probe"]),
        (["--probe", "hint", "--task", "chain", "--task", "boolean"], ["--probe hint", "single task"]),
        (["--chat", "maybe"], ["model.chat", "'maybe'"]),
        (["--chat", "on"], ["chat", "no chat template"]),
        (["--thinking", "maybe"], ["--thinking", "'maybe'", "on or off"]),
        (["--thinking", "on"], ["thinking", "no chat template"]),
        (["--system", "Be brief."], ["system", "no chat template"]),
        (["--dtype", "float8"], ["dtype", "'float8'"]),
        (["--device", "gpu"], ["device 'gpu'"]),
        (["--max-rows", "0"], ["--max-rows"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--seed", "1.5"], ["--seed"]),
    ],
)
def test_a_wrong_word(argv, parts, tiny):
    refused(call("eval", tiny, *argv), *parts)


def test_loops_are_for_looped_models(chatty, tmp_path):
    refused(call("eval", chatty, "--exit-threshold", "0.5"), "--exit-threshold", "has no loops")
    (tmp_path / "suite.toml").write_text("[[evaluate]]\ntask.name='chain'\nloops=1\n")
    refused(call("eval", chatty, "suite.toml"), "suite.toml: chain: loops", "has no loops")


def test_labels_and_rows():
    """A label may hold a dot; settings go to the longest that fits; rows are loops, then thresholds, then limits."""
    parts = parts_of_line(
        ["a=chain", "a.b=chain", "boolean"],
        {"loops": "all", "exit_threshold": [0.5, 1.0], "max_new_tokens": [8]},
        ["a.b.level=4", "a.level=2", 'a.answer="one"'],
        {
            "task": {"name": "chain", "level": 3, "seed": 9},
            "sampling": {"temperature": 0.5, "max_new_tokens": 64, "stop": [";"]},
        },
    )
    assert {(p.how.temperature, *p.how.max_new_tokens, *p.how.stop) for p in parts} == {(0.5, 8, ";")}
    assert [p.settings for p in parts] == [
        {"level": 2, "seed": 9, "answer": "one"},
        {"level": 4, "seed": 9},
        {},
    ]
    cells = parts[0].with_cells(2).cells
    assert cells == tuple(Cell(n, q, 8) for n in (1, 2) for q in (0.5, 1.0))


def test_a_suite_does_not_depend_on_the_run(tmp_path):
    (tmp_path / "suite.toml").write_text("[[evaluate]]\ntask.name='chain'\n")
    assert parts_of_suite(tmp_path / "suite.toml", {}, [])[0].settings == {}


def test_stop_strings(tiny):
    """Behind the first semicolon nothing follows."""
    free, stopped = (told(tiny, *EVAL, *more, "--out", name) for name, more in (("a", ()), ("b", ("--stop", ";"))))
    assert stopped["settings"]["stop"] == [";"] and stopped["length"] < free["length"]
    said = [json.loads(line)["response"] for line in Path("b", SAMPLES).read_text().splitlines()]
    whole = [json.loads(line)["response"] for line in Path("a", SAMPLES).read_text().splitlines()]
    assert said == [text[: text.index(";") + 1] if ";" in text else text for text in whole]


def test_the_suite_in_the_documentation_is_one(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "evaluation.md"
    (text,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "suite.toml").write_text(text)
    first, second = parts_of_suite(tmp_path / "suite.toml", {}, [])
    assert (first.label, first.how.samples, first.how.max_new_tokens) == ("gsm8k", 8, [2048])
    assert (second.label, second.settings, second.how.problems, second.how.loops) == ("long", {"level": 5}, 512, "all")


# --- exits ----------------------------------------------------------------------------------------------


def test_exit_thresholds(tiny):
    """At 0 every token is read out of the first loop, as with --loops 1; at 1 none leaves early."""
    never, always = told(tiny, *EVAL, "--exit-threshold", "1,0")["grid"]
    one, two = told(tiny, *EVAL, "--loops", "1,2")["grid"]
    assert (never["exit_threshold"], always["exit_threshold"], always["exit_loop"]) == (1.0, 0.0, 1.0)
    assert "exit_loop" not in never
    places = ("loops", "exit_threshold", "exit_loop")
    for left, right in ((always, one), (never, two)):
        assert {k: v for k, v in left.items() if k not in places} == {k: v for k, v in right.items() if k not in places}


# --- directories ----------------------------------------------------------------------------------------

LONG = ("--problems", "70", "--samples", "2", "--max-new-tokens", "8", "--task", "chain", "--task", "boolean")
MORE = ("--exit-threshold", "0.5")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_after(chunks: int, *argv: str | Path) -> None:
    """``mulligan eval`` in a fork that is killed while it writes a chunk after so many."""
    child = os.fork()
    if child == 0:
        write, seen = EvaluationRun._write, []

        def then_die(self, file, name, text):
            seen.append(name)
            if seen.count(SAMPLES) > chunks:  # half of the samples are there
                write(self, file, name, text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, file, name, text)

        EvaluationRun._write = then_die  # type: ignore[method-assign]
        call("eval", *argv)
        os._exit(1)  # it should not have come so far
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_killed_and_resumed_is_never_killed(tiny, tmp_path):
    """4 chunks: 64 and 6 problems of each of two tasks."""
    whole = told(tiny, *LONG, *MORE, "--out", "whole")
    assert json.loads((tmp_path / "whole" / REPORT).read_text()) == whole
    assert json.loads((tmp_path / "whole" / SETTINGS).read_text()) == whole["settings"]
    assert whole == told(tiny, *LONG, *MORE)  # keeping samples changes no number
    assert whole["grid"][0]["exit_loop"] > 1
    for at, chunks in enumerate((0, 1, 3)):
        folder = tmp_path / f"killed{at}"
        killed_after(chunks, tiny, *LONG, *MORE, "--out", folder)
        assert REPORT not in files(folder)
        assert len(files(folder)[CHUNKS].splitlines()) == chunks
        with (folder / CHUNKS).open("ab") as file:
            file.write(b'{"task": "cha')  # a line that was cut short
        assert told(tiny, *LONG, *MORE, "--out", folder, "--resume") == whole
        assert files(folder) == files(tmp_path / "whole")


def test_a_finished_evaluation_is_only_read(tiny, tmp_path, monkeypatch):
    argv = (tiny, *EVAL, "--relative-to", tiny, "--out", "new")
    whole = told(*argv, "--resume")  # there is nothing yet to go on with
    before = files(tmp_path / "new")
    monkeypatch.setattr(evalcli.EmbeddedSampler, "run", lambda *_: pytest.fail("it samples again"))
    assert told(*argv, "--resume") == whole
    assert files(tmp_path / "new") == before


def test_every_sample_is_kept(tiny, tmp_path):
    report = told(tiny, *EVAL, "--loops", "1,2", "--out", "new")
    lines = [json.loads(line) for line in (tmp_path / "new" / SAMPLES).read_text().splitlines()]
    assert len(lines) == 2 * 5 * 4
    assert [line["attempt"] for line in lines[:5]] == [0, 1, 2, 3, 0]
    assert {line["problem"] for line in lines} == {f"chain/test/{n}" for n in range(5)}
    for entry in report["grid"]:
        mine = [line for line in lines if line["loops"] == entry["loops"]]
        assert sum(line["verdict"] == "pass" for line in mine) / 20 == pytest.approx(entry["pass@1"])
        assert sum(line["length"] for line in mine) / 20 == pytest.approx(entry["length"])
        assert sum(line["truncated"] for line in mine) / 20 == pytest.approx(entry["truncated"])
    assert all(line["answer"] == line["response"][:3] for line in lines)  # as the coin says


@needs_compiler
def test_kernels_sample_the_same(tiny, tmp_path):
    """Of looped models and of others; and a run keeps what it was trained with."""
    for model in (tiny, "pico"):
        plain, kernels = (told(model, *EVAL, *more) for more in ((), ("--kernels",)))
        assert kernels["settings"]["kernels"] and not plain["settings"]["kernels"]
        for key in ("pass@1", "length"):
            assert kernels[key] == pytest.approx(plain[key], abs=1e-9)
    few = ("sampling.prompts=2", "eval.problems=2", "model.kernels=true")
    said = call("train", "--steps", "1", *few, "--out", "run")
    assert said.code == 0, said
    assert told("run", *EVAL)["settings"]["kernels"]
    assert not told("run", *EVAL, "--no-kernels")["settings"]["kernels"]


def test_a_directory_holds_one_evaluation(tiny, tmp_path):
    argv = (tiny, *EVAL, "--out", "new")
    told(*argv)
    before = files(tmp_path / "new")
    refused(call("eval", *argv), "new holds an evaluation", "--resume")
    for more, key in (
        (("--samples", "2"), "samples was 4, now 2"),
        (("--seed", "1"), "seed was 0, now 1"),
        (("task.level=1",), "task.level was 3, now 1"),
        (("--max-rows", "8"), "max_rows was 512, now 8"),
        (("--loops", "1"), "loops was None, now 1"),
        (("--kernels",), "kernels was False, now True"),
        (("--relative-to", tiny), "relative_to was 'absent'"),
        (("--task", "chain", "--task", "boolean"), "task.name was 'chain'"),
    ):
        refused(call("eval", *argv, *more, "--resume"), "settings.json: cannot resume with other settings", key)
    assert files(tmp_path / "new") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    refused(call("eval", tiny, *EVAL, "--out", "other"), "other is not empty and holds no evaluation")
    refused(call("eval", tiny, *EVAL, "--out", "file"), "file is a file")


def test_other_weights_are_another_evaluation(tmp_path):
    model = make_model(tmp_path / "model")
    told(model, *EVAL, "--out", "new")
    loaded = load_model(str(model))
    with torch.no_grad():
        next(iter(loaded.model.parameters())).view(-1)[0] += 1
    loaded.model.save_pretrained(model)
    refused(call("eval", model, *EVAL, "--out", "new", "--resume"), "weights was 'sha256:")


def test_one_process_writes(tiny, tmp_path):
    report = told(tiny, *EVAL, "--out", "new")
    with EvaluationRun(tmp_path / "new", report["settings"], resume=True):
        refused(call("eval", tiny, *EVAL, "--out", "new", "--resume"), "another process is writing")


def test_damage_is_found(tiny, tmp_path):
    argv = (tiny, *EVAL, "--out", "new")
    told(*argv)
    samples = tmp_path / "new" / SAMPLES
    text = samples.read_text()
    for damaged, said in (
        (text[:-40], f"{CHUNKS} says {len(text.encode())}: it was cut"),
        (text.replace("{", "[", 1), "damaged"),
        (text.replace('"prompt": "x', '"prompt": "y', 1), "chain/test/0 is another problem now"),
    ):
        samples.write_text(damaged)
        refused(call("eval", *argv, "--resume"), SAMPLES, said)
        assert samples.read_text() == damaged


@pytest.mark.parametrize(
    ("more", "said"), [((), "nothing is kept without --out"), (("--out", "new"), "--resume goes on")]
)
def test_an_interrupt_is_one_line(more, said, tiny, monkeypatch):
    monkeypatch.setattr(evalcli, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    got = call("eval", tiny, *EVAL, *more)
    assert got.code == 128 + signal.SIGINT and said in got.err and got.err.count("\n") == 1


# --- notes ----------------------------------------------------------------------------------------------


def test_unscorable_responses_are_told(tiny, monkeypatch):
    def half(self, problem, response):
        grade = coin(self, problem, response)
        lost = problem.index == 0
        return Grade(verdict=Verdict.UNSCORABLE, reward=0.0, reason="out of time") if lost else grade

    monkeypatch.setattr(Chain, "verify", half)
    report = told(tiny, *EVAL)
    assert (report["unscorable"], report["problems"]) == (4, 4)
    assert report["notes"] == ["20.0% of the responses could not be scored, and are left out of all numbers"]
    lines = [line.rstrip() for line in shown(report)]
    assert "note: 20.0% of the responses could not be scored, and are left out of all" in lines
    both = told(tiny, *EVAL, "--task", "chain", "--task", "boolean")
    assert both["notes"][0].startswith("chain, 12 tokens: 20.0%") and len(both["notes"]) == 1


def test_a_small_split_is_told(tiny, tmp_path):
    rows = [json.dumps({"question": f"{i}+1{'+0' * 40}", "answer": str(i + 1)}) for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    wide = make_model(tmp_path / "wide", context=256)
    argv = (wide, "--task", "jsonl", "task.path=.", "--samples", "1", "--max-new-tokens", "4")
    assert told(*argv)["settings"]["problems"] == 3
    assert told(*argv, "--problems", "9")["notes"] == ["jsonl: its test split has 3 problems, not 9"]
    refused(call("eval", tiny, *argv[1:]), "jsonl: the", "leave no room", "jsonl/test/")  # a context of 96


# --- runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(chatty, tmp_path_factory):
    """A run of one step on a model with a chat, thinking switched on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "verify", coin)
        argv = ("--model", chatty, "--steps", "1", "--out", folder, "task.level=2", "model.thinking=true", *SMALL)
        said = call("train", *argv, "eval.every=0")
    assert said.code == 0, said
    return folder


def prompts(monkeypatch) -> list[str]:
    """What the sampler is shown from here on."""
    found, original = [], evalcli.EmbeddedSampler.run

    def noted(self, requests, on_done):
        found.extend(self.tokenizer.decode(request.context) for request in requests)
        return original(self, requests, on_done)

    monkeypatch.setattr(evalcli.EmbeddedSampler, "run", noted)
    return found


def test_a_run_is_asked_as_it_was_trained(run, monkeypatch):
    asked = prompts(monkeypatch)
    report = told(run, *EVAL)
    settings = report["settings"]
    assert (settings["chat"], settings["thinking"], settings["step"], settings["task"]["level"]) == (True, True, 1, 2)
    assert all(re.match(r"u=.*a=1$", text) for text in asked), asked
    asked.clear()
    bare = told(run, *EVAL[:4])["settings"]
    assert (bare["max_new_tokens"], bare["temperature"], bare["stop"]) == (12, 1.0, [])  # SMALL has 12
    asked.clear()
    assert told(run, *EVAL, "--thinking", "off")["settings"]["thinking"] is False
    assert all(text.endswith("a=") for text in asked)
    for option in (("--dtype", "bfloat16"), ("--trust-remote-code",)):
        refused(call("eval", run, *EVAL, *option), option[0], "is a run")


def test_a_plain_model_is_asked_as_told(chatty, monkeypatch):
    asked = prompts(monkeypatch)
    assert told(chatty, *EVAL, "--chat", "off")["settings"]["chat"] is False
    assert not any("u=" in text for text in asked)
    asked.clear()
    report = told(chatty, *EVAL, "--relative-to", chatty, "--system", "12", "--dtype", "bfloat16")
    assert all(text.startswith("s=12") for text in asked) and len(asked) == 10
    assert (report["settings"]["system"], report["settings"]["dtype"]) == ("12", "bfloat16")


def test_problems_that_a_run_was_trained_on_are_counted(run, tmp_path):
    """5 test problems, 2 of which are among the run's training problems."""
    assert "overlap" not in told(run, *EVAL)  # its own task
    from mulligan.tasks import build_task

    chain = build_task("chain", {"level": 2})
    questions = [chain.problem("train", 3).prompt, "1+1", chain.problem("train", 8).prompt, "1+2", "1+3"]
    rows = [json.dumps({"question": question, "answer": "1"}) for question in questions]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    argv = (run, *EVAL, "--task", "jsonl", "task.path=.", "task.instruction=")
    report = told(*argv)
    assert report["overlap"] == 2
    assert report["notes"] == ["jsonl: 2 of its 5 problems stand in what the run was trained on"]
    assert told(run, *EVAL, "--task", "boolean")["overlap"] == 0


# --- tables ---------------------------------------------------------------------------------------------


def numbers(**more):
    out = {}
    for key in ("pass@1", "pass@8", "maj@8", "process_correct", "length", "truncated"):
        out |= {key: 0.25, f"{key}_low": 0.125, f"{key}_high": 0.5}
    return out | more


def place(task="chain", loops=None, exit_threshold=None, max_new_tokens=64):
    return {"task": task, "loops": loops, "exit_threshold": exit_threshold, "max_new_tokens": max_new_tokens}


def table(*entries, average=()):
    lines = shown({"grid": entries, "average": average, "notes": [], "settings": {"model": "m"}})
    assert max(map(len, map(str.rstrip, lines))) <= 80
    return lines


def test_a_table_shows_what_tells_its_rows_apart():
    lines = table(place("chain") | numbers(), place("boolean") | numbers(), average=[place("average") | numbers()])
    assert lines[0].split() == ["task", "pass@1", "[95", "%]", "maj@8", "pass@8", "steps", "length", "cut"]
    assert lines[1].split() == ["chain", "0.250", "[0.125,", "0.500]", "0.250", "0.250", "0.250", "0", "0.250"]
    assert [line.split()[:1] for line in lines[2:5]] == [["boolean"], [], ["average"]]
    assert lines[0].index("]") == lines[1].index("]")


def test_a_wide_table_goes_without():
    """Places, accuracy and what is compared stay; the vote goes before the length, and the steps before the vote."""
    rows = [
        place("a-label-that-is-far-too-long", loops, threshold, 2048)
        | numbers(exit_loop=1.5)
        | {"pass@1_difference": 0.1, "pass@1_difference_low": -0.025, "pass@1_difference_high": 0.2}
        for loops in (1, 2)
        for threshold in (0.5, 1.0)
    ]
    lines = table(*rows, place("chain", 1, 0.5, 64) | numbers())
    assert lines[0].split() == ["task", "loops", "exit", "at", "limit", "pass@1", "[95", "%]", "points", "[95", "%]"]
    assert lines[1].split()[0] == "a-label-that-i…" and lines[1].rstrip().endswith("+10.0 [-2.5, 20.0]")
    assert lines[5].split()[-1] == "-"
    lines = table(*(place(max_new_tokens=n) | numbers(exit_loop=1.5) for n in (64, 128)))
    assert lines[0].split()[-1] == "exit" and "steps" in lines[0]


def test_different_numbers_of_samples_are_shown_as_n():
    few = {key: value for key, value in numbers().items() if "@8" not in key} | {"pass@2": 0.75}
    lines = table(place("chain") | numbers(), place("boolean") | few)
    assert "pass@n" in lines[0] and "0.750" in lines[2] and lines[2].split()[4] == "-"


def test_settings_are_printed_whole():
    lines = shown(
        {"pass@1": 0.5, "notes": [], "settings": {"model": "a b", "system": "x\ny", "evaluate": {"q": {"n": 1}}}}
    )
    assert [line.split() for line in lines[-2:]] == [
        ["settings", 'model="a', 'b"', 'system="x\\ny"'],
        ["q", "n=1"],
    ]

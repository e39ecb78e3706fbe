"""``mulligan grade`` as a user calls it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from mulligan import cli
from mulligan.verify.pool import WORKERS_VARIABLE


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setenv(WORKERS_VARIABLE, "1")


@pytest.fixture
def grade(monkeypatch, capsys):
    """The exit code, stdout and stderr of a call."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mulligan", "grade", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, told.out, told.err

    return call


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (["7", "7=x"], "correct"),
        (["7", "8=7"], "wrong"),
        (["", "7"], "unscorable"),
        (["7", ""], "wrong"),
        (["-7", "-7"], "correct"),
        (["7", "-7"], "wrong"),
        (["7", "--", "-7"], "wrong"),
        (["-x", "--", "-x"], "correct"),
        (["-7/2", "-3.5"], "correct"),
        (["10", "10%"], "wrong"),
        (["10", "10%", "--percent"], "correct"),
        (["--percent", "10", "10%"], "correct"),
        (["7", "first line\nsecond \u202e line"], "wrong"),
        (["7", os.fsdecode(b"\xff\xfe")], "wrong"),
        (["7", "-" * 10_000], "wrong"),
        (["$(x)", "[bold]7[/]"], "wrong"),
    ],
)
def test_one_line_whose_first_word_is_the_verdict(grade, arguments, verdict):
    code, out, err = grade(*arguments)
    assert (code, err) == (0, "")
    assert out.endswith("\n") and out.count("\n") == 1
    word, _, reason = out.partition(": ")
    assert word == verdict and reason.strip()


def test_algebra_is_done_by_a_worker(grade):
    assert grade(r"2\sqrt{3}", r"\sqrt{12}")[1].startswith("correct: ")


def test_a_file_gives_a_row_each_in_order(grade, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        ('{"gold": 7, "answer": "7"}', "correct"),
        (r'{"gold": "2\\sqrt{3}", "answer": "\\sqrt{12}", "id": 3}', "correct"),
        ("", None),
        ('{"gold": "0.5", "answer": 0.50}', "correct"),
        ('{"gold": 1e-7, "answer": "0.0000001"}', "correct"),
        ('{"gold": "7", "answer": ""}', "wrong"),
        (json.dumps({"gold": "7", "answer": "\ud800"}), "wrong"),
        (json.dumps({"gold": "7", "answer": "8" * 10**6}), "wrong"),
        (json.dumps({"gold": "", "answer": "7"}), "unscorable"),
        ('{"gold": "x+1", "answer": "1+x"}', "correct"),
    ]
    file.write_text("\n".join(line for line, _ in rows))
    code, out, err = grade("--jsonl", str(file))
    assert (code, err) == (0, "")
    told = [json.loads(line) for line in out.splitlines()]
    assert [row["verdict"] for row in told] == [verdict for _, verdict in rows if verdict]
    for row in told:
        assert row.keys() == {"verdict", "reason", "seconds", "peak_memory"}
        assert row["reason"] and 0 <= row["seconds"] < 6 and 0 <= row["peak_memory"] <= 512 * 2**20
    assert (told[1]["peak_memory"] > 2**20) == sys.platform.startswith("linux")  # it was in a worker


def test_percentages_hold_for_a_file_too(grade, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"gold": "10", "answer": "10%"}\n')
    assert json.loads(grade("--jsonl", str(file))[1])["verdict"] == "wrong"
    assert json.loads(grade("--jsonl", str(file), "--percent")[1])["verdict"] == "correct"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"gold": "7", "answer": "7"}\n{"gold": "7"}', "rows.jsonl:2: 'answer' is missing (the row has 'gold')"),
        ('{"answer": "7"}', "rows.jsonl:1: 'gold' is missing"),
        ('\n{"gold": "7", "answer": null}', "rows.jsonl:2: 'answer' must be text or a number, not null"),
        ('{"gold": true, "answer": "7"}', "'gold' must be text or a number, not true"),
        ('{"gold": "7", "answer": NaN}', "'answer' must be text or a number, not NaN"),
        ('{"gold": "7", "answer": ["7"]}', "'answer' must be text or a number, not [\"7\"]"),
        ('{"gold": "7", "answer": "7"', "rows.jsonl:1: bad JSON"),
        ('["7", "7"]', "rows.jsonl:1: must be an object"),
        ("\n\n", "holds no rows"),
        ("\xff", "not UTF-8"),
    ],
)
def test_a_bad_row_is_one_line_before_anything_is_graded(grade, tmp_path, content, told):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode("latin-1"))
    code, out, err = grade("--jsonl", str(file))
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "takes GOLD and ANSWER, or --jsonl FILE"),
        (["7"], "takes GOLD and ANSWER, or --jsonl FILE"),
        (["7", "8", "9"], "unexpected"),
        (["7", "7", "--jsonl", "rows.jsonl"], "here are both ('7')"),
        (["--jsonl", "no/such/file"], "no/such/file: cannot be read"),
        (["--jsonl", "."], "is a folder"),
        (["--jsnl", "rows.jsonl"], "'--jsnl' is no option of grade (did you mean '--jsonl'?)"),
        (["10", "--percnt"], "did you mean '--percent'?"),
        (["7", "7", "--workers", "2"], "--workers"),
        (["--jsonl", "rows.jsonl", "--workers", "0"], "--workers"),
    ],
)
def test_a_call_that_makes_no_sense_is_one_line_and_2(grade, arguments, told):
    code, out, err = grade(*arguments)
    assert (code, out) == (2, "")
    assert told in err and err.count("\n") == 1


def test_a_wrong_number_of_workers_in_the_environment(grade, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"gold": "7", "answer": "7"}')
    monkeypatch.setenv(WORKERS_VARIABLE, "many")
    assert grade("--jsonl", str(file)) == (2, "", f"mulligan: {WORKERS_VARIABLE}: 'many' must be a number from 1\n")
    assert grade("--jsonl", str(file), "--workers", "1")[0] == 0


def test_what_the_output_cannot_show_is_escaped(monkeypatch):
    """A terminal of ASCII, and a reason that quotes the answer."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    cli._print_lines(iter(["wrong: é \ud800"]))
    narrow.flush()
    assert narrow.buffer.getvalue() == b"wrong: \\xe9 \\ud800\n"  # type: ignore[attr-defined]


def test_standard_input_and_a_reader_that_stops_early(tmp_path):
    """`... | mulligan grade --jsonl - | head -1`: one row, no complaint, the producer's exit code is its own."""
    rows = '{"gold": "7", "answer": "7"}\n' * 20_000
    script = f"{sys.executable} -m mulligan grade --jsonl - | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], input=rows, capture_output=True, text=True, timeout=120
    )
    assert json.loads(done.stdout)["verdict"] == "correct"
    assert (done.returncode, done.stderr) == (0, "")

"""Data sets through ``datasets``, from local copies in the Hub's layouts; nothing is downloaded."""

import datetime
import json
import sys

import datasets
import pytest

from mulligan.errors import UserError
from mulligan.tasks import build_task
from tests.tasks.test_jsonl import DATA, questions, rows_of, write


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def build(path, name="dataset", **settings):
    return build_task(name, {"path": str(path), **settings})


def sizes(task):
    return [task.size(split) for split in ("train", "dev", "test")]


def hub_folder(path, train=40, test=6):
    """As the Hub holds GSM8K: a card with configurations, and Parquet files."""
    (path / "main").mkdir(parents=True)
    for split, rows in (("train", rows_of(train)), ("test", rows_of(test, start=1000))):
        datasets.Dataset.from_list(rows).to_parquet(str(path / "main" / f"{split}-00000-of-00001.parquet"))
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n---\n# A set\n"
    )
    return path


def test_hub_layout(tmp_path):
    task = build(hub_folder(tmp_path / "set"), config="main")
    train, dev, test = sizes(task)
    assert train + dev == 40
    assert test == 6
    assert questions(task, "test") == [row["question"] for row in rows_of(6, start=1000)]
    assert task.problem("test", 0).uid == "dataset/test/0"
    assert task.problem("test", 2).answer == "1003"


@pytest.mark.parametrize("settings", [{}, {"config": "main"}])
def test_a_preset_reads_a_copy_of_its_own_layout(tmp_path, settings):
    assert sizes(build(hub_folder(tmp_path / "set"), "gsm8k", **settings))[2] == 6


def test_a_preset_reads_a_copy_with_other_configurations(tmp_path):
    card = hub_folder(tmp_path / "set") / "README.md"
    card.write_text(card.read_text().replace("config_name: main", "config_name: default"))
    assert build(tmp_path / "set", "gsm8k").size("test") == 6


def test_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read as a data set: BuilderConfig 'socratic' not found"):
        build(hub_folder(tmp_path / "set"), "gsm8k", config="socratic")


def test_data_folder_without_a_card(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows_of(30)).to_parquet(str(tmp_path / "set" / "data" / "train-00000-of-00001.parquet"))
    task = build(tmp_path / "set")
    assert sum(sizes(task)) == 30
    assert min(sizes(task)) > 0  # a set of training rows alone is divided, as one file is
    assert sum(sizes(build(tmp_path / "set", "gsm8k"))) == 30  # a preset's configuration need not be there


def test_saved_to_disk(tmp_path):
    both = {"train": rows_of(30), "validation": rows_of(4, start=500), "test": rows_of(5, start=1000)}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in both.items()}).save_to_disk(tmp_path / "both")
    assert sizes(build(tmp_path / "both")) == [30, 4, 5]
    assert sizes(build(tmp_path / "both", dev_split="test", test_split="validation")) == [30, 5, 4]
    datasets.Dataset.from_list(rows_of(30)).save_to_disk(tmp_path / "one")
    assert sum(sizes(build(tmp_path / "one"))) == 30
    assert sizes(build(tmp_path / "both", max_rows=3)) == [3, 3, 3]


def test_single_files(tmp_path):
    datasets.Dataset.from_list(rows_of(50)).to_parquet(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_list(rows_of(50)).to_csv(str(tmp_path / "a.csv"))
    write(tmp_path / "a.jsonl", rows_of(50))
    found = [build(tmp_path / f"a.{suffix}") for suffix in ("parquet", "csv", "jsonl")]
    assert questions(found[0], "dev") == questions(found[1], "dev") == questions(found[2], "dev") != []
    assert [task.problem("train", 7).answer for task in found] == [found[0].problem("train", 7).answer] * 3


def test_test_split_of_another_set(tmp_path):
    folder = hub_folder(tmp_path / "set")
    own = datasets.Dataset.from_list([*rows_of(1), {"question": "?", "answer": None}])
    own.to_parquet(str(folder / "main" / "test-00000-of-00001.parquet"))
    write(tmp_path / "test.jsonl", [*rows_of(3, start=2000), *rows_of(2)])
    task = build(folder, config="main", test_path=str(tmp_path / "test.jsonl"))
    assert questions(task, "test")[:3] == [row["question"] for row in rows_of(3, start=2000)]
    assert (task.size("test"), task.overlap) == (5, 2)
    assert task.unanswered == 0  # its own test split is not read
    assert task.notes()[0].startswith(f"{folder}: ")


def test_columns_inside_of_objects_and_messages(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i}?"}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(20)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    task = build(tmp_path / "a.parquet", answer_column="reward_model.ground_truth")
    problem = task.problem("train", 0)
    assert problem.data["question"] == f"What is {problem.answer}?"
    assert problem.prompt.startswith(f"What is {problem.answer}?\nPlease")
    with pytest.raises(UserError, match=r"row 0: column 'reward_model\.truth' is missing"):
        build(tmp_path / "a.parquet", answer_column="reward_model.truth")
    with pytest.raises(UserError, match=r"column 'golden' is missing \(columns: prompt, reward_model\)"):
        build(tmp_path / "a.parquet", answer_column="golden")


@pytest.mark.parametrize(
    ("roles", "question"),
    [
        (["user"], "t0"),
        (["user", "assistant"], "t0"),
        (["user", "assistant", "user"], None),
        (["system", "user"], None),
        (["user", "system"], None),
        (["assistant"], None),
        (["assistant", "user"], None),
    ],
)
def test_which_messages_are_a_question(tmp_path, roles, question):
    turns = [{"role": role, "content": f"t{at}"} for at, role in enumerate(roles)]
    write(tmp_path / "test.jsonl", [{"messages": turns, "answer": "1"}])
    if question is not None:
        assert build(tmp_path).problem("test", 0).data["question"] == question
        return
    with pytest.raises(UserError, match=rf"test\.jsonl:1: column 'messages' has the turns {', '.join(roles)};") as told:
        build(tmp_path)
    assert ("a setting of the model" in str(told.value)) == ("system" in roles)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("We add: $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("First \\boxed{3} fails. Then \\boxed{4}.", "4"),
        ("Roots: $\\boxed{3}$ and $\\boxed{5}$.", "3, 5"),
        ("6 + 1 = 7\n#### 7", "7"),
    ],
)
def test_a_solution_holds_its_answer(tmp_path, solution, gold):
    write(tmp_path / "test.jsonl", [{"problem": "q", "solution": solution}])
    problem = build(tmp_path).problem("test", 0)
    assert problem.answer == gold
    assert problem.data["reference"] in solution


def test_a_solution_without_an_answer(tmp_path):
    write(tmp_path / "test.jsonl", [{"problem": "q", "solution": "seven"}])
    with pytest.raises(UserError, match=r"test\.jsonl:1: column 'solution' holds neither \\boxed\{\} nor ####"):
        build(tmp_path)
    assert build(tmp_path, answer_column="solution").problem("test", 0).answer == "seven"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "./nowhere"}, r"^\./nowhere: no such file or folder$"),
        ({"path": "nobody/nothing-of-the-kind"}, "^nobody/nothing-of-the-kind: "),
        ({}, "needs 'path'|no default"),
        ({"path": "{set}", "dev_split": "devel"}, r"^task\.dev_split: .* has no split 'devel' \(known: test, train\)"),
        ({"path": "{set}", "revision": "v1"}, r"^task\.revision: .* is on disk"),
        ({"path": "{broken}"}, r"cannot be read as a data set: "),
        ({"path": "{set}", "pathh": "x"}, r"^task\.pathh: dataset has no such setting \(did you mean 'path'"),
        ({"path": "{set}", "answer_column": ""}, "only a task with 'rewards' can do without answers"),
        ({"path": "{two}"}, r"has the splits a, b; say which is which in 'task\.train_split'"),
    ],
)
def test_errors_are_one_line(tmp_path, settings, message):
    places = {"set": tmp_path / "set", "broken": tmp_path / "a.parquet", "two": tmp_path / "two"}
    both = {"train": rows_of(3), "test": rows_of(2, start=9)}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in both.items()}).save_to_disk(places["set"])
    two = datasets.DatasetDict({k: datasets.Dataset.from_list(rows_of(2)) for k in ("a", "b")})
    two.save_to_disk(places["two"])
    places["broken"].write_bytes(b"PAR1 not at all")
    given = {key: value.format(**places) for key, value in settings.items()}
    with pytest.raises(UserError, match=message) as told:
        build_task("dataset", given)
    assert "\n" not in str(told.value)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mulligan\[data\]'"):
        build("openai/gsm8k")
    write(tmp_path / "train.jsonl", rows_of(30))
    assert build(tmp_path).size("train") > 0  # JSON lines need none


def test_long_questions_are_left_out(tmp_path):
    write(tmp_path / "test.jsonl", [*rows_of(3), {"question": "x" * 60, "answer": 1}])
    task = build(tmp_path, longest_question=50)
    assert (task.size("test"), task.too_long) == (3, 1)
    assert task.notes() == [f"{tmp_path}: 1 questions have over 50 characters and are left out"]
    assert task.left_out() == {"overlap": 0, "unanswered": 0, "too_long": 1}


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are not here")
def test_local_copies_of_the_presets():
    gsm8k = build(DATA / "gsm8k", "gsm8k")
    assert (gsm8k.size("train") + gsm8k.size("dev"), gsm8k.size("test")) == (7473, 1319)
    math = build(DATA / "math", "math", test_path=str(DATA / "math500"))
    assert (math.size("train") + math.size("dev"), math.size("test")) == (7470, 500)
    assert math.unanswered == 4


def test_other_columns_need_not_be_plain(tmp_path):
    rows = [{**row, "when": datetime.datetime(2026, 1, 1), "raw": b"\xff"} for row in rows_of(20)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    json.dumps(dict(build(tmp_path / "a.parquet").problem("train", 0).data))

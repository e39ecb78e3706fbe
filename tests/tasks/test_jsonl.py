import json
from pathlib import Path

import pytest

from mulligan.errors import UserError
from mulligan.tasks.jsonl import Jsonl, JsonlSettings
from mulligan.types import Verdict

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(n, start=0):
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(start, start + n)]


def load(path, **settings):
    return Jsonl(JsonlSettings(path=str(path), **settings))


def questions(task, split):
    return [task.problem(split, i).data["question"] for i in range(task.size(split))]


def test_one_file_is_divided(tmp_path):
    task = load(write(tmp_path / "all.jsonl", rows_of(500)))
    sizes = [task.size(split) for split in ("train", "dev", "test")]
    assert sum(sizes) == 500
    assert 370 < sizes[0] < 430
    assert min(sizes[1:]) > 30
    assert max(sizes[1:]) < 75
    other = load(tmp_path / "all.jsonl", seed=7)
    for split in ("train", "dev", "test"):
        assert sorted(questions(other, split)) == sorted(questions(task, split))
    assert questions(other, "dev") == questions(task, "dev")
    assert questions(other, "train") != questions(task, "train")
    assert task.overlap == 0


def test_folder_without_dev(tmp_path):
    write(tmp_path / "train.jsonl", rows_of(300))
    write(tmp_path / "test.jsonl", rows_of(20, start=1000))
    task = load(tmp_path)
    assert task.size("test") == 20
    assert task.size("train") + task.size("dev") == 300
    assert 15 < task.size("dev") < 50
    assert questions(task, "test") == [row["question"] for row in rows_of(20, start=1000)]


def test_overlapping_training_rows_are_dropped(tmp_path):
    spelled = [{"question": "what IS\n 1001  + 1?", "answer": 5}, {"question": "What is 2001 + 1?", "answer": "5"}]
    write(tmp_path / "train.jsonl", rows_of(10) + spelled)
    write(tmp_path / "test.jsonl", rows_of(5, start=1000))
    write(tmp_path / "dev.jsonl", [*rows_of(5, start=2000), *rows_of(1, start=1003)])
    task = load(tmp_path)
    assert task.overlap == 3
    assert [task.size(split) for split in ("train", "dev", "test")] == [10, 5, 5]


def test_overlap_where_dev_is_carved(tmp_path):
    write(tmp_path / "train.jsonl", rows_of(100))
    write(tmp_path / "test.jsonl", rows_of(40, start=80))
    task = load(tmp_path)
    assert task.overlap == 20
    assert task.size("train") + task.size("dev") == 80
    assert not set(questions(task, "dev")) & set(questions(task, "test"))


def test_training_never_ends_and_every_epoch_is_another_permutation(tmp_path):
    task = load(write(tmp_path / "all.jsonl", rows_of(60)))
    size = task.size("train")
    first, second = ([task.problem("train", e * size + i).data["question"] for i in range(size)] for e in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second
    again = load(tmp_path / "all.jsonl")
    assert again.problem("train", size + 3) == task.problem("train", size + 3)
    assert task.problem("train", size + 3).uid == f"jsonl/train/{size + 3}"


def test_evaluation_splits_end(tmp_path):
    write(tmp_path / "test.jsonl", rows_of(3))
    task = load(tmp_path)
    assert (task.size("train"), task.size("dev"), task.size("test")) == (0, 0, 3)
    with pytest.raises(UserError, match="'test' has 3 problems, there is no problem 3"):
        task.problem("test", 3)
    with pytest.raises(UserError, match="'test' has 3 problems, there is no problem -1"):
        task.problem("test", -1)
    with pytest.raises(UserError, match="'train' has no rows"):
        task.problem("train", 0)
    with pytest.raises(UserError, match="no split 'corpus'"):
        task.size("corpus")


def test_columns(tmp_path):
    rows = [{"id": i, "ask": f"q{i}", "gold": 0.5, "tags": ["x"]} for i in range(2)]
    write(tmp_path / "test.jsonl", rows)
    problem = load(tmp_path, prompt_column="ask", answer_column="gold").problem("test", 1)
    assert problem.data["columns"] == rows[1]
    assert problem.answer == "0.5"
    assert problem.prompt == "q1\nPlease reason step by step, and put your final answer within \\boxed{}."
    json.dumps(dict(problem.data))


@pytest.mark.parametrize("column", ["prompt", "question", "problem"])
def test_usual_columns(tmp_path, column):
    (tmp_path / "test.json").write_text(json.dumps([{column: "q", "answer": "1"}]))
    assert load(tmp_path).problem("test", 0).data["question"] == "q"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(7, "7"), (7.5, "7.5"), (1e-7, "0.0000001"), (" 7 ", "7"), ("so\n#### 1,080", "1,080"), (-3, "-3")],
)
def test_gold(tmp_path, answer, gold):
    problem = load(write(tmp_path / "test.jsonl", [{"prompt": "q", "answer": answer}]).parent).problem("test", 0)
    assert problem.answer == gold


GOOD = '{"prompt": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "test.jsonl: empty"),
        ("\n \n", "test.jsonl: empty"),
        (GOOD + "{oops}\n", r"test\.jsonl:2: bad JSON \(Expecting property name"),
        (GOOD + "\n" + GOOD[:-5], r"test\.jsonl:3: bad JSON"),
        (GOOD + "[1]\n", r"test\.jsonl:2: must be an object"),
        (GOOD + '{"prompt": "q", "gold": "1"}', r":2: column 'answer' is missing \(columns: prompt, gold\)$"),
        ("{}", r":1: column 'prompt, question, problem or messages' is missing \(columns: none\); name yours in"),
        (
            '{"prompt": "q"}',
            r":1: column 'answer, final_answer or solution' is missing .*; name yours in 'answer_column'",
        ),
        (GOOD + '{"prompt": " ", "answer": "1"}', r":2: column 'prompt' is empty"),
        (GOOD + '{"prompt": ["q"], "answer": "1"}', r""":2: column 'prompt' must be text, not \["q"\]"""),
        (GOOD + '{"prompt": "q", "answer": ["1"]}', r""":2: column 'answer' must be text or a number, not \["1"\]"""),
        (GOOD + '{"prompt": "q", "answer": true}', r":2: column 'answer' must be text or a number, not true"),
        (GOOD + '{"prompt": "q", "answer": NaN}', r":2: column 'answer' must be text or a number, not NaN"),
        (GOOD + '{"prompt": "q", "answer": "$"}', r":2: answer \"\$\" would not verify against itself"),
        ('{"prompt": "q", "answer": null}', "none of its 1 rows has an answer"),
        (GOOD + "[" * 100_000, r":2: JSON beyond reason"),
        (GOOD + "9" * 5_000, r":2: JSON beyond reason"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "test.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_malformed_list(tmp_path):
    path = tmp_path / "all.json"
    path.write_text('[\n{"prompt": "q", "answer": "1"},\n{"prompt" "q"}\n]')
    with pytest.raises(UserError, match=r"all\.json:3: bad JSON"):
        load(path)
    path.write_text('[{"prompt": "q", "answer": "1"}, {"prompt": "q"}]')
    with pytest.raises(UserError, match=r"all\.json: item 2: column 'answer' is missing"):
        load(path)


def test_paths(tmp_path):
    with pytest.raises(UserError, match="needs 'path'"):
        Jsonl()
    with pytest.raises(UserError, match="no such file or folder"):
        load(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"none of train\.jsonl, dev\.jsonl and test\.jsonl"):
        load(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b'{"prompt": "\xff", "answer": "1"}')
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path)
    (tmp_path / "test.json").write_text("[]")
    with pytest.raises(UserError, match="keep one"):
        load(tmp_path)


def test_named_column_is_missing(tmp_path):
    write(tmp_path / "test.jsonl", rows_of(1))
    with pytest.raises(UserError, match=r":1: column 'ask' is missing \(columns: question, answer\)"):
        load(tmp_path, prompt_column="ask")


def test_line_separators_inside_strings(tmp_path):
    (tmp_path / "test.jsonl").write_text('\ufeff{"prompt": "a\u2028b", "answer": "1"}\r\n', encoding="utf-8")
    assert load(tmp_path).problem("test", 0).data["question"] == "a\u2028b"


@pytest.fixture
def gsm(tmp_path):
    row = {"question": "How many?", "answer": "She has 3+4=<<3+4=7>>7.\nAll in all.\n#### 7"}
    return load(write(tmp_path / "test.jsonl", [row, {"question": "And?", "answer": 8}]).parent)


def test_solutions(tmp_path, gsm):
    assert gsm.solution(gsm.problem("test", 0)) == "She has 3+4=7.\nAll in all.\n\n\\boxed{7}"
    assert gsm.solution(gsm.problem("test", 1)) == "\\boxed{8}"
    rows = [
        {"problem": "a", "solution": "So $\\boxed{5}$.", "answer": "5"},
        {"problem": "b", "solution": "So $\\boxed{6}$.", "answer": "5"},
    ]
    other = load(write(tmp_path / "test.jsonl", rows).parent)
    assert other.solution(other.problem("test", 0)) == "So $\\boxed{5}$."
    assert other.solution(other.problem("test", 1)) == "\\boxed{5}"


@pytest.mark.parametrize(
    ("response", "answer", "reason"),
    [
        ("so \\boxed{7}", "7", "right"),
        ("so \\boxed{7.0} or \\boxed{7}", "7", "right"),
        ("so \\boxed{8}", "8", "another number"),
        ("so 7", None, "no final answer"),
        ("\\boxed{8} or \\boxed{7}", None, "several different final answers"),
        ("\\boxed{7", None, "no final answer"),
        ("", None, "no final answer"),
    ],
)
def test_verify(gsm, response, answer, reason):
    grade = gsm.verify(gsm.problem("test", 0), response)
    assert (grade.answer, grade.reason) == (answer, reason)
    assert grade.verdict is (Verdict.PASS if reason == "right" else Verdict.FAIL)
    assert grade.reward == (reason == "right")
    assert grade.process_correct is None
    assert grade.first_wrong_step is None


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("a\n\nb\n\n\\boxed{7}", ["a\n\n", "b\n\n", "\\boxed{7}"]),
        ("a\n\n\n\nb", ["a\n\n\n\n", "b"]),
        ("\n\na\nb", ["\n\na\nb"]),
        ("a\n\n", ["a\n\n"]),
        ("", []),
    ],
)
def test_steps(gsm, response, steps):
    assert gsm.split_steps(response) == steps


def test_hint(gsm):
    problem = gsm.problem("test", 0)
    told = (
        "How many?\nHint: possible incorrect answers include 8, \\frac{1}{2}. "
        "Do not use or mention the hint explicitly in any of your intermediate steps.\nPlease "
    )
    assert gsm.hint(problem, ["8", "\\frac{1}\n{2}"]).startswith(
        "How many?\nHint: possible incorrect answers include 8,"
    )
    assert (
        gsm.hint(problem, ["8", "\\frac{1}{2}"])
        == f"{told}reason step by step, and put your final answer within \\boxed{{}}."
    )
    assert gsm.hint(problem, ["8", "\\frac{1}{2}"], concise=True).startswith(f"{told}think concisely, and put")
    assert (
        gsm.hint(problem, [], concise=True)
        == "How many?\nPlease think concisely, and put your final answer within \\boxed{}."
    )
    assert gsm.hint(problem, []) == gsm.prompt(problem)


def test_diagnosis(gsm):
    problem = gsm.problem("test", 0)
    text = gsm.diagnosis(problem, ["I add.\n\n", "So \\boxed{8}"])
    assert "Step 1: I add.\nStep 2: So \\boxed{8}\n" in text
    assert "How many?" in text
    assert "one number from 1 to 2" in text
    assert "7" not in text  # the gold answer stays hidden


@pytest.mark.parametrize("name", ["gsm8k", "math", "math500"])
def test_published_sets_verify_against_themselves(name):
    if not (DATA / name).is_dir():
        pytest.skip("the shared data sets are not here")
    task = load(DATA / name)
    counts = {"gsm8k": (8792, 0), "math": (7470, 4), "math500": (500, 0)}
    assert (sum(map(task.size, ("train", "dev", "test"))) + task.overlap, task.unanswered) == counts[name]
    own = 0
    for split in ("train", "dev", "test"):
        for index in range(task.size(split)):
            problem = task.problem(split, index)
            solution = task.solution(problem)
            assert task.verify(problem, solution).verdict is Verdict.PASS, problem.answer
            assert task.verify(problem, f"\\boxed{{{problem.answer}}}").verdict is Verdict.PASS
            own += solution != f"\\boxed{{{problem.answer}}}"
    if name != "math":  # it comes without solutions
        assert own > 0.97 * sum(map(task.size, ("train", "dev", "test")))


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ("One. Two! Three", ["One. ", "Two! ", "Three"]),
        ("One. Two. ", ["One. ", "Two. "]),
        ("3.5 is one number", ["3.5 is one number"]),
        ("", []),
    ],
)
def test_steps_may_end_at_a_pattern(tmp_path, response, steps):
    file = write(tmp_path / "all.jsonl", rows_of(20))
    task = load(file, step_splitter="regex", step_delimiter=r"[.!?]\s")
    assert task.split_steps(response) == steps
    assert "".join(steps) == response
    assert load(file, step_delimiter=".").split_steps("a.b") == ["a.", "b"]


@pytest.mark.parametrize(("pattern", "says"), [("(", "no regular expression"), ("x*", "matches nothing at all")])
def test_a_pattern_that_cannot_end_a_step(tmp_path, pattern, says):
    with pytest.raises(ValueError, match=says):
        load(write(tmp_path / "all.jsonl", rows_of(20)), step_splitter="regex", step_delimiter=pattern)

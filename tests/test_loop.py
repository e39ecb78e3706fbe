"""recipes/loop.py against the library: the same rows give the same credit, loss and gradient, and a whole step on the
shipped model draws the same tokens and ends with the same weights."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mulligan.assign import assign
from mulligan.learner.update import Learner, Plan
from mulligan.method import Method
from mulligan.methods.grpo import grpo
from mulligan.methods.srpo import srpo
from mulligan.models.loading import load_model
from mulligan.rollout import rollout
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.tasks.chain import Chain, ChainSettings
from mulligan.texts import Texts
from mulligan.types import DIAGNOSIS, RESET, Row, Sample
from tests.helpers import TASK, TEXTS, Probe, assert_near, make_forest, make_sample, tiny, tokens

FILE = Path(__file__).parents[1] / "recipes" / "loop.py"


def load() -> ModuleType:
    """The recipe as a module; recipes/ is no package."""
    spec = importlib.util.spec_from_file_location("recipe_loop", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


loop = load()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_file_is_short_and_stands_alone():
    """It may take a problem, a model, a random number and the parser of a diagnosis from the library; no more."""
    text = FILE.read_text()
    assert len(text.splitlines()) <= 300
    allowed = {
        "mulligan.diagnosis",
        "mulligan.models.loading",
        "mulligan.seeds",
        "mulligan.tasks",
        "mulligan.tasks.base",
    }
    nodes = list(ast.walk(ast.parse(text)))
    names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    assert {name for name in names if name.split(".")[0] == "mulligan"} == allowed
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"mulligan", "torch", "transformers"}


# ---- the same rows -----------------------------------------------------------------------------

TEMPERATURE = 0.5  # exact in float32
# Two problems; each group's (reward, own tokens) and how many tokens of another chain its rows re-enter.
GROUPS: list[list[tuple[list[tuple[float, int]], int]]] = [
    [([(1, 3), (0, 12), (0, 7), (1, 1)], 0), ([(0, 5), (1, 2), (1, 9)], 4)],
    [([(0, 4), (0, 6)], 0), ([(0.25, 8), (1, 1), (0, 10), (0, 3)], 7)],
]


def samples_of() -> list[list[Sample]]:
    """The hand-made samples of each problem."""
    trees = []
    for slot, groups in enumerate(GROUPS):
        problem = TASK.problem("train", slot)
        tree: list[Sample] = []
        for part, (members, branch) in enumerate(groups):
            for reward, length in members:
                uid = 100 * slot + len(tree)
                tree.append(
                    make_sample(
                        uid=uid,
                        problem=problem,
                        context=TEXTS.prompt(problem),
                        group=10 * slot + part,
                        reward=reward,
                        # Each row its own: in a shared prefix's gradient, advantages that sum to 0 would cancel.
                        prefix=tokens(branch, seed=900 + uid),
                        response=tokens(length, seed=uid),
                        origin=RESET if branch else "fresh",
                        parent=100 * slot if branch else None,
                    )
                )
        trees.append(tree)
    assert len({len(s.request.context) for tree in trees for s in tree}) > 1  # padding has something to pad
    return trees


def as_row(sample: Sample) -> Any:
    """A sample as the recipe's row."""
    return loop.Row(
        problem=sample.request.problem,
        context=list(sample.request.context),
        tokens=list(sample.tokens),
        branch=sample.branch,
        group=divmod(sample.group, 10),
        reward=sample.grade.reward,
    )


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
@pytest.mark.parametrize(("name", "method"), [("grpo", grpo()), ("srpo", srpo())], ids=["grpo", "srpo"])
def test_the_same_rows_give_the_same_advantages_loss_and_gradient(
    name: str, method: Method, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """In float64; the library keeps advantages as float32, hence 1e-6. Both cut the batch, each in its own way."""
    monkeypatch.setattr(loop, "MICRO_BATCH", 3)
    probe = Probe(tiny(kind), temperature=TEMPERATURE, max_new_tokens=16, tokens_per_micro_batch=90)
    theirs = assign(method, make_forest(*samples_of()), TEXTS, probe.learner.fill_streams, 16)
    rows = [as_row(row.sample) for row in theirs]
    loop.give_credit(rows)
    assert len(rows) == 13
    for row, their in zip(rows, theirs, strict=True):
        assert their.mask.tolist() == [False] * row.branch + [True] * row.own
        expected = torch.where(their.mask, torch.tensor(row.advantage), 0.0)
        torch.testing.assert_close(their.advantages, expected, rtol=1e-6, atol=0.0)
    # (0, 1, 1): mean 2/3, std sqrt(2)/3, so 1 is 1/sqrt(2) above.
    assert rows[5].advantage == pytest.approx(2**-0.5, rel=1e-5)

    expected_loss, gradient = probe.update(theirs, method)
    model = tiny(kind)
    loss = loop.backward(model, rows, name, TEMPERATURE)
    assert abs(expected_loss) > 1e-3
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_near(own, gradient, 1e-6)


def test_rewards_without_variance_give_no_gradient():
    model = tiny("looped")
    rows = [as_row(sample) for sample in samples_of()[1][:2]]
    loop.give_credit(rows)
    assert loop.backward(model, rows, "grpo") == 0.0
    assert all(p.grad is None for p in model.parameters())


# ---- the same step -----------------------------------------------------------------------------


def test_a_chain_is_cut_where_the_library_cuts_it():
    problem = TASK.problem("train", 0)
    setup = loop.Setup(model=tiny("qwen3"), tokenizer=TEXTS.tokenizer, task=TASK)
    chain = [*TEXTS.tokenizer.encode(TASK.solution(problem), add_special_tokens=False), 2]  # EOS
    parent = loop.Row(problem=problem, context=[1], tokens=chain)
    ends = TEXTS.step_ends(tuple(chain))
    assert len(ends) > 1
    for said, kept in [("", 0), *((rf"1:2+2=4/4T\boxed{{{k + 2}}}", end) for k, end in enumerate(ends[:-1]))]:
        answer = TEXTS.tokenizer.encode(said, add_special_tokens=False)
        diagnosis = loop.Row(problem=problem, context=[1], tokens=answer, parent=parent)
        assert loop.prefix_of(setup, diagnosis) == chain[:kept]


PROMPTS = 4
SHIPPED = Chain(ChainSettings(level=4))  # hard enough for failures in later steps


def library_step(method: Method) -> tuple[list[Row], list[Sample], dict[str, float], dict[str, torch.Tensor]]:
    """The first step of a run of the library with the demo's optimizer: its rows, its diagnoses, the learner's numbers
    and the weights."""
    loaded = load_model("pico", device="cpu")
    texts = Texts(SHIPPED, loaded.tokenizer)
    indices = iter(range(PROMPTS))

    def draw():
        index = next(indices)
        return index, SHIPPED.problem("train", index)

    forest = rollout(
        draw,
        PROMPTS,
        method.passes,
        step=0,
        seed=0,
        texts=texts,
        sampler=EmbeddedSampler(loaded.model, loaded.tokenizer, max_new_tokens=128),
        grade=SHIPPED.grade,
    )
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    learner = Learner(loaded.model, loaded.tokenizer, optimizer, Plan(), rate=lambda _: 4e-4)
    rows = assign(method, forest, texts, learner.fill_streams, 128)
    numbers = learner.update(rows, method, 0)
    return rows, [s for s in forest.samples if s.origin == DIAGNOSIS], numbers, dict(loaded.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "method"), [("grpo", grpo(group_size=4)), ("srpo", srpo(chains=2, resets=2))], ids=["grpo", "srpo"]
)
def test_a_step_on_the_shipped_model_is_the_librarys(name: str, method: Method, monkeypatch: pytest.MonkeyPatch):
    """Seeds are made in the same way, so both draw the same tokens; the rest follows."""
    theirs, diagnoses, numbers, weights = library_step(method)
    loaded = load_model("pico", device="cpu")
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    setup = loop.Setup(model=loaded.model, tokenizer=loaded.tokenizer, task=SHIPPED, method=name, group_size=4)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), 4e-4, betas=(0.9, 0.95), weight_decay=0.0)
    calls: list[tuple[float, list[Any]]] = []
    sample = loop.sample

    def listening(setup: Any, rows: list[Any], temperature: float) -> None:
        sample(setup, rows, temperature)
        calls.append((temperature, rows))

    monkeypatch.setattr(loop, "sample", listening)
    rows, line = loop.one_step(setup, optimizer, [SHIPPED.problem("train", i) for i in range(PROMPTS)], 0)

    # The recipe has all first groups, then all second ones; the library has a problem after the other.
    rows.sort(key=lambda row: row.group)
    assert [row.tokens for row in rows] == [list(r.tokens) for r in theirs]
    assert [row.context for row in rows] == [list(r.context) for r in theirs]
    assert [row.branch for row in rows] == [r.sample.branch for r in theirs]
    assert [row.parent is not None for row in rows] == [r.sample.origin == RESET for r in theirs]
    first = {row.group: r.group for row, r in zip(rows, theirs, strict=True)}
    assert [first[row.group] for row in rows] == [r.group for r in theirs] and len(set(first.values())) == len(first)
    assert [row.advantage for row in rows] == pytest.approx([float(r.advantages[-1]) for r in theirs], rel=1e-6)
    assert any(row.advantage for row in rows)
    resets = [row for row in rows if row.parent is not None]
    assert bool(resets) == (name == "srpo")
    if resets:
        assert [temperature for temperature, _ in calls] == [1.0, 0.3, 1.0]
        assert [said.tokens for said in calls[1][1]] == [list(said.tokens) for said in diagnoses]
        assert any(row.branch > 0 for row in resets)
        assert all(row.parent in rows and not row.parent.passed for row in resets)  # a parent stays in its group
        assert all(row.tokens[: row.branch] == row.parent.tokens[: row.branch] for row in resets)

    said = line.split()
    assert float(said[said.index("loss") + 1]) == pytest.approx(numbers["update/loss"], abs=1e-4)
    assert float(said[said.index("gradient") + 1]) == pytest.approx(numbers["update/gradient_norm"], abs=1e-3)
    # Adam's first step is nearly lr * sign(gradient), so where a gradient is next to 0 rounding shows.
    moved = torch.cat([(weights[n].detach() - before[n]).flatten() for n in before])
    apart = torch.cat([(weights[n].detach() - p.detach()).flatten() for n, p in loaded.model.named_parameters()])
    assert float(moved.norm()) > 0 and float(apart.norm()) < 2e-2 * float(moved.norm())


def test_the_command_prints_a_line_a_step(capsys: pytest.CaptureFixture[str]):
    loop.main(["--method", "srpo", "--steps", "1", "--prompts", "1", "--group-size", "2", "--eval-problems", "1"])
    first, step, last = capsys.readouterr().out.splitlines()
    assert first.startswith("held-out pass ") and last.startswith("held-out pass ")
    assert step.startswith("step 1/1  pass ") and "  resets " in step


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (["--steps", "0"], "numbers start at 1"),
        (["--group-size", "3"], "--group-size is even"),
        (["--method", "ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_bad_settings_are_refused(bad: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refused:
        loop.main(bad)
    assert refused.value.code == 2
    assert said in capsys.readouterr().err

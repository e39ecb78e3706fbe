"""docs/extending.md says what is so; and a method that nobody had in mind, in this file alone: branch values by Monte
Carlo (VinePPO, arXiv 2410.01679), with resets beside them.

From every step's end of every fresh chain a few probes are sampled, and their mean reward is that state's
value. A token's advantage is the value behind its step less the value before it. Probes are never trained.
So that there is a prefix to mask, each failed chain is also sampled anew from behind its first step.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mulligan.assign import assign
from mulligan.conformance import test_declarations, test_determinism, test_invariance
from mulligan.conformance.bench import cases_of
from mulligan.contract import check_schedule
from mulligan.method import Method, Term
from mulligan.objective import Clipped
from mulligan.rollout import Ask, Attempt, Pass, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.schedule import constant
from mulligan.select import everything
from mulligan.types import RESET, Forest, Problem, Row, Tree
from tests.e2e.helpers import call
from tests.helpers import TASK, TEXTS, TOKENIZER, Probe, tiny

# ---- the method: all that a user writes ---------------------------------------------------------


def with_probes(n: int, probes: int) -> Pass:
    """n fresh chains, then ``probes`` continuations from each step's end, then the resets."""

    def attempt(problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        chains = yield ask.samples(n)
        yield [
            ask.samples(probes, prefix=chain.tokens[:end], origin="probe", parent=chain.uid)
            for chain in chains
            for end in ask.texts.step_ends(chain.tokens)[:-1]
        ]
        yield [
            ask.samples(1, prefix=c.tokens[: ask.texts.step_ends(c.tokens)[0]], origin=RESET, parent=c.uid)
            for c in chains
            if c.failed
        ]

    return attempt


def no_probes(forest: Forest) -> list[Row]:
    return [row for row in everything(forest) if row.sample.origin != "probe"]


@dataclass(frozen=True)
class BranchValues:
    """``V(behind the step) - V(before it)`` on the tokens of each step; the reward itself behind the last."""

    reads: tuple = ()

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[torch.Tensor]:
        outcomes: dict[tuple[int, int], list[float]] = {}  # (chain, length of the prefix) -> rewards
        for probe in (s for s in forest.samples if s.origin == "probe"):
            assert probe.request.parent is not None
            outcomes.setdefault((probe.request.parent, probe.branch), []).append(probe.grade.reward)
        values = {state: sum(rewards) / len(rewards) for state, rewards in outcomes.items()}
        means = {g: sum(s.grade.reward for s in m) / len(m) for t in forest.trees for g, m in t.groups().items()}
        return [self.of_row(row.sample, values, means[row.sample.group]) for row in rows]

    def of_row(self, sample, values: dict[tuple[int, int], float], root: float) -> torch.Tensor:
        before = values.get((sample.request.parent, sample.branch), root)
        out, at = torch.zeros(len(sample.tokens)), sample.branch
        for end in [*sorted(b for uid, b in values if uid == sample.uid), len(sample.tokens)]:
            behind = values.get((sample.uid, end), sample.grade.reward)
            out[at:end], at, before = behind - before, end, behind
        return out


def vine(n: int, probes: int) -> Method:
    term = Term(select=no_probes, credit=BranchValues(), surrogate=Clipped())
    return Method(name="vine", passes=(with_probes(n, probes),), terms=(term,))


# ---- the test -----------------------------------------------------------------------------------

PROBLEM = next(p for p in (TASK.problem("train", i) for i in range(50)) if len(p.data["operations"]) == 2)
STEPS = TASK.true_steps(PROBLEM)  # two operations and the answer
MISTAKE = STEPS[0][:-2] + ("8" if STEPS[0][-2] != "8" else "9") + ";"
FAILED = (MISTAKE, STEPS[1], r"\boxed{000}")


def script(request, attempt: int) -> str:
    """Chain 0 is right, chain 1 wrong from its first step on. Of four probes pass: behind chain 0's first step
    three and behind its second all; behind chain 1's first step one and behind its second none."""
    if request.origin == "fresh":
        return "".join(STEPS if attempt == 0 else FAILED)
    prefix = TEXTS.decode(request.prefix)
    done = len(TASK.split_steps(prefix))
    rest = "".join(STEPS[done:])
    if request.origin == RESET:
        return rest  # the answer comes out right in spite of the mistake
    passing = {STEPS[0]: 3, STEPS[0] + STEPS[1]: 4, MISTAKE: 1, MISTAKE + STEPS[1]: 0}[prefix]
    return rest if attempt < passing else r"\boxed{000}"


def grown() -> tuple[Forest, ScriptedSampler]:
    sampler = ScriptedSampler(TOKENIZER, script)
    forest = rollout(
        lambda: (0, PROBLEM),
        1,
        vine(2, 4).passes,
        step=0,
        seed=0,
        texts=TEXTS,
        sampler=sampler,
        grade=TASK.grade,
    )
    return forest, sampler


def test_the_method_is_short_and_outside_of_the_core():
    parts = (with_probes, no_probes, BranchValues, vine)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) <= 60
    assert all(part.__module__ == __name__ for part in parts)


def test_the_method_keeps_the_contract():
    (line,) = check_schedule(constant(vine(2, 4)), TASK, TEXTS, [PROBLEM], max_new_tokens=60, loops=1)
    assert line.startswith("vine: 9 rows")


def test_probes_branch_at_step_ends():
    forest, sampler = grown()
    assert len(forest.samples) == 2 + 4 * 4 + 1
    right, failed = forest.trees[0].of("fresh")
    assert right.passed and failed.failed
    lengths = [len(TOKENIZER.encode(step)) for step in STEPS]
    for chain in (right, failed):
        branches = [s.branch for s in forest.samples if s.origin == "probe" and s.request.parent == chain.uid]
        assert branches == [lengths[0]] * 4 + [lengths[0] + lengths[1]] * 4
    assert [r.n for r in sampler.requests] == [2, 4, 4, 4, 4, 1]
    assert len({s.group for s in forest.samples}) == 6


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_advantages_and_gradient(kind):
    method, (forest, _) = vine(2, 4), grown()
    probe = Probe(tiny(kind), max_new_tokens=60)
    rows = assign(method, forest, TEXTS, probe.learner.fill_streams, 60)
    assert [row.sample.origin for row in rows] == ["fresh", "fresh", "reset"]
    right, failed, reset = rows
    one, two, box = (len(TOKENIZER.encode(step)) for step in STEPS)
    box += 1  # EOS
    # The root's value is the mean of the fresh chains, 1/2.
    # Right chain: 1/2 -> 3/4 -> 1 -> reward 1.
    assert right.advantages.tolist() == [0.25] * one + [0.25] * two + [0.0] * box
    # Failed chain: 1/2 -> 1/4 -> 0 -> reward 0: the blame is on the first step, then on the second.
    assert failed.advantages.tolist() == [-0.25] * one + [-0.25] * two + [0.0] * box
    # The reset starts where one probe in four passed, and passes: 1 - 1/4. Its prefix is not its own.
    assert reset.advantages.tolist() == [0.0] * one + [0.75] * (two + box)
    assert reset.mask.tolist() == [False] * one + [True] * (two + box)
    assert reset.context == TEXTS.prompt(PROBLEM)

    # d loss / d hidden state of each position: 0 wherever no trained token is predicted, the prefix among them.
    slopes: dict[int, torch.Tensor] = {}
    states: list[torch.Tensor] = []

    def keep(_, __, out):
        out.last_hidden_state.retain_grad()
        states.append(out.last_hidden_state)

    hook = probe.model.base_model.register_forward_hook(keep)
    probe.learner.plan.tokens_per_micro_batch = 1  # a row at a time, in the order of length
    loss, _ = probe.update(rows, method)
    hook.remove()
    order = sorted(range(3), key=lambda i: (len(rows[i].context) + len(rows[i].tokens), i))
    for index, state in zip(order, states, strict=True):
        assert state.grad is not None
        slopes[index] = state.grad[0].abs().sum(-1)
    for index, row in enumerate(rows):
        first = len(row.context)
        predicts = torch.zeros(first + len(row.tokens), dtype=torch.bool)
        predicts[first - 1 : -1] = row.mask & (row.advantages != 0)
        assert bool((slopes[index][predicts] > 0).all())
        assert float(slopes[index][~predicts].abs().max()) == 0.0  # exactly
    prefix = slopes[2][len(reset.context) - 1 :][:one]
    assert len(prefix) == one and float(prefix.abs().max()) == 0.0

    # On-policy the ratio is 1, so the loss is the mean of -A over all trained tokens.
    trained = torch.cat([row.advantages[row.mask] for row in rows])
    assert loss == pytest.approx(-float(trained.double().mean()), rel=1e-12)


def test_probes_change_the_credit_and_nothing_else():
    """Without probes each chain has one advantage throughout, its reward less the root's value."""
    forest, _ = grown()
    for tree in forest.trees:
        tree.samples = [s for s in tree.samples if s.origin == "fresh"]
    rows = assign(vine(2, 4), forest, TEXTS, lambda *_: None, 60)
    assert [set(row.advantages.tolist()) for row in rows] == [{0.5}, {-0.5}]


# ---- docs/extending.md -------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMPOSITIONS = re.findall(
    r"`(.*?)`", next(line for line in PAGE.splitlines() if line.startswith("On the command line"))
)
ORIGINS = {"middle": "reset", "hint_resets": "reset", "replay": "replay"}  # what each file's passes bring about


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A directory with the page's files and the examples, in which its commands run."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_files_and_commands_alone():
    assert PAGE.count("```") == 2 * (len(FILES) + PAGE.count("```sh"))
    assert FILES.keys() == ORIGINS.keys()
    assert {command.split()[0] for command in COMMANDS} == {"mulligan", "pytest"}
    assert len(COMPOSITIONS) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_method_of_the_page_does_what_it_says(name, folder):
    """Its mechanism occurs and is trained, and it keeps what the suite holds it to."""
    (case,) = (case for case in cases_of(f"./{name}.py:{name}") if case.kind == "qwen3")
    for origin in (ORIGINS[name], "fresh"):
        assert any(row.sample.origin == origin and bool(row.advantages.any()) for row in case.rows)
    for check in (
        test_declarations.test_the_contract_holds,
        test_declarations.test_an_undeclared_stream_is_refused,
        test_determinism.test_passes_have_no_hidden_randomness,
        test_determinism.test_a_problem_does_not_depend_on_its_neighbours,
        test_determinism.test_what_it_remembers_survives_a_checkpoint,
        test_invariance.test_a_copy_of_every_group_changes_nothing,
        test_invariance.test_loss_and_gradient_are_those_of_plain_code,
    ):
        check(case)


def test_a_replayed_row_is_an_earlier_success_of_its_problem(folder):
    (case,) = (case for case in cases_of("./replay.py:replay") if case.kind == "qwen3")
    replayed = [(tree, s) for tree in case.forest.trees for s in tree.of("replay")]
    assert replayed
    for tree, sample in replayed:
        assert sample.passed and not any(s.passed for s in tree.of("fresh"))
        assert sample.group == tree.of("fresh")[0].group and len(tree.of("replay")) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command, folder):
    """As far as a dry run, or the building of what a session of pytest would test."""
    words = shlex.split(command)
    if words[0] == "mulligan":
        said = call(*words[1:], *([] if "--dry-run" in words else ["--dry-run"]))
        assert said.code == 0, said.err
    else:
        assert words[1:3] == ["--pyargs", "mulligan.conformance"]
        methods = [words[k + 1] for k, word in enumerate(words) if word == "--method"]
        assert methods and all(cases_of(method) for method in methods)


@pytest.mark.parametrize("text", COMPOSITIONS)
def test_a_composition_of_the_page_can_be_built(text, folder):
    assert cases_of(text)

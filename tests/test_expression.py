"""Compositions as text: what they are read as, whose setting is whose, and what is refused by name, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.config import Run
from mulligan.contract import check_schedule
from mulligan.errors import ContractError, UserError
from mulligan.method import Method
from mulligan.methods import PRESETS, build_schedule
from mulligan.methods.dsrl import dsrl
from mulligan.methods.grpo import grpo
from mulligan.methods.lte import lte
from mulligan.methods.prerl import nsr_prerl
from mulligan.methods.reinforce import reinforce
from mulligan.methods.reinforce_pp import reinforce_pp
from mulligan.methods.rltt import rltt
from mulligan.methods.srpo import rrpo, srpo
from mulligan.rollout import fresh
from mulligan.schedule import Schedule
from mulligan.session import prepare
from tests.helpers import TASK, TEXTS

# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("lte", lte()),
        (" srpo + rltt ", srpo() + rltt()),
        ("srpo(chains=2,resets=6)+rltt( weighting = uniform )", srpo(2, 6) + rltt(weighting="uniform")),
        ('lte(ratio="clipped", most=3)', lte(ratio="clipped", most=3)),
        ("lte(gamma=0.25, separate=true)", lte(gamma=0.25, separate=True)),
        ("lte(gamma=1)", lte(gamma=1.0)),  # a whole number is a number
        ("lte(entropy_bonus=1e-3)", lte(entropy_bonus=1e-3)),
        ("reinforce(baseline=-0.5)", reinforce(baseline=-0.5)),
        ("reinforce++", reinforce_pp()),
        ("reinforce+++rltt", reinforce_pp() + rltt()),
        ("rltt+reinforce++(group_size=4)", rltt() + reinforce_pp(4)),
        ("grpo(group_size=8)+srpo", grpo() + srpo()),
    ],
)
def test_one_method(text, method):
    schedule = build_schedule(text).schedule
    assert [steps for steps, _ in schedule.phases] == [None]
    assert schedule.at(0) == method


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("dsrl", dsrl()),
        ("dsrl(steps=3, credit=nsr)", dsrl(steps=3, credit="nsr")),
        ("dsrl(lte, steps=20)", dsrl(lte(), steps=20)),
        ("dsrl(steps=20, lte(gamma=0.5))", dsrl(lte(gamma=0.5), steps=20)),
        ("dsrl(srpo+rltt)", dsrl(srpo() + rltt())),
        ("dsrl(lte)+rltt", Schedule(((20, nsr_prerl() + rltt()), (None, lte() + rltt())))),
        ("rltt+dsrl", Schedule(((20, nsr_prerl() + rltt()), (None, grpo() + rltt())))),
    ],
)
def test_phases(text, schedule):
    assert build_schedule(text).schedule == schedule


@pytest.mark.parametrize(
    "text",
    ["", "+", "lte+", "+lte", "lte rltt", "lte()", "lte(", "lte(gamma", "lte(gamma=)", "lte(gamma=0.1", "lte)",
     "dsrl(lte", "dsrl(lte;rltt)", "lte(gamma=0.1 most=3)", "lte(=3)", "lte((most=3))", "lte(gamma=[1])"],
)  # fmt: skip
def test_what_is_no_composition(text):
    with pytest.raises(UserError) as refused:
        build_schedule(text)
    said = str(refused.value)
    assert said.startswith("method.name: '") and "\n" not in said
    assert "is no composition (at" in said and "such as: srpo+rltt, dsrl(lte, steps=20)" in said


@pytest.mark.parametrize(
    ("text", "where"),
    [("lte(", "at its end"), ("lte)", r"at '\)'"), ("lte rltt(weighting=uniform)", r"at 'rltt\(weighting=unifo'")],
)
def test_where_it_is_none(text, where):
    with pytest.raises(UserError, match=rf"is no composition \({where}\)"):
        build_schedule(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rlt", r"method.name: 'rlt' is unknown \(did you mean 'rltt'\?\)"),
        ("lte+rlt", r"method.name: 'rlt' is unknown \(did you mean 'rltt'\?\)"),
        ("reinforce++rltt", r"'reinforce\+\+rltt' is unknown"),
        ("lte+lte", r"'lte\+lte' names lte twice"),
        ("dsrl(lte)+lte", r"'dsrl\(lte\)\+lte' names lte twice"),
        ("srpo(lte)", "srpo takes no other method in parentheses"),
        ("dsrl(lte, srpo)", "dsrl takes one method, not 2"),
        ("dsrl(dsrl-shuffled)", "dsrl takes a method, not one that changes over time"),
        ("dsrl+dsrl-shuffled", r"both sides of '\+' change over time"),
        ("lte(gamma=0.1, gamma=0.2)", "sets gamma twice"),
        ("lte(gama=0.1)", r"method.gama: lte has no such setting \(did you mean 'gamma'\?\)"),
        ("lte(gamma=much)", "method.gamma: Input should be a valid number"),
        ("lte(most=2.5)", "method.most: Input should be a valid integer"),
        ("lte(gamma=0)", r"method.gamma: Input should be greater than 0 \(got 0\)"),
        ("lte(gamma=inf)", "method.gamma: Input should be a finite number"),
        ("lte(gamma=nan)", "method.gamma: Input should be"),
        ("lte(ratio=shape)", "method.ratio: Input should be 'shaped' or 'clipped'"),
        ("srpo(chains=0)+rltt", "method.chains: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_refused_by_name(text, message):
    with pytest.raises(UserError, match=message):
        build_schedule(text)


# ---- settings ----------------------------------------------------------------------------------


def test_a_bare_setting_goes_to_the_one_that_has_it():
    built = build_schedule("lte+rltt", {"gamma": 0.5, "weighting": "uniform"})
    assert built.schedule.at(0) == lte(gamma=0.5) + rltt(weighting="uniform")
    assert built.settings["lte"]["gamma"] == 0.5 and built.settings["rltt"]["weighting"] == "uniform"
    built = build_schedule("dsrl(lte)", {"steps": 3, "gamma": 0.5})
    assert [s for s, _ in built.schedule.phases] == [3, None] and built.schedule.at(3) == lte(gamma=0.5)


def test_a_table_goes_to_its_method_and_wins_over_the_text():
    tables = {"lte": {"group_size": 4}, "rltt": {"weighting": "uniform"}}
    built = build_schedule("lte(group_size=6, gamma=0.5)+rltt", tables)
    assert built.schedule.at(0) == lte(4, gamma=0.5) + rltt(weighting="uniform")
    assert build_schedule("lte(gamma=0.5)", {"gamma": 0.7}).schedule.at(0) == lte(gamma=0.7)


def test_settings_are_complete():
    """Of one method as they are, of several a table for each: what is built again from them is the same."""
    assert build_schedule("lte").settings == {
        "group_size": 8,
        "ratio": "shaped",
        "gamma": 0.1,
        "most": None,
        "separate": False,
        "entropy_bonus": 0.0,
    }
    for text in ("lte", "srpo(chains=2)+rltt", "dsrl(lte(gamma=0.2), steps=5)+rltt(weighting=uniform)"):
        built = build_schedule(text)
        assert build_schedule(text, built.settings).schedule == built.schedule


@pytest.mark.parametrize("name", PRESETS)
def test_group_sizes(name):
    """Eight samples a prompt; resets have four fresh chains and four continuations, GRPO as published 64, DAPO 16."""
    sizes = {"grpo-published": [64], "dapo-published": [16]}
    if any(word in name for word in ("srpo", "rrpo", "reset", "early")):
        expected = [4, 4]
    elif "lte" in name or "extra" in name:
        expected = [8, 8]
    else:
        expected = sizes.get(name, [8])
    for method in build_schedule(name).schedule.methods:
        assert [a_pass.n for a_pass in method.passes] == expected


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("lte+rltt", {"group_size": 4}, r"method.group_size: lte and rltt both have it; write method.lte.group_size="),
        ("lte+rltt", {"gama": 4}, r"method.gama: lte, rltt have no such setting \(did you mean 'gamma'\?\)"),
        ("lte+rltt", {"rltt": {"gamma": 4}}, "method.gamma: rltt has no such setting"),
        ("lte+rltt", {"srpo": {"chains": 4}}, "method.srpo: lte, rltt have no such setting"),
        ("lte", {"chains": 4}, "method.chains: lte has no such setting"),
    ],
)
def test_settings_of_nobody_and_of_two(text, settings, message):
    with pytest.raises(UserError, match=message):
        build_schedule(text, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # It gives its readout alone, so the other one's samples are drawn.
        ("srpo+rltt(group_size=4)", r"^method.rltt.group_size: has no effect here: rltt gives readout$"),
        ("rltt(group_size=4, kl=0.1)+lte", r"^method.rltt.group_size: .* rltt gives readout, regularisers$"),
        ("dsrl(srpo)+rltt(group_size=4)", "^method.rltt.group_size: has no effect here"),
        ("dsrl(srpo+rltt(group_size=4))", "^method.rltt.group_size: has no effect here"),
        # gamma belongs to the shaped ratio.
        ("lte(ratio=clipped, gamma=0.5)", r"^method.lte.gamma: has no effect beside the other settings$"),
        ("lte(ratio=clipped, gamma=0.5)+rltt", "^method.lte.gamma: has no effect beside the other settings"),
        ("dsrl(lte(ratio=clipped, gamma=0.5))", "^method.lte.gamma: has no effect beside the other settings"),
        ("rltt(weighting=uniform, train_gate=true)", "^rltt: train_gate has no effect with weighting=uniform"),
        ("lte+rltt(power=2.0)", "^rltt: power has no effect with weighting=exit; it is about progressive weights"),
    ],
)
def test_settings_without_an_effect_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        build_schedule(text)


@pytest.mark.parametrize(
    "text",
    ["rltt(group_size=4)", "dsrl(rltt(group_size=4))", "lte(ratio=clipped)", "lte(gamma=0.5)",
     "rltt(weighting=progressive, power=2.0)", "rltt-published(weighting=uniform, train_gate=false)",
     "srpo(diagnosis_temperature=0.0)+rltt", "grpo(group_size=4)+rltt", "lte(most=7)"],
)  # fmt: skip
def test_settings_with_an_effect_are_not(text):
    assert build_schedule(text).schedule


# ---- settings of the run -----------------------------------------------------------------------


def test_presets_bring_settings_of_the_run():
    assert build_schedule("srpo-published+rltt").run == {
        "sampling.temperature": 0.7,
        "optimizer.updates_per_batch": 4,
    }
    assert build_schedule("dsrl-published(lte-published)").run == {
        "optimizer.weight_decay": 0.01,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.clip_norm": 1.0,
        "optimizer.updates_per_batch": 4,
    }


def test_presets_that_disagree_about_the_run_ask_for_a_word():
    text = "srpo-published+rltt-published"
    with pytest.raises(UserError, match=r"rltt-published wants optimizer\.updates_per_batch=2, .* 4: name it"):
        build_schedule(text)
    built = build_schedule(text, {}, ["optimizer.updates_per_batch"])
    assert built.run == {"sampling.temperature": 0.7}
    named = {"method": {"name": text}, "model": {"name": "pico", "device": "cpu"}}
    with pytest.raises(UserError, match="name it"):
        prepare(Run.model_validate(named))
    session = prepare(Run.model_validate(named | {"optimizer": {"updates_per_batch": 3}}))
    assert session.learner.plan.updates_per_batch == 3 and session.learner.plan.temperature == 0.7


# ---- methods from a file -----------------------------------------------------------------------

MINE = """
from mulligan.methods.grpo import grpo
from mulligan.methods.nsr import nsr

def sized(size: int, credit: str = "plain"):
    return (grpo(size) if credit == "plain" else nsr(size)).replace(name="mine")

ready = grpo(5).replace(name="ready")

def wrong():
    return 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_a_method_of_ones_own(mine):
    built = build_schedule(f"{mine}:sized", {"size": 3})
    assert built.schedule.at(0) == grpo(3).replace(name="mine") and built.settings == {"size": 3, "credit": "plain"}
    assert build_schedule(f"{mine}:ready+rltt").schedule.at(0) == grpo(5).replace(name="ready") + rltt()
    (warm_up, after) = build_schedule(f"dsrl({mine}:sized(size=3), steps=2)").schedule.methods
    assert warm_up == nsr_prerl(3) and after.name == "mine"
    both = build_schedule(f"{mine}:sized(size=3, credit=nsr)+rltt").schedule.at(0)
    assert both.changes == {"passes", "credit", "readout"} and both.passes == (fresh(3),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sized", "method.size: .*mine.py:sized has no default for it"),
        ("size", r"has no 'size' \(did you mean 'sized'\?\)"),
        ("wrong", "returns int, not a Method or a Schedule"),
    ],
)
def test_a_method_of_ones_own_that_does_not_fit(mine, name, message):
    with pytest.raises(UserError, match=message):
        build_schedule(f"{mine}:{name}")


def test_a_file_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        build_schedule(f"{tmp_path}/none.py:mine")
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match=r"bad.py fails: ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        build_schedule(f"{tmp_path}/bad.py:mine")


# ---- refused before anything is trained --------------------------------------------------------


def dry_run(text: str, loops: int = 3) -> list[str]:
    problems = [TASK.problem("train", i) for i in range(2)]
    schedule = build_schedule(text).schedule
    return check_schedule(schedule, TASK, TEXTS, problems, max_new_tokens=40, loops=loops)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("nsr+lte", "hinted"),
        ("nsr-prerl+lte", "hinted"),
        ("nsr+grpo-extra", "extra"),
        ("lte-other-answers+nsr", "hinted"),
    ],
)
def test_a_second_round_that_is_never_trained_is_refused(text, origin):
    """Only what fails is learned from, and what comes of the second round has passed."""
    name = "+".join(sorted(text.split("+")))
    with pytest.raises(
        ContractError, match=rf"^{name}: draws {origin} samples and trains none of them".replace("+", r"\+")
    ):
        dry_run(text)


@pytest.mark.parametrize("text", ["psr+lte", "w-reinforce+lte", "prerl+lte", "nsr+srpo", "nsr-prerl+srpo", "psr+rrpo"])
def test_what_is_trained_of_it_is_not(text):
    assert dry_run(text)


@pytest.mark.parametrize(
    "text", ["rltt", "srpo+rltt", "lte+rltt", "dsrl(lte, steps=20)+rltt", "rltt-distillation", "nsr+rltt(kl=0.1)"]
)
def test_loops_need_a_model_that_has_them(text):
    assert dry_run(text)
    with pytest.raises(ContractError, match=r"its readout reads loops, but the model runs 1 \(it has no loops\)"):
        dry_run(text, loops=1)


def test_a_run_is_refused_in_one_line():
    run = Run.model_validate({"method": {"name": "nsr+lte"}, "model": {"name": "pico", "device": "cpu"}})
    with pytest.raises(UserError, match=r"^lte\+nsr: draws hinted samples and trains none of them"):
        prepare(run)


PAIRED = ("grpo", "dapo", "nsr", "nsr-prerl", "dsrl", "lte", "srpo", "rltt", "rltt-distillation", "reinforce++")


def test_every_pair_is_a_method_or_an_error():
    """No composition of two ends in anything but a method, whatever the order, or one line that says what clashes."""
    assert set(PAIRED) <= set(PRESETS)
    made, refused = 0, 0
    for index, one in enumerate(PAIRED):
        for other in PAIRED[index + 1 :]:
            try:
                schedule = build_schedule(f"{one}+{other}").schedule
            except UserError as error:
                refused += 1
                said = str(error)
                assert "both change '" in said, said
                with pytest.raises(UserError, match="both change '"):
                    build_schedule(f"{other}+{one}")
            else:
                made += 1
                assert all(isinstance(method, Method) for method in schedule.methods)
                assert build_schedule(f"{other}+{one}").schedule == schedule
    assert made > 15 and refused > 15
    assert build_schedule("rrpo+rltt").schedule.at(0) == rrpo() + rltt()

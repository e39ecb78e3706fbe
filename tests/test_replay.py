"""Logged rollouts back as a forest, and under another method: what was logged comes out again, to the gradient."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import fields

import pytest
import torch

import mulligan.train as training
from mulligan.assign import assign
from mulligan.config import read_toml, to_toml, validate
from mulligan.errors import UserError
from mulligan.learner.update import Learner, Plan
from mulligan.log import read_metrics
from mulligan.methods import build_schedule
from mulligan.models.loading import load_model
from mulligan.records import read_samples, rebuild
from mulligan.replay import GradientSums, problem_gradients, replay
from mulligan.rollout import fresh, rollout
from mulligan.rundir import sample_records
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.session import prepare
from mulligan.tasks.chain import Chain, ChainSettings
from mulligan.texts import Texts
from mulligan.types import Forest, Grade
from tests.e2e.helpers import call, make_model, refused
from tests.helpers import TASK, TEXTS, TOKENIZER, each

LEVEL, LONGEST = 2, 48


class Silent:
    """A reporter that tells nobody."""

    def started(self, *_, **__): ...
    def phase(self, *_): ...
    def stepped(self, *_): ...
    def evaluated(self, *_): ...


def settings(out, method, steps, **more):
    return {
        "steps": steps,
        "out": str(out),
        "model": {"name": "pico", "device": "cpu"},
        "task": {"name": "chain", "level": LEVEL},
        "method": method,
        "sampling": {"prompts": 4, "max_new_tokens": LONGEST},
        "eval": {"every": 0, "problems": 1, "samples": 1},
        "checkpoint": {"every": 1, "keep": 9},
        **more,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By method: the run's directory, and the forests and rows of its steps as they lived."""
    torch.set_num_threads(1)
    folder, out = tmp_path_factory.mktemp("runs"), {}
    for name, size, steps in (("grpo", "group_size", 2), ("lte", "group_size", 1), ("srpo", "chains", 1)):
        live = []

        def noted(forest, rows, live=live):
            live.append((forest, list(rows)))
            return sample_records(forest, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "sample_records", noted)
            run = validate(settings(folder / name, {"name": name, size: 4}, steps))
            training.train(prepare(run), Silent())
        out[name] = (folder / name, live)
    return out


@pytest.fixture
def grpo(runs, tmp_path):
    """A copy of the GRPO run, to be damaged."""
    shutil.copytree(runs["grpo"][0], tmp_path / "run")
    return tmp_path / "run"


STEPS = [("grpo", 1), ("grpo", 2), ("lte", 1), ("srpo", 1)]


# --- the forest -----------------------------------------------------------------------------------------


def same_forest(ours, live):
    """Everything that crosses a stage boundary is equal, log-probs to the logged digits."""
    assert ours.step == live.step
    for mine, theirs in ((ours.trees, live.trees), (ours.filtered, live.filtered)):
        assert [t.problem for t in mine] == [t.problem for t in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert len({id(s.request) for s in a.samples}) == len({id(s.request) for s in b.samples})
            for x, y in zip(a.samples, b.samples, strict=True):
                for field in fields(x):
                    if field.name != "behavior_logprobs":
                        assert getattr(x, field.name) == getattr(y, field.name), field.name
                assert x.behavior_logprobs == pytest.approx(y.behavior_logprobs, rel=0, abs=5.01e-7)


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_a_logged_forest_is_rebuilt(name, step, runs):
    directory, live = runs[name]
    forest, _ = live[step - 1]
    same_forest(rebuild(read_samples(directory, step), Chain(ChainSettings(level=LEVEL))), forest)


def test_the_runs_hold_every_mechanism(runs):
    """Otherwise the tests here would show little."""
    (lte, _), (srpo, _) = runs["lte"][1][0], runs["srpo"][1][0]
    assert any(s.passed for s in lte.samples if s.origin == "hinted")
    assert {s.origin for s in srpo.samples} == {"fresh", "diagnosis", "reset"}
    assert any(s.branch for s in srpo.samples)
    assert len({s.grade.reward for s in runs["grpo"][1][1][0].samples}) == 2


def test_every_field_of_a_request_is_rebuilt():
    """Filtered groups, responses from elsewhere, probes, limits and stop strings: what no shipped run mixes."""

    def odd(problem, tree, ask):
        (first,) = yield ask.samples(
            1, origin="probe", max_new_tokens=5, temperature=0.0, stop=(";", "?"), graded=False
        )
        yield ask.given(first.tokens, (-0.25,) * len(first.tokens), origin="remembered")
        parent = tree.samples[0]
        yield [ask.samples(2, prefix=parent.tokens[:2], parent=parent.uid, group=parent.group), ask.samples(1)]

    def verify(problem, response):
        grade = TASK.verify(problem, response)
        return Grade(
            verdict=grade.verdict, reward=0.3, answer=None, reason="é", first_wrong_step=2, steps=3, mentions_hint=True
        )

    cursor = iter(range(9))
    forest = rollout(
        lambda: (lambda i: (i, TASK.problem("train", i)))(next(cursor)),
        2,
        (fresh(3), odd),
        step=6,
        seed=1,
        texts=TEXTS,
        sampler=ScriptedSampler(TOKENIZER, lambda request, attempt: (f"{attempt};", "length" if attempt else "stop")),
        grade=each(verify),
        keep=lambda tree: tree.problem.index % 2 == 1,
    )
    assert [t.problem.index for t in forest.trees] == [1, 3] and [t.problem.index for t in forest.filtered] == [0, 2]
    lines = [json.dumps(record) for record in sample_records(forest, [])]
    same_forest(rebuild([json.loads(line) for line in lines], TASK), forest)


# --- the run's own method -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_the_runs_own_method_gives_what_was_logged(name, step, runs):
    directory, live = runs[name]
    report = replay(directory, step, name)
    logged = next(r for r in read_metrics(directory / "metrics.jsonl") if r["step"] == step and "update/loss" in r)
    run, other = report["methods"]["run"], report["methods"]["replay"]
    source = "the base model pico" if step == 1 else f"checkpoints/step-{step - 1:08d}"
    assert report["weights"]["line"] == f"weights: {source}, those that sampled step {step}"
    assert report["notes"] == [] and run["off_log"] == 0.0
    assert report["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert run["gradient_norm"] == other["gradient_norm"] == pytest.approx(logged["update/gradient_norm"], rel=1e-5)
    assert run["logged_gradient_norm"] == logged["update/gradient_norm"]
    assert run["loss"] == pytest.approx(logged["update/loss"], abs=1e-6)
    assert run["mismatch"] == pytest.approx(logged["mismatch/mean"], abs=1e-5)
    assert (run["rows"], run["trained_tokens"]) == (logged["update/rows"], logged["update/tokens"])
    forest, rows = live[step - 1]
    by_uid = {row.sample.uid: row for row in rows}
    assert len(by_uid) == len(rows)
    for sample, told in zip(forest.samples, report["samples"], strict=True):
        assert (told["uid"], told["verdict"], told["response"]) == (sample.uid, sample.grade.verdict, sample.text[:80])
        assert told["run"] == told["replay"] and (told["run"] is None) == (sample.uid not in by_uid)
        if told["run"] is not None:
            row = by_uid[sample.uid]
            trained = row.advantages[row.mask]
            assert told["run"]["tokens"] == len(trained) == len(sample.behavior_logprobs)
            assert {told["run"][k] for k in ("mean", "min", "max")} == {float(trained[0])} == set(trained.tolist())


# --- another method -------------------------------------------------------------------------------------


def test_another_credit_gives_other_advantages(runs):
    """MaxRL: (r - mean) / mean, and 0 in a group without a pass; all else is GRPO's."""
    directory, live = runs["grpo"]
    report = replay(directory, 1, "maxrl")
    forest, _ = live[0]
    for sample, told in zip(forest.samples, report["samples"], strict=True):
        centre = sum(s.grade.reward for s in forest.samples if s.group == sample.group) / 4
        assert told["replay"]["mean"] == pytest.approx((sample.grade.reward - centre) / centre if centre else 0.0)
    assert sum(told["run"] != told["replay"] for told in report["samples"]) >= 8
    run, other = report["methods"]["run"], report["methods"]["replay"]
    assert other["gradient_norm"] != pytest.approx(run["gradient_norm"], rel=0.01)
    assert other["snr"] != pytest.approx(run["snr"], rel=0.001)
    assert 0.5 < report["cosine"] < 0.999
    assert other["settings"]["group_size"] == 8 and run["settings"]["group_size"] == 4


def test_origins_are_never_invented(runs):
    lte = replay(runs["grpo"][0], 2, "lte")
    assert lte["notes"] == ["lte can draw hinted samples; this step's log has none, and none can be invented"]
    assert lte["cosine"] == pytest.approx(1.0, abs=1e-9)  # without a hinted row LTE is GRPO
    grpo = replay(runs["lte"][0], 1, "grpo")
    assert grpo["notes"] == ["grpo never draws hinted samples; the logged ones go through its select as they are"]
    hinted = [told for told in grpo["samples"] if told["origin"] == "hinted"]
    assert all(told["replay"] for told in hinted) and not all(told["run"] for told in hinted)
    assert grpo["cosine"] < 0.99


def test_a_group_filter_narrows_the_batch(runs):
    directory, live = runs["grpo"]
    forest, _ = live[0]
    alive = [t for t in forest.trees if len({s.passed for s in t.samples}) == 2]
    assert 0 < len(alive) < 4
    report = replay(directory, 1, "dapo")
    gone = 4 - len(alive)
    assert report["notes"] == [f"dapo filters out {gone} of 4 problems; it would draw others in their place"]
    assert report["methods"]["replay"]["problems"] == len(alive)
    kept = {t.problem.uid for t in alive}
    assert all((told["replay"] is not None) == (told["problem"] in kept) for told in report["samples"])


def test_a_schedule_is_what_it_is_at_the_step(runs):
    directory, _ = runs["grpo"]
    warm_up, after = (replay(directory, step, "dsrl(grpo, steps=1)") for step in (1, 2))
    assert after["methods"]["replay"]["phase"] == "grpo" != warm_up["methods"]["replay"]["phase"]
    assert all(told["run"] == told["replay"] for told in after["samples"])
    failed = [told for told in warm_up["samples"] if told["replay"]]
    assert failed and all(told["verdict"] == "fail" and told["replay"]["max"] < 0 for told in failed)


def test_settings_of_the_runs_own_method_are_kept(runs):
    report = replay(runs["srpo"][0], 1, "srpo", ["method.surrogate=clipped"])
    assert report["methods"]["replay"]["settings"] == report["methods"]["run"]["settings"] | {"surrogate": "clipped"}
    assert report["notes"] == [] and report["cosine"] == pytest.approx(
        1.0, abs=1e-6
    )  # at ratio 1 both are A grad log pi


def test_settings_of_a_composition_are_kept_method_by_method(grpo):
    toml = read_toml(grpo / "run.toml")
    toml["method"] = {"name": "srpo+rltt", "srpo": {"chains": 3}, "rltt": {"weighting": "progressive", "power": 3.0}}
    (grpo / "run.toml").write_text(to_toml(toml))
    report = replay(grpo, 1, "srpo+rltt", ["method.surrogate=clipped", "method.rltt.power=2.0"])
    run, other = (report["methods"][who]["settings"] for who in ("run", "replay"))
    assert (run["srpo"]["chains"], run["srpo"]["surrogate"], run["rltt"]["power"]) == (3, "reinforce", 3.0)
    assert other == {"srpo": run["srpo"] | {"surrogate": "clipped"}, "rltt": run["rltt"] | {"power": 2.0}}
    published = replay(grpo, 1, "srpo-published+rltt-published")  # they want 4 and 2 updates a batch; the run says 1
    assert published["methods"]["replay"]["settings"]["rltt-published"]["weighting"] == "exit"
    bare = replay(grpo, 1, "srpo+rltt", ["method.power=1.5"])["methods"]["replay"]["settings"]
    assert bare == {"srpo": run["srpo"], "rltt": run["rltt"] | {"power": 1.5}}


def test_several_updates_of_a_batch_are_one_here(grpo):
    toml = (grpo / "run.toml").read_text()
    (grpo / "run.toml").write_text(toml.replace("updates_per_batch = 1", "updates_per_batch = 2"))
    report = replay(grpo, 1, "grpo")
    assert report["notes"] == ["the run makes 2 updates of a batch; the gradients here are those of the batch as one"]
    assert report["methods"]["run"]["rows"] == 16 and report["methods"]["run"]["off_log"] == 0.0


# --- gradients ------------------------------------------------------------------------------------------


def test_running_sums():
    """g = (1, 0), (0, 1), (2, 2): mean (1, 1), |mean|^2 = 2; sum |g|^2 = 1 + 1 + 8 = 10, tr Cov = (10 - 3 * 2) / 2 = 2;
    SNR = 2 / (2 / 3) = 3; the sum is (3, 3), its norm 3 sqrt 2, its cosine with (1, 0) 1 / sqrt 2."""
    sums, other = GradientSums(), GradientSums()
    for part in ((1.0, 0.0), (0.0, 1.0), (2.0, 2.0)):
        sums.add([torch.tensor([part[0]]), torch.tensor([[part[1]]])])
    other.add(())
    assert sums.snr == pytest.approx(3.0) and sums.norm == pytest.approx(18**0.5)
    assert other.norm == 0.0 and other.snr is None and sums.cosine(other) is None
    other.add([torch.tensor([1.0]), torch.tensor([[0.0]])])
    assert sums.cosine(other) == pytest.approx(0.5**0.5)
    assert other.snr == pytest.approx(1.0)  # 0 and 1: mean 1/2, tr Cov 1/2; (1/4) / (1/4)
    same = GradientSums()
    same.add([torch.ones(2, dtype=torch.bfloat16)])
    assert same.total[0].dtype == torch.float32 and same.snr is None


def learner_of(model, **plan):
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    return Learner(model, TOKENIZER, still, Plan(clip_norm=0.0, **plan), rate=lambda _: 0.0)


def test_signal_to_noise_by_brute_force(runs):
    """SRPO's loss written anew in float64: -(1/B) sum_i A_i mean_{t behind the branch} log pi(y_t | x, y_<t)."""
    directory, live = runs["srpo"]
    forest, rows = live[0]
    model = copy.deepcopy(load_model("pico", device="cpu").model).double()
    gradients = []
    for tree in forest.trees:
        loss = torch.zeros((), dtype=torch.float64)
        for row in (r for r in rows if r.sample in tree.samples and r.advantages.any()):
            ids = torch.tensor([(*row.context, *row.tokens)])
            logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(row.context) - 1 : -1]
            drawn = logprobs.gather(-1, torch.tensor(row.tokens)[:, None])[:, 0][row.sample.branch :]
            loss = loss - float(row.advantages[-1]) * drawn.mean() / len(rows)
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    g = torch.stack(gradients)
    assert len(g) == 4 and (g.norm(dim=1) > 0).sum() >= 2
    snr = float(g.mean(0).square().sum() / (g.var(0, correction=1).sum() / len(g)))
    told = replay(directory, 1, "srpo")["methods"]["run"]
    assert told["snr"] == pytest.approx(snr, rel=1e-4)
    assert told["gradient_norm"] == pytest.approx(float(g.sum(0).norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "name", "step"),
    [
        ("grpo(entropy_bonus=0.1)", "grpo", 2),
        ("nsr-prerl", "grpo", 2),  # the first problem has no failure, so no row
        ("lte(separate=true, gamma=0.5)", "lte", 1),
        ("srpo+rltt", "lte", 1),
        ("gspo", "lte", 1),
        ("w-reinforce", "lte", 1),
    ],
)
def test_the_parts_add_up_to_the_batch(method, name, step, runs):
    """Problem by problem the gradient is that of one whole update, whatever the denominators; no weight moves."""
    live, _ = runs[name][1][step - 1]
    forest = Forest(0, live.trees[:2])
    made, texts = build_schedule(method).schedule.at(0), Texts(Chain(ChainSettings(level=LEVEL)), TOKENIZER)
    model = load_model("pico", device="cpu").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learner = learner_of(model)
    rows = assign(made, forest, texts, learner.fill_streams, LONGEST)
    whole = learner.update(rows, made, 0)
    sums, told = problem_gradients(learner, rows, made, forest)
    assert sums.n == 2 and sums.norm > 0
    assert sums.norm == pytest.approx(whole["update/gradient_norm"], rel=1e-5)
    assert told["loss"] == pytest.approx(whole["update/loss"], abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- weights --------------------------------------------------------------------------------------------


def test_which_weights(grpo):
    shutil.rmtree(grpo / "checkpoints" / "step-00000001")
    later = replay(grpo, 2, "grpo")
    assert later["weights"]["line"] == "weights: checkpoints/step-00000002, 1 step later than those that sampled step 2"
    assert later["weights"]["away"] == 1 and later["methods"]["run"]["off_log"] == 0.0
    run = later["methods"]["run"]
    assert run["gradient_norm"] != pytest.approx(run["logged_gradient_norm"], rel=1e-3)
    toml = (grpo / "run.toml").read_text()
    (grpo / "run.toml").write_text(toml.replace('name = "pico"', 'name = "./gone"'))
    gone = replay(grpo, 1, "grpo")["weights"]
    assert gone["away"] == 2
    assert gone["name"] == "checkpoints/step-00000002 (not the base model: ./gone: no such directory)"
    (grpo / "run.toml").write_text(toml)
    shutil.rmtree(grpo / "checkpoints")
    base = replay(grpo, 2, "grpo")["weights"]
    assert base["line"] == "weights: the base model pico, 1 step earlier than those that sampled step 2"


def test_other_weights_than_sampled_are_noticed(grpo):
    toml = (grpo / "run.toml").read_text()
    (grpo / "run.toml").write_text(toml.replace('name = "pico"', 'name = "pico-qwen3"'))
    (note,) = replay(grpo, 1, "grpo")["notes"]
    assert note.startswith("these are not the weights that sampled: their log-probs are ")


# --- the command ----------------------------------------------------------------------------------------


def test_the_command(runs):
    directory, _ = runs["grpo"]
    argv = ("replay", directory, "--step", "1", "--method", "dapo", "method.group_size=4")
    said = call(*argv)
    assert said.code == 0, said
    lines = said.out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("problem "))) :]
    assert max(map(len, table)) <= 80
    report = json.loads(call(*argv, "--json").out)
    assert report["methods"]["replay"]["settings"]["group_size"] == 4
    assert len(table) > len(report["samples"]) == 16 and "not trained" in said.out
    assert report["weights"]["line"] in lines and all(note in lines for note in report["notes"])
    first = next(line for line in table if line.startswith("train/0"))
    told = report["samples"][0]
    assert told["verdict"] in first and told["response"][:12] in first
    assert f"cosine of the two gradients {report['cosine']:.4f}" in lines


def test_advantages_that_differ_by_token(runs, tmp_path, monkeypatch):
    """A method of the user's own: half the advantage on even tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from mulligan.method import Method, Term\n"
        "class Halved:\n"
        "    reads = ()\n"
        "    def __call__(self, rows, forest, most):\n"
        "        return [(1.0 if r.sample.passed else -1.0) / (2 - torch.arange(len(r.tokens)) % 2) for r in rows]\n"
        "def mine(): return Method(name='mine', terms=(Term(credit=Halved()),))\n"
    )
    report = replay(runs["grpo"][0], 1, "./mine.py:mine")
    told = report["samples"][0]["replay"]
    assert (told["min"], told["max"]) == (-1.0, -0.5) and told["mean"] == pytest.approx(-0.75, abs=0.01)
    said = call("replay", runs["grpo"][0], "--step", "1", "--method", "./mine.py:mine").out
    assert "-1..-0.5" in said


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--step", "3", "--method", "grpo"], ["no samples of step 3", "steps 1 to 2"]),
        (["--step", "0", "--method", "grpo"], ["--step"]),
        (["--step", "1"], ["--method"]),
        (["--step", "1", "--method", "grop"], ["'grop' is unknown", "grpo"]),
        (["--step", "1", "--method", "dapo", "method.overlog=3"], ["method.overlog", "overlong_buffer"]),
        (["--step", "1", "--method", "grpo", "task.level=3"], ["'task.level=3'", "method.key=value alone"]),
        (["--step", "1", "--method", "grpo", "method.name=lte"], ["--method grpo", "method.name=lte"]),
        (["--step", "1", "--method", "grpo+dr-grpo+rloo"], ["both change"]),
    ],
)
def test_a_wrong_word(argv, parts, runs):
    refused(call("replay", runs["grpo"][0], *argv), *parts)


def edited(run, change):
    """samples.jsonl with every record changed in place; None takes the record out."""
    file = run / "samples.jsonl"
    records = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records if record is not None))
    return run


def test_what_cannot_be_replayed(grpo, tmp_path):
    refused(call("replay", tmp_path, "--step", "1", "--method", "grpo"), "is no run: run.toml is missing")
    toml = (grpo / "run.toml").read_text()
    (grpo / "run.toml").write_text(toml.replace("samples = true", "samples = false"))
    with pytest.raises(UserError, match=r"has no samples to replay: it was run with log\.samples=false"):
        replay(grpo, 1, "grpo")
    (grpo / "run.toml").write_text(toml.replace('name = "grpo"', 'name = "./gone.py:mine"'))
    with pytest.raises(UserError, match=r"run\.toml: method\.name: gone\.py: no such file"):
        replay(grpo, 1, "grpo")
    (grpo / "run.toml").write_text(toml)
    whole = (grpo / "samples.jsonl").read_bytes()

    def after(change, match, step=1):
        edited(grpo, change)
        with pytest.raises(UserError, match=match):
            replay(grpo, step, "grpo")
        (grpo / "samples.jsonl").write_bytes(whole)

    after(lambda r: {k: v for k, v in r.items() if k != "n"}, "step 1: a logged sample has no 'n'")
    after(lambda r: r | {"gold": "77"}, r"chain/train/0 is another problem now than in the log")
    after(lambda r: None if (r["step"], r["attempt"]) == (1, 2) else r, "samples of chain/train/0 are missing")
    after(lambda r: None if r["problem"] == "chain/train/3" else r, r"samples\.jsonl and metrics\.jsonl .* disagree")
    after(lambda r: None, "holds no samples yet")
    (grpo / "samples.jsonl").write_bytes(whole[:-9])  # a kill cut its last line short
    with pytest.raises(UserError, match="samples of chain/train/7 are missing"):
        replay(grpo, 2, "grpo")
    (grpo / "samples.jsonl").write_bytes(b'{"step": 1, "uid"\n' + whole)
    with pytest.raises(UserError, match=r"samples\.jsonl:1: not JSON"):
        replay(grpo, 1, "grpo")
    (grpo / "samples.jsonl").write_bytes(b"[]\n" + whole)
    with pytest.raises(UserError, match=r"samples\.jsonl:1: no sample of a step"):
        replay(grpo, 1, "grpo")
    (grpo / "samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot read"):
        replay(grpo, 1, "grpo")


def test_another_version_of_the_method_is_noticed(grpo):
    """Logged rows and advantages that the run's own method no longer gives."""
    edited(grpo, lambda r: r | {"rows": [row | {"advantage": row["advantage"] + 0.5} for row in r["rows"]]})
    report = replay(grpo, 1, "grpo")
    assert report["methods"]["run"]["off_log"] == pytest.approx(0.5)
    assert report["notes"] == ["the run's own advantages come out up to 0.5 off the logged ones"]
    edited(grpo, lambda r: r | {"rows": []})
    assert replay(grpo, 1, "grpo")["notes"] == [
        "the run's own method gives other rows than it logged: it is not what it was"
    ]


def test_a_method_that_the_model_cannot_run(tmp_path):
    model = make_model(tmp_path / "flat", "qwen3")
    given = settings(tmp_path / "run", {"name": "grpo", "group_size": 2}, 1)
    given |= {"model": {"name": str(model), "device": "cpu"}, "task": {"name": "chain", "level": 1}}
    given["sampling"] = {"prompts": 1, "max_new_tokens": 4}
    training.train(prepare(validate(given)), Silent())
    refused(call("replay", tmp_path / "run", "--step", "1", "--method", "rltt"), "rltt", "has no loops")
    report = replay(tmp_path / "run", 1, "grpo")  # no reward, no gradient, a single problem
    assert report["cosine"] is None and report["methods"]["run"]["snr"] is None
    assert "cosine of the two gradients -" in call("replay", tmp_path / "run", "--step", "1", "--method", "grpo").out

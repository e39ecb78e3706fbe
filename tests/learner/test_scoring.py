"""The scorer against full logits and against the sampler."""

from __future__ import annotations

import math

import pytest
import torch

from mulligan import context as contexts
from mulligan.assign import assign
from mulligan.errors import ContractError, UserError
from mulligan.learner import scoring
from mulligan.learner.packing import Item, micro_batches, pack
from mulligan.learner.scoring import check_head, number_of_loops, score
from mulligan.methods.grpo import grpo
from mulligan.objective import BEHAVIOR, START
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.seeds import seed_of
from mulligan.types import Completion, Request, Sample, Stream
from tests.helpers import (
    LOOPS,
    TASK,
    TEXTS,
    TOKENIZER,
    VOCABULARY,
    Probe,
    flat,
    make_forest,
    make_row,
    make_sample,
    tiny,
    tokens,
)

KINDS = ["qwen3", "looped"]


def items() -> list[Item]:
    """Mixed lengths and temperatures, one with a hole in what is wanted, one with nothing wanted."""
    hole = torch.ones(9, dtype=torch.bool)
    hole[2:6] = False
    return [
        Item((1,), tokens(5, 1), torch.ones(5, dtype=torch.bool), 1.0),
        Item((1, *tokens(12, 2)), tokens(9, 3), hole, 0.7),
        Item((1, 8), tokens(3, 4), torch.zeros(3, dtype=torch.bool), 1.0),
        Item((1, 8, 9), tokens(1, 5), torch.ones(1, dtype=torch.bool), 1.5),
    ]


def full_table(model, item: Item, *, loop: int | None = None) -> torch.Tensor:
    """[T, V] log-probs of the response's positions, from the model's own logits of this one row."""
    ids = torch.tensor([[*item.context, *item.response]])
    if loop is None:
        logits = model(ids).logits[0]
    else:
        logits = model.lm_head(model(ids, output_loops=True).loop_hidden_states[loop - 1][0])
    table = torch.log_softmax(logits / torch.tensor(item.temperature, dtype=torch.float32), -1)
    return table[len(item.context) - 1 : -1]


def expected(model, *, loop: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of everything that is wanted, end to end."""
    logprobs, entropies = [], []
    for item in items():
        table = full_table(model, item, loop=loop)
        logprobs.append(table.gather(1, torch.tensor(item.response)[:, None])[item.wanted, 0])
        entropies.append(-(table.exp() * table).sum(-1)[item.wanted])
    return torch.cat(logprobs), torch.cat(entropies)


def near(found: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-10) -> bool:
    assert found.shape == right.shape
    return bool((found - right).abs().max() <= tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_and_entropy_are_those_of_the_full_softmax(kind):
    model = tiny(kind)
    batch = pack(items(), 0, model.device)
    with torch.no_grad():
        found = score(model, batch, entropy=True)
        logprobs, entropy = expected(model)
    assert found.logprobs.dtype == torch.float64  # a float64 model is scored in float64
    assert near(found.logprobs, logprobs[None])
    assert found.entropy is not None and near(found.entropy, entropy)
    assert bool((entropy > 0).all()) and bool((entropy < math.log(VOCABULARY)).all())
    assert found.exits is None
    assert batch.row.tolist() == [0] * 5 + [1] * 5 + [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entropy", [False, True])
def test_a_chunked_head_changes_neither_values_nor_gradients(kind, entropy, monkeypatch):
    model = tiny(kind)
    batch = pack(items(), 0, model.device)
    weights = torch.linspace(-1, 1, len(batch.targets), dtype=torch.float64)

    def run(chunk: int):
        monkeypatch.setattr(scoring, "CHUNK", chunk)
        model.zero_grad()
        out = score(model, batch, entropy=entropy)
        loss = (weights * out.logprobs[0]).sum() + (0 if out.entropy is None else (weights**2 * out.entropy).sum())
        loss.backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.logprobs.detach(), None if out.entropy is None else out.entropy.detach(), gradient

    logprobs, entropies, gradient = run(1 << 23)
    for chunk in (1, 4 * VOCABULARY, 10 * VOCABULARY):  # one token a chunk, four, all but one
        again, entropies_again, gradient_again = run(chunk)
        assert near(again, logprobs, 1e-14)
        if entropies is not None:
            assert near(entropies_again, entropies, 1e-14)
        assert gradient_again.keys() == gradient.keys()
        assert (flat(gradient_again) - flat(gradient)).norm() <= 1e-12 * flat(gradient).norm()


def test_logits_are_computed_again_only_where_keeping_them_would_cost(monkeypatch):
    model = tiny("qwen3")
    batch = pack(items(), 0, model.device)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    score(model, batch).logprobs.sum().backward()
    assert rows == [11]  # one chunk is kept
    rows.clear()
    monkeypatch.setattr(scoring, "CHUNK", 5 * VOCABULARY)
    out = score(model, batch).logprobs
    assert rows == [5, 5, 1]
    out.sum().backward()
    assert sorted(rows) == [1, 1, 5, 5, 5, 5]
    rows.clear()
    with torch.no_grad():
        score(model, batch)
    assert rows == [5, 5, 1]


def test_loops_and_exit_probabilities():
    model = tiny("looped")
    batch = pack(items(), 0, model.device)
    assert number_of_loops(model) == LOOPS
    with torch.no_grad():
        found = score(model, batch, loops=(1, 2, 3), entropy=True, exits=True)
        for k, loop in enumerate((1, 2, 3)):
            logprobs, entropy = expected(model, loop=loop)
            assert near(found.logprobs[k], logprobs)
        assert found.entropy is not None and near(found.entropy, entropy)  # of the last loop asked for
        assert found.exits is not None and found.exits.shape == (11, LOOPS)
        assert near(found.exits.sum(-1), torch.ones(11, dtype=torch.float64))
        exits = [
            model(torch.tensor([[*i.context, *i.response]]), output_loops=True).exit_probabilities[
                0, len(i.context) - 1 : -1
            ]
            for i in items()
        ]
        assert near(found.exits, torch.cat([e[i.wanted] for e, i in zip(exits, items(), strict=True)]))
        # The last loop is what is scored when nothing is said; fewer loops can be run; order is as asked.
        assert near(score(model, batch).logprobs, found.logprobs[2:])
        assert near(score(model, batch, num_loops=2).logprobs, found.logprobs[1:2])
        assert near(score(model, batch, loops=(3, 1)).logprobs, found.logprobs[[2, 0]])
    assert found.exits.std(0).min() > 1e-3  # not the same everywhere


def test_what_a_model_cannot_give_is_refused():
    qwen, looped = tiny("qwen3"), tiny("looped")
    assert number_of_loops(qwen) == 1
    batch = pack(items(), 0, qwen.device)
    for wrong in ({"loops": (1,)}, {"exits": True}, {"num_loops": 2}):
        with pytest.raises(UserError, match="has no loops"):
            score(qwen, batch, **wrong)
    for wrong in ({"loops": (0,)}, {"loops": (4,)}, {"loops": (3,), "num_loops": 2}):
        with pytest.raises(UserError, match="cannot be read"):
            score(looped, batch, **wrong)
    with pytest.raises(ValueError, match="context"):
        pack([Item((), (5,), torch.ones(1, dtype=torch.bool), 1.0)], 0, qwen.device)


def test_a_head_that_does_more_is_refused(monkeypatch):
    """What the scorer does not know would give other log-probs than the sampler's."""
    model = tiny("qwen3")
    check_head(model)
    whole = type(model).forward

    def warmer(self, *args, **kwargs):
        out = whole(self, *args, **kwargs)
        out.logits = 0.999 * out.logits
        return out

    monkeypatch.setattr(type(model), "forward", warmer)
    with pytest.raises(UserError, match="qwen3: its logits are more than its head"):
        check_head(model)
    with pytest.raises(UserError, match="qwen3"):
        Probe(model)


def test_a_softcap_is_applied():
    model = tiny("qwen3")
    model.config.final_logit_softcapping = 2.0
    batch = pack(items(), 0, model.device)
    with torch.no_grad():
        found = score(model, batch).logprobs[0]
        item = items()[0]
        logits = model(torch.tensor([[*item.context, *item.response]])).logits[0, len(item.context) - 1 : -1]
        table = torch.log_softmax(2.0 * torch.tanh(logits / 2.0), -1)
    assert near(found[:5], table.gather(1, torch.tensor(item.response)[:, None])[:, 0])


# ---- packing -----------------------------------------------------------------------------------


def test_micro_batches_stay_within_the_budget_and_lose_no_row():
    assert micro_batches([3, 9, 4, 8], budget=10) == [[0, 2], [3], [1]]
    assert micro_batches([], budget=10) == []
    assert micro_batches([50, 2], budget=10) == [[1], [0]]  # a row beyond the budget goes alone
    lengths = [int(x) for x in torch.randint(1, 60, (80,), generator=torch.Generator().manual_seed(0))]
    for budget in (1, 64, 200, 10**6):
        found = micro_batches(lengths, budget)
        assert sorted(i for part in found for i in part) == list(range(80))
        assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget for part in found)


# ---- the sampler and the learner agree ---------------------------------------------------------


def sampled(model, temperature: float) -> list[Sample]:
    """Mixed prompt lengths (so the sampler pads on the left), prefixes, and one request of its own temperature."""
    requests = []
    for k, (length, prefix) in enumerate([(1, 0), (9, 3), (30, 0), (4, 12), (17, 1)]):
        problem = TASK.problem("train", k)
        requests.append(
            Request(
                problem=problem,
                group=k,
                n=3,
                context=(1, *tokens(length, seed=k)),
                prefix=tokens(prefix, seed=20 + k),
                seeds=tuple(seed_of(k, a) for a in range(3)),
                temperature=1.3 if k == 4 else None,
            )
        )
    out: list[Sample] = []

    def on_done(request: Request, completions: tuple[Completion, ...]):
        for attempt, completion in enumerate(completions):
            sample = make_sample(uid=len(out), context=request.context, problem=request.problem)
            sample.request, sample.attempt = request, attempt
            sample.tokens = (*request.prefix, *completion.tokens)
            sample.behavior_logprobs = completion.behavior_logprobs
            out.append(sample)
        return ()

    sampler = EmbeddedSampler(model, TOKENIZER, temperature=temperature, max_new_tokens=24, max_rows=11)
    sampler.run(requests, on_done)
    assert len({len(s.request.context) for s in out}) == 5 and len({len(s.tokens) for s in out}) > 5
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_learners(kind, temperature):
    model = tiny(kind, torch.float32)
    samples = sampled(model, temperature)
    learner = Probe(model, temperature=temperature, tokens_per_micro_batch=150).learner
    rows = [make_row(sample) for sample in samples]
    learner.fill_streams(rows, [START, BEHAVIOR], lambda row, _: row.context)
    asked = learner.score_samples(samples, Stream(model="policy"))
    for row, scores in zip(rows, asked, strict=True):
        behavior = torch.tensor(row.sample.behavior_logprobs)
        own = row.streams[START.name][row.mask]
        assert near(own, behavior, 1e-5)
        assert torch.equal(scores, row.streams[START.name])
        assert torch.equal(row.streams[BEHAVIOR.name][row.mask], behavior)
        assert not row.streams[BEHAVIOR.name][~row.mask].any()  # nobody drew the prefix
    # The temperature matters: at another one the same rows are far off.
    learner.plan.temperature = 2.0
    learner.fill_streams(rows, [START], lambda row, _: row.context)
    off = torch.cat([r.streams[START.name][r.mask] - torch.tensor(r.sample.behavior_logprobs) for r in rows])
    assert off.abs().mean() > 0.05


def test_mismatch_metrics_see_a_wrong_behavior_logprob():
    model = tiny("looped", torch.float32)
    samples = sampled(model, 1.0)[:6]
    probe = Probe(model)
    metrics = probe.learner.update([make_row(s, 1.0) for s in samples], grpo(), 0)
    assert metrics["mismatch/max"] < 1e-5 and metrics["update/ratio_off"] == 0.0
    first = samples[0]
    first.behavior_logprobs = (first.behavior_logprobs[0] - 0.25, *first.behavior_logprobs[1:])
    metrics = probe.learner.update([make_row(s, 1.0) for s in samples], grpo(), 0)
    assert metrics["mismatch/max"] == pytest.approx(0.25, abs=1e-4)


def test_a_greedy_sample_is_scored_at_temperature_one():
    model = tiny("qwen3", torch.float32)
    sample = make_sample(temperature=0.0, response=tokens(6))
    (scores,) = Probe(model, temperature=0.5).learner.score_samples([sample], START)
    with torch.no_grad():
        table = full_table(model, Item(sample.request.context, sample.tokens, torch.ones(6, dtype=torch.bool), 1.0))
    assert near(scores, table.gather(1, torch.tensor(sample.tokens)[:, None])[:, 0], 1e-5)


# ---- streams -----------------------------------------------------------------------------------


def test_streams_of_every_quantity():
    model = tiny("looped")
    probe = Probe(model)
    sample = make_sample(response=tokens(6), prefix=tokens(2, 9))
    item = Item(sample.request.context, sample.tokens, torch.ones(8, dtype=torch.bool), 1.0)
    target = torch.tensor(sample.tokens)[:, None]
    with torch.no_grad():
        exits = model(torch.tensor([[*item.context, *item.response]]), output_loops=True).exit_probabilities
        tables = {loop: full_table(model, item, loop=loop) for loop in (1, 3)}
    right = {
        Stream(loop=1): tables[1].gather(1, target)[:, 0],
        Stream(model="policy"): tables[3].gather(1, target)[:, 0],
        Stream(quantity="entropy", loop=1): -(tables[1].exp() * tables[1]).sum(-1),
        Stream(quantity="entropy"): -(tables[3].exp() * tables[3]).sum(-1),
        Stream(quantity="exit_probability", loop=2): exits[0, 1:-1, 1],
        Stream(quantity="exit_probability"): exits[0, 1:-1, 2],
    }
    row = make_row(sample)
    probe.learner.fill_streams([row], list(right), lambda row, _: row.context)
    for stream, values in right.items():
        found = row.streams[stream.name]
        assert found.dtype == torch.float32 and not found.requires_grad
        assert near(found.double(), values, 1e-6), stream.name
    assert set(row.streams) == {s.name for s in right}
    assert Stream(loop=1).name == "start_logprobs#1"
    assert Stream(model="policy", quantity="entropy", context="nothing").name == "policy_entropy@nothing"


def test_a_reference_is_the_frozen_model():
    model, other = tiny("qwen3"), tiny("qwen3")
    with torch.no_grad():
        other.get_output_embeddings().weight *= 2
    sample, stream = make_sample(response=tokens(4)), Stream(model="reference")
    with pytest.raises(ContractError, match=r"'reference_logprobs' needs a frozen reference"):
        Probe(model).learner.score_samples([sample], stream)
    (of_reference,) = Probe(model, reference=other).learner.score_samples([sample], stream)
    (of_other,) = Probe(other).learner.score_samples([sample], START)
    assert torch.equal(of_reference, of_other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantity": "logits"}, "quantity must be one of"),
        ({"loop": 0}, "count from 1"),
        ({"model": "behavior", "quantity": "entropy"}, "log-probs of the last loop alone"),
    ],
)
def test_a_stream_that_does_not_exist_is_not_taken_for_another(wrong, message):
    with pytest.raises(ValueError, match=message):
        Stream(**wrong)


def test_a_pass_scores_in_the_samplers_context_alone():
    with pytest.raises(ContractError, match=r"start_logprobs@nothing"):
        Probe(tiny("qwen3")).learner.score_samples([make_sample()], Stream(context="nothing"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_the_context_of_nothing_hold_no_prompt_token(kind):
    """P(y): BOS, then the response; its first token and its EOS are scored."""
    model = tiny(kind)
    probe = Probe(model)
    problem = TASK.problem("train", 0)
    samples = [
        make_sample(
            uid=k,
            problem=problem,
            context=TEXTS.prompt(problem),
            reward=float(k),
            response=(*tokens(5 + k, seed=k), TOKENIZER.eos_token_id),
        )
        for k in range(2)
    ]
    method = grpo().replace(context=contexts.nothing)
    rows = assign(method, make_forest(samples), TEXTS, probe.learner.fill_streams, 20)
    assert [row.context for row in rows] == [(TOKENIZER.bos_token_id,)] * 2
    assert all(bool(row.mask.all()) for row in rows)
    probe.learner.fill_streams(rows, [START], lambda row, _: row.context)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0]))
    probe.update(rows, method)
    (batch,) = seen
    for ids, row in zip(batch.tolist(), rows, strict=True):
        length = 1 + len(row.tokens)
        assert ids[:length] == [TOKENIZER.bos_token_id, *row.tokens]
        assert set(ids[length:]) <= {TOKENIZER.pad_token_id}
        item = Item((TOKENIZER.bos_token_id,), row.tokens, row.mask, 1.0)
        with torch.no_grad():
            table = full_table(model, item)
        right = table.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        assert near(row.streams[START.name].double(), right, 1e-6)

"""What a base can do beyond solving: find its own mistakes, use a hint, go on without the question."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from mulligan.diagnosis import parse_step
from mulligan.errors import UserError
from mulligan.evaluate import bootstrap, split_size, trees
from mulligan.learner.packing import Item, micro_batches, pack
from mulligan.learner.scoring import score
from mulligan.models.loading import eos_id
from mulligan.rollout import Ask, Attempt, fresh
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import DIAGNOSIS, HINTED, Problem, Tree

JUDGE_TEMPERATURE = 0.3  # arXiv 2605.25507


def localisation(
    task: Task,
    texts: Texts,
    sampler: EmbeddedSampler,
    *,
    split: str,
    problems: int,
    samples: int,
    seed: int,
    progress: Callable[[int, int], Any],
) -> dict[str, Any]:
    """How often the model names the first wrong step of its own failed chains.

    ``best_constant`` is the best that one fixed answer for each number of steps could reach on these chains.
    """
    _needs_oracle(task, "localisation")

    def diagnose(problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        failed = [s for s in tree.samples if s.failed and s.grade.first_wrong_step is not None]
        if failed:
            yield [
                ask.samples(
                    1,
                    context=texts.diagnosis(problem, task.of(problem).split_steps(s.text)),
                    origin=DIAGNOSIS,
                    parent=s.uid,
                    temperature=JUDGE_TEMPERATURE,
                    graded=False,
                )
                for s in failed
            ]

    found = trees(
        task,
        texts,
        sampler,
        split=split,
        problems=problems,
        seed=seed,
        passes=(fresh(samples), diagnose),
        progress=progress,
    )
    hits, parsed, by_length = [], 0, defaultdict(Counter)
    for tree in itertools.chain.from_iterable(found):
        judged = {s.uid: s for s in tree.samples}
        for said in tree.of(DIAGNOSIS):
            chain = judged[said.request.parent or 0].grade
            named = parse_step(said.text, chain.steps)
            parsed += named is not None
            hits.append(float((named or 1) == chain.first_wrong_step))
            by_length[chain.steps][chain.first_wrong_step] += 1
    if not hits:
        raise UserError("localisation: the model failed no chain")
    constant = sum(max(c.values()) for c in by_length.values()) / len(hits)
    low, high = bootstrap(hits)
    accuracy = sum(hits) / len(hits)
    return {
        "localisation": accuracy,
        "localisation_low": low,
        "localisation_high": high,
        "best_constant": constant,
        "margin": accuracy - constant,
        "parsed": parsed / len(hits),
        "failed_chains": len(hits),
    }


def hint(
    task: Task,
    texts: Texts,
    sampler: EmbeddedSampler,
    *,
    split: str,
    problems: int,
    samples: int,
    seed: int,
    progress: Callable[[int, int], Any],
) -> dict[str, Any]:
    """On problems that no fresh sample solves: new samples behind a hint of the wrong answers against as many
    new plain ones, process-correct, paired by problem."""
    _needs_oracle(task, "hint")

    def retry(problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        if not tree.any_pass():
            wrong: list[str] = []
            for sample in tree.samples:
                answer = sample.grade.answer
                if answer and not any(task.equivalent(problem, answer, other) for other in wrong):
                    wrong.append(answer)
            hinted = ask.samples(samples, context=texts.hint(problem, wrong), origin=HINTED)
            yield [hinted, ask.samples(samples, origin="again")]

    found = trees(
        task,
        texts,
        sampler,
        split=split,
        problems=problems,
        seed=seed,
        passes=(fresh(samples), retry),
        progress=progress,
    )
    gains, rates = [], {HINTED: [], "again": []}
    for tree in itertools.chain.from_iterable(found):
        if tree.of(HINTED):
            share = {o: sum(bool(s.grade.process_correct) for s in tree.of(o)) / samples for o in rates}
            gains.append(share[HINTED] - share["again"])
            for origin, value in share.items():
                rates[origin].append(value)
    if not gains:
        raise UserError("hint: every problem was solved by a fresh sample")
    low, high = bootstrap(gains)
    return {
        "hinted": sum(rates[HINTED]) / len(gains),
        "unhinted": sum(rates["again"]) / len(gains),
        "gain": sum(gains) / len(gains),
        "gain_low": low,
        "gain_high": high,
        "none_pass_problems": len(gains),
    }


def alone(
    task: Task,
    texts: Texts,
    sampler: EmbeddedSampler,
    *,
    split: str,
    problems: int,
    samples: int,
    seed: int,
    progress: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Nats a token of right solutions, with their question and alone (P(y)); ``uniform`` is log of the vocabulary."""
    tokenizer, out = texts.tokenizer, {}
    chosen = [task.problem(split, i) for i in range(split_size(task, split, problems))]
    contexts = {"with_question": texts.prompt, "alone": lambda problem: texts.nothing()}
    for name, context in contexts.items():
        items = []
        for problem in chosen:
            response = (*tokenizer.encode(task.solution(problem), add_special_tokens=False), eos_id(tokenizer))
            items.append(Item(context(problem), response, torch.ones(len(response), dtype=torch.bool), 1.0))
        total, count = 0.0, 0
        for indices in micro_batches([len(i) for i in items], 16384):
            with torch.no_grad():
                logprobs = score(sampler.model, pack([items[i] for i in indices], 0, sampler.model.device)).logprobs[0]
            total, count = total - float(logprobs.sum()), count + len(logprobs)
        out[name] = total / count
        progress(len(chosen), len(chosen))
    return {**out, "uniform": float(torch.tensor(float(len(tokenizer))).log()), "problems": len(chosen)}


def _needs_oracle(task: Task, probe: str) -> None:
    if not task.has_oracle:
        raise UserError(f"--probe {probe} needs a task that knows the truth of every step; '{task.name}' does not")

"""The whole of GRPO and SRPO in one file: sample, grade, give credit, take one gradient step, evaluate, repeat.
It teaches what the library does, in plain code and without its seams; tests/test_loop.py holds the two together.

    python recipes/loop.py --method grpo                # the run of recipes/demo.toml
    python recipes/loop.py --method srpo --steps 2 --prompts 4

GRPO (arXiv 2402.03300) draws a group of chains for each problem and compares each with the group's mean.
SRPO (arXiv 2605.25507) spends half of them elsewhere: the model itself says where one of its failed chains first
went wrong, and continues that chain anew from just before the step that it named.
"""

from __future__ import annotations

import argparse
import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from mulligan.diagnosis import parse_step
from mulligan.models.loading import load_model
from mulligan.seeds import rng_of, seed_of, uniforms
from mulligan.tasks import build_task
from mulligan.tasks.base import Problem, Task

EPS = 1e-6  # added to a group's standard deviation
CLIP, CLIP_NORM = 0.2, 1.0  # of the ratio, of the gradient
MICRO_BATCH = 32  # rows in one forward and backward; it changes memory, never the loss


@dataclass(kw_only=True, eq=False)
class Row:
    """One response: first what is wanted, then what came of it."""

    problem: Problem
    context: list[int]  # what the model sees before the response
    tokens: list[int] = field(default_factory=list)  # the response: a re-entered prefix, then the own tokens
    branch: int = 0  # index of the first own token; the prefix before it is never trained
    group: tuple[int, int] = (0, 0)  # rows with the same group share one baseline
    seed: int = 0
    parent: Row | None = None  # the failed chain that this is a diagnosis or a reset of
    reward: float = 0.0
    passed: bool = False
    advantage: float = 0.0

    @property
    def own(self) -> int:
        return len(self.tokens) - self.branch  # own tokens: those that are trained


@dataclass(kw_only=True)
class Setup:
    """What all parts of the loop share."""

    model: PreTrainedModel
    tokenizer: Any
    task: Task
    method: str = "grpo"
    seed: int = 0
    group_size: int = 8
    temperature: float = 1.0  # log-probs are taken at it, too
    max_new_tokens: int = 128

    def encode(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


# ---- sampling ----------------------------------------------------------------------------------
@torch.no_grad()
def sample(setup: Setup, rows: Sequence[Row], temperature: float) -> None:
    """Draws every row's own tokens, EOS included; all rows decode together, one token a step."""
    if not rows:
        return
    seen = [row.context + row.tokens for row in rows]
    width = max(map(len, seen))
    state = {  # one entry a row that still runs
        "row": torch.arange(len(rows)),
        "ids": torch.tensor([[0] * (width - len(s)) + s for s in seen]),  # padded on the left
        "mask": torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in seen]),
        "seed": torch.tensor([row.seed for row in rows]),
        "start": torch.tensor([row.branch for row in rows]),
    }
    state = {name: values.to(setup.model.device) for name, values in state.items()}
    model, cache = cast(Any, setup.model.eval()), None
    for drawn in range(setup.max_new_tokens):
        ids, mask = state["ids"], state["mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        cumulative = torch.softmax(output.logits[:, -1] / temperature, -1).cumsum(-1, dtype=torch.float64)
        # A token's random number depends on its row's seed and its own index alone, so company changes no row.
        uniform = uniforms(state["seed"], state["start"] + drawn)[:, None]
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])[:, 0]
        for row, value in zip(state["row"].tolist(), token.tolist(), strict=True):
            rows[row].tokens.append(value)
        state |= {"ids": token[:, None], "mask": torch.cat([mask, torch.ones_like(token)[:, None]], 1)}
        going = token.ne(setup.tokenizer.eos_token_id).nonzero()[:, 0]
        if len(going) == 0:
            return
        if len(going) < len(token):
            state = {name: values[going] for name, values in state.items()}
            cache.batch_select_indices(going)


def attempts(setup: Setup, problem: Problem, n: int, seed: int, part: int, diagnosis: Row | None = None) -> list[Row]:
    """n rows that are wanted of one problem, as a group of their own: the problem's ``part`` of the step."""
    context = setup.encode(setup.task.prompt(problem))
    prefix = prefix_of(setup, diagnosis) if diagnosis else []
    whose = {"problem": problem, "group": (problem.index, part), "parent": diagnosis and diagnosis.parent}
    seeds = [seed_of(seed, part, int(diagnosis is not None), 0, k) for k in range(n)]  # as in the library
    return [Row(**whose, context=context, tokens=[*prefix], branch=len(prefix), seed=s) for s in seeds]


def answer(setup: Setup, groups: Sequence[list[Row]]) -> list[Row]:
    """Samples and grades the rows of all groups."""
    rows = list(chain.from_iterable(groups))
    sample(setup, rows, setup.temperature)
    for row in rows:
        grade = setup.task.verify(row.problem, setup.decode(row.tokens))
        row.reward, row.passed = grade.reward, grade.verdict == "pass"
    return rows


# ---- what is sampled ---------------------------------------------------------------------------
def grpo_rollout(setup: Setup, drawn: Sequence[tuple[Problem, int]]) -> tuple[list[Row], str]:
    """One group of fresh chains for each (problem, seed)."""
    return answer(setup, [attempts(setup, p, setup.group_size, seed, 0) for p, seed in drawn]), ""


def srpo_rollout(setup: Setup, drawn: Sequence[tuple[Problem, int]]) -> tuple[list[Row], str]:
    """Two groups for each (problem, seed): fresh chains, and continuations of one of them that failed.

    Without a failure there is nothing to reset, and the second group is fresh, too. The parent stays in the first
    group: without it that group would look better than the policy is.
    """
    half = setup.group_size // 2
    fresh = [attempts(setup, p, half, seed, 0) for p, seed in drawn]
    first = answer(setup, fresh)
    questions = [question_about(setup, group, seed) for group, (_, seed) in zip(fresh, drawn, strict=True)]
    # The model's own judgement of its chain: it decides where to go back to, and is never trained.
    sample(setup, [question for question in questions if question], temperature=0.3)
    second = answer(setup, [attempts(setup, p, half, s, 1, q) for (p, s), q in zip(drawn, questions, strict=True)])
    resets = [row for row in second if row.parent]
    return first + second, f"resets {len(resets)}, of which {sum(row.passed for row in resets)} pass  "


def question_about(setup: Setup, group: Sequence[Row], seed: int) -> Row | None:
    """The diagnosis that is wanted of one failed chain of a group, drawn uniformly; None when no chain failed."""
    failures = [row for row in group if not row.passed]
    if not failures:
        return None
    parent = rng_of(seed_of(seed, "pass", "parent")).choice(failures)
    steps = setup.task.split_steps(setup.decode(parent.tokens))
    context = setup.encode(setup.task.diagnosis(parent.problem, steps))
    return Row(problem=parent.problem, context=context, seed=seed_of(seed, 1, 0, 0, 0), parent=parent)


def prefix_of(setup: Setup, diagnosis: Row) -> list[int]:
    """The tokens of the failed chain before the step that its diagnosis names; none when it names none.

    The cut falls between tokens: text that is cut and tokenised again may come back as other tokens, which the
    policy never drew. Counting the characters of each token by itself is right for a tokenizer of characters.
    """
    assert diagnosis.parent is not None
    tokens = diagnosis.parent.tokens
    steps = setup.task.split_steps(setup.decode(tokens))
    step = parse_step(setup.decode(diagnosis.tokens), len(steps)) or 1
    behind = [0, *accumulate(len(setup.decode([token])) for token in tokens)]
    return tokens[: bisect_left(behind, sum(map(len, steps[: step - 1])))]


# ---- from rewards to a gradient ----------------------------------------------------------------
def give_credit(rows: Sequence[Row]) -> None:
    """Sets every advantage: (reward - mean) / (std + EPS) of its own group, with the population's deviation."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group in groups.values():
        mean = sum(row.reward for row in group) / len(group)
        std = math.sqrt(sum((row.reward - mean) ** 2 for row in group) / len(group))
        for row in group:
            row.advantage = (row.reward - mean) / (std + EPS)


def own_logprobs(model: PreTrainedModel, rows: Sequence[Row], temperature: float) -> list[Tensor]:
    """The log-probs of each row's own tokens [own], with gradient. A prefix is context: it is read, not scored."""
    seen = [row.context + row.tokens for row in rows]
    width = max(map(len, seen))
    # Padded on the right: causal attention never looks there, so no mask is needed.
    ids = torch.tensor([s + [0] * (width - len(s)) for s in seen], device=model.device)
    table = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1] / temperature, -1)
    chosen = table.gather(2, ids[:, 1:, None])[:, :, 0]  # [rows, width - 1]; column c is of token c + 1
    return [c[len(s) - row.own - 1 : len(s) - 1] for c, s, row in zip(chosen, seen, rows, strict=True)]


def clipped(logprobs: Tensor, advantage: float) -> Tensor:
    """PPO's clipped surrogate, a loss a token. With one update a batch the policy is still the one that it is
    compared with: the ratio is 1, the clip never acts, and the gradient is that of ``reinforce``."""
    ratio = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def reinforce(logprobs: Tensor, advantage: float) -> Tensor:
    return -advantage * logprobs


def token_mean(rows: Sequence[Row]) -> list[float]:
    """The weight of a token of each row when all tokens of the batch count the same."""
    return [1 / sum(row.own for row in rows)] * len(rows)


def sequence_mean(rows: Sequence[Row]) -> list[float]:
    """The weight of a token of each row when all rows count the same."""
    return [1 / (len(rows) * row.own) for row in rows]


METHODS = {"grpo": (grpo_rollout, clipped, token_mean), "srpo": (srpo_rollout, reinforce, sequence_mean)}


def backward(model: PreTrainedModel, rows: Sequence[Row], method: str, temperature: float = 1.0) -> float:
    """Adds the gradient of the batch's loss to the parameters' own, and returns the loss."""
    _, surrogate, aggregation = METHODS[method]
    # Weights are those of the whole batch, so micro-batches change nothing. Rows of advantage 0 are counted in
    # them; past this point they would only add zeros.
    live = [(row, weight) for row, weight in zip(rows, aggregation(rows), strict=True) if row.advantage]
    live.sort(key=lambda pair: len(pair[0].context) + len(pair[0].tokens))
    total = 0.0
    for start in range(0, len(live), MICRO_BATCH):
        part = live[start : start + MICRO_BATCH]
        scored = own_logprobs(model, [row for row, _ in part], temperature)
        losses = [w * surrogate(s, row.advantage).sum() for (row, w), s in zip(part, scored, strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total


# ---- the loop ----------------------------------------------------------------------------------
def one_step(setup: Setup, optimizer: Optimizer, problems: Sequence[Problem], step: int) -> tuple[list[Row], str]:
    """Samples, credit and one update; the rows, and a line about them."""
    began, seed = time.monotonic(), seed_of(setup.seed, "sample", step)
    rows, note = METHODS[setup.method][0](setup, [(p, seed_of(seed, p.uid, p.index)) for p in problems])
    give_credit(rows)
    setup.model.train()
    optimizer.zero_grad()
    loss = backward(setup.model, rows, setup.method, setup.temperature)
    norm = float(torch.nn.utils.clip_grad_norm_(setup.model.parameters(), CLIP_NORM))
    if not math.isfinite(loss + norm):
        raise SystemExit(f"step {step + 1}: the loss ({loss}) or the gradient's norm ({norm}) is not finite")
    optimizer.step()
    fresh = [row.passed for row in rows if row.group[1] == 0]  # a reset starts ahead, so it does not count here
    signal = len({row.group for row in rows if row.advantage}) / len({row.group for row in rows})
    line = f"pass {sum(fresh) / len(fresh):.3f}  groups with signal {signal:.2f}  loss {loss:+.4f}  gradient {norm:.3f}"
    return rows, f"{line}  {note}{time.monotonic() - began:.1f} s"


def evaluate(setup: Setup, problems: int, samples: int = 4) -> float:
    """The share of samples of held-out problems that pass."""
    seed, held_out = seed_of(setup.seed, "evaluate", "dev"), [setup.task.problem("dev", i) for i in range(problems)]
    rows = answer(setup, [attempts(setup, p, samples, seed_of(seed, p.uid, p.index), 0) for p in held_out])
    return sum(row.passed for row in rows) / len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GRPO and SRPO on the pico base, in one file.")
    parser.add_argument("--method", choices=list(METHODS), default="grpo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=16, help="problems a step")
    parser.add_argument("--group-size", type=int, default=8, help="samples a problem; srpo: half of them resets")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--eval-problems", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.steps, args.prompts, args.group_size, args.eval_problems) < 1 or args.group_size % 2:
        parser.error("numbers start at 1, and --group-size is even, so that srpo can halve it")
    pico, task = load_model("pico"), build_task("chain", {})
    sizes = {"method": args.method, "seed": args.seed, "group_size": args.group_size}
    setup = Setup(model=pico.model, tokenizer=pico.tokenizer, task=task, **sizes)
    optimizer = AdamW(setup.model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"held-out pass {evaluate(setup, args.eval_problems):.3f}", flush=True)
    for step in range(args.steps):
        problems = [task.problem("train", step * args.prompts + i) for i in range(args.prompts)]
        _, line = one_step(setup, optimizer, problems, step)
        print(f"step {step + 1}/{args.steps}  {line}", flush=True)
    print(f"held-out pass {evaluate(setup, args.eval_problems):.3f}", flush=True)


if __name__ == "__main__":
    main()

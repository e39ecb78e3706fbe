"""SRPO and RRPO: self-reset and random-reset policy optimisation (arXiv 2605.25507).

Fresh chains; one failure is the parent: it is entered again before its step k, and continuations are drawn from there.
RRPO: k uniform. SRPO: the policy names the first wrong step of its own chain. Fresh chains and continuations each have
their own baseline, ``A = (r - mean) / std``; ``L = -(1/B) sum_i A_i (1/|S_i|) sum_{t in S_i} log pi(y_t)``, S_i the
tokens behind the reset: the prefix gets no gradient. No ratio, clip, KL or entropy.

Published: 4 + 4 chains, T = 0.7, 4 updates a batch (release). Its top_p = 0.95 biases log-probs; it is left out.

Deviations from the release, in every preset:
1. Advantages and suffix mask reach the loss (there no caller passes them: what remains is plain likelihood).
2. Fresh chains are i.i.d., the parent is drawn among the failures and stays in its group (there sampling stops at the
   first failure, which is thrown away: with p = 0.5 the first group looks like 0.617).
3. Without any failure the second group is as many fresh chains with their own baseline (there: one group of all).
4. Any sizes; groups are known by id (there by the first 200 characters of the question).
"""

from __future__ import annotations

from typing import Literal

from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Clipped, Reinforce, sequence_mean
from mulligan.reset import Position, Reset, SelfDiagnosis, early_step, random_step
from mulligan.rollout import fresh

RUN = {"sampling.temperature": 0.7, "optimizer.updates_per_batch": 4}
Loss = Literal["reinforce", "clipped"]


def with_resets(name: str, at: Position, chains: int, resets: int, surrogate: Loss = "reinforce") -> Method:
    """Fresh chains, then continuations of a failed one from a position."""
    term = Term(surrogate=Reinforce() if surrogate == "reinforce" else Clipped(), aggregation=sequence_mean)
    return Method(name=name, passes=(fresh(chains), Reset(resets, at)), terms=(term,))


def srpo(
    chains: Count = 4, resets: Count = 4, surrogate: Loss = "reinforce", diagnosis_temperature: NotNegative = 0.3
) -> Method:
    """Resets of a failed chain to the step that the model itself blames.

    Args:
        chains: fresh samples a prompt.
        resets: continuations of one failure.
        surrogate: "clipped" is PPO's, as an ablation.
        diagnosis_temperature: of the model's own judgement.
    """
    return with_resets("srpo", SelfDiagnosis(diagnosis_temperature), chains, resets, surrogate)


def rrpo(chains: Count = 4, resets: Count = 4, surrogate: Loss = "reinforce") -> Method:
    """Resets of a failed chain to a random step. Settings as for srpo."""
    return with_resets("rrpo", random_step, chains, resets, surrogate)


def early_random(chains: Count = 4, resets: Count = 4, surrogate: Loss = "reinforce") -> Method:
    """RRPO over the first half of the steps: what of SRPO is earliness alone? Settings as for srpo."""
    return with_resets("early-random", early_step, chains, resets, surrogate)

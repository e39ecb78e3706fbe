"""Controls that tell a mechanism from luck: each is a method of the mission with one part put to sleep or swapped."""

from __future__ import annotations

from mulligan.context import prompt, shuffled
from mulligan.credit import ByVerdict, OneSign, ZScore
from mulligan.method import Count, Method, Term
from mulligan.methods.grpo import grpo
from mulligan.methods.lte import lte
from mulligan.methods.prerl import nsr_prerl
from mulligan.methods.srpo import with_resets
from mulligan.objective import AllLoops, Reinforce, sequence_mean
from mulligan.reset import SelfDiagnosis, entropy_step, oracle_step, remember_shares, restart
from mulligan.retry import Hinted
from mulligan.rollout import fresh
from mulligan.schedule import Schedule


def lte_other_answers(group_size: Count = 8) -> Method:
    """LTE whose hints name other problems' answers: does it matter whose mistakes they are?"""
    return lte(group_size).replace(
        name="lte-other-answers", passes=(fresh(group_size), Hinted(group_size, source="other"))
    )


def lte_silent_failures(group_size: Count = 8) -> Method:
    """LTE whose failures have advantage 0: does it learn from rescues alone?"""
    credit = OneSign(of=ZScore(), sign="positive", silent=True)
    return lte(group_size).replace(name="lte-silent-failures", credit=credit)


def dsrl_shuffled(steps: Count = 20) -> Schedule:
    """DSRL whose warm-up sees another question in place of none: is it P(y), or any wrong context?"""
    return Schedule(((steps, nsr_prerl().replace(name="nsr-shuffled", context=shuffled)), (None, grpo())))


def dsrl_conditional(steps: Count = 20) -> Schedule:
    """DSRL whose warm-up keeps the question, NSR in P(y|x): is dropping the question what helps?"""
    return Schedule(((steps, nsr_prerl().replace(name="nsr-conditional", context=prompt)), (None, grpo())))


def srpo_permuted(chains: Count = 4, resets: Count = 4) -> Method:
    """SRPO with another problem's diagnosis (of the step before): does it matter where exactly it resets?"""
    permuted = with_resets("srpo-permuted", SelfDiagnosis(permuted=True), chains, resets)
    return permuted.replace(remember=remember_shares)


def reset_entropy(chains: Count = 4, resets: Count = 4) -> Method:
    """Resets to the step at whose first token the policy is least sure."""
    return with_resets("reset-entropy", entropy_step, chains, resets)


def reset_restart(chains: Count = 4, resets: Count = 4) -> Method:
    """Resets to the very beginning: a second group of fresh chains, for prompts with a failure."""
    return with_resets("reset-restart", restart, chains, resets)


def reset_oracle(chains: Count = 4, resets: Count = 4) -> Method:
    """Resets to the first wrong step as the task's oracle knows it: what SRPO could reach at best."""
    return with_resets("reset-oracle", oracle_step, chains, resets)


def rltt_distillation(group_size: Count = 8) -> Method:
    """REINFORCE on the last loop, and what was sampled distilled into the earlier loops whatever its reward."""
    learn = Term(surrogate=Reinforce(), aggregation=sequence_mean)
    distil = Term(
        credit=ByVerdict(passed=1.0, failed=1.0),
        surrogate=Reinforce(),
        aggregation=sequence_mean,
        readout=AllLoops(skip_last=True),
    )
    return Method(name="rltt-distillation", passes=(fresh(group_size),), terms=(learn, distil))

"""Known defects of published releases, each as one change to the package that some test must notice.

Most were found in code that published experiments ran on, where none of them stopped a run or raised a warning. The
methods' own files (mulligan/methods/) list them among the deviations.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import CodeType

from tests.mutation.forked import ROOT, Outcome, attempt, module_of, preload

LIMIT = 120.0  # seconds for one defect's tests


@dataclass(frozen=True, slots=True)
class Defect:
    """One change: ``old``, which stands exactly once in the file, becomes ``new``.

    Args:
        source: whose defect it is, and what happens there.
        tests: ids of tests that pass, and of which at least one fails with the change.
    """

    name: str
    source: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def times(self) -> int:
        """How often the old text stands in the file: once, or the defect is stale."""
        return (ROOT / self.file).read_text().count(self.old)

    def changed(self) -> dict[str, CodeType]:
        """The module with the defect, by its name."""
        path = ROOT / self.file
        code = compile(path.read_text().replace(self.old, self.new), str(path), "exec", dont_inherit=True)
        return {module_of(path): code}


CONTRACT = "tests/test_contract.py::"
INVARIANCE = "tests/learner/test_invariance.py::"
ON_REFERENCE = "tests/learner/test_reference.py::"
SCORING = "tests/learner/test_scoring.py::"

DEFECTS = (
    Defect(
        name="mean-per-micro-batch",
        source="RLTT and DSRL: the token mean is taken within each micro-batch",
        file="mulligan/learner/update.py",
        old="token_weights = torch.tensor(weights, ",
        new="token_weights = torch.tensor(term.aggregation(rows, self.plan.max_new_tokens), ",
        tests=(f"{INVARIANCE}test_micro_batches_and_order_change_nothing[grpo]",),
    ),
    Defect(
        name="advantages-never-arrive-in-reinforce",
        source="SRPO: its advantages never reach its loss, which is the likelihood of all rollouts",
        file="mulligan/objective.py",
        old="return -view.advantages * view.policy_logprobs",
        new="return -view.policy_logprobs",
        tests=("tests/golden/test_losses.py::test_without_a_ratio", f"{CONTRACT}test_every_preset_passes[rloo]"),
    ),
    Defect(
        name="advantages-never-arrive-in-the-clip",
        source="SRPO: its advantages never reach its loss",
        file="mulligan/objective.py",
        old="return _clip(ratio, view.advantages, self.low, self.high, self.dual)",
        new="return _clip(ratio, torch.ones_like(ratio), self.low, self.high, self.dual)",
        tests=("tests/golden/test_losses.py::test_grpo", f"{CONTRACT}test_every_preset_passes[grpo]"),
    ),
    Defect(
        name="advantages-never-arrive-in-the-rows",
        source="SRPO: no caller passes its advantages on",
        file="mulligan/assign.py",
        old="row.advantages = torch.where(own, float(advantage), 0.0)",
        new="row.advantages = own.float()",
        tests=(f"{ON_REFERENCE}test_one_update_from_another_start[grpo-looped]",),
    ),
    Defect(
        name="suffix-mask-lost",
        source="SRPO: its suffix mask never reaches its loss, and the re-entered prefix is trained",
        file="mulligan/assign.py",
        old="own = torch.arange(length) >= branch",
        new="own = torch.ones(length, dtype=torch.bool)",
        tests=(
            f"{CONTRACT}test_a_mask_never_opens_the_prefix",
            "tests/test_extending.py::test_advantages_and_gradient",
        ),
    ),
    Defect(
        name="suffix-mask-lost-beside-a-mask-of-the-select",
        source="SRPO: its suffix mask never reaches its loss",
        file="mulligan/assign.py",
        old="row.mask = row.mask & own",
        new="pass",
        tests=(f"{CONTRACT}test_a_mask_never_opens_the_prefix",),
    ),
    Defect(
        name="groups-by-text",
        source="SRPO: groups are keyed by the first 200 characters of the question",
        file="mulligan/credit.py",
        old="groups.setdefault(row.group, [])",
        new="groups.setdefault(row.sample.request.problem.prompt[:200], [])",
        tests=("tests/golden/test_credit.py::test_zscore",),
    ),
    Defect(
        name="reference-is-the-policy",
        source="RLTT: no reference is registered, so that the KL compares the policy with itself",
        file="mulligan/learner/update.py",
        old='if stream.model in ("policy", "start"):',
        new='if stream.model in ("policy", "start", "reference"):',
        tests=(f"{SCORING}test_a_reference_is_the_frozen_model",),
    ),
    Defect(
        name="reference-moves-with-the-policy",
        source="RLTT: no reference is registered, so that the KL compares the policy with itself",
        file="mulligan/policy.py",
        old="copy.deepcopy(policy.model).requires_grad_(False)",
        new="policy.model",
        tests=("tests/test_session.py::test_the_reference_stays_where_the_policy_began",),
    ),
    Defect(
        name="19-updates-for-20",
        source="DSRL: `step < 20` with steps that count from 1",
        file="mulligan/schedule.py",
        old="if length is None or step < length:",
        new="if length is None or step + 1 < length:",
        tests=("tests/test_rollout.py::test_exactly_so_many_warm_up_steps",),
    ),
    Defect(
        name="missing-stream-replaced",
        source="DSRL: log-probs in P(y) that are missing switch the method off; SRPO: None is taken for a default",
        file="mulligan/learner/update.py",
        old="""raise ContractError(f"{owner}: '{stream.name}' is missing in the row of sample {row.sample.uid}")""",
        new="return torch.zeros(len(row.tokens))",
        tests=(f"{CONTRACT}test_the_learner_requires_every_declared_stream[missing]",),
    ),
    Defect(
        name="prompt-tokens-in-p-of-y",
        source="DSRL: what the update on P(y) conditions on is BOS alone",
        file="mulligan/context.py",
        old="""nothing = Context("nothing", lambda sample, texts: texts.nothing())""",
        new="""nothing = Context("nothing", lambda sample, texts: texts.prompt(sample.request.problem))""",
        tests=(f"{SCORING}test_rows_in_the_context_of_nothing_hold_no_prompt_token[looped]",),
    ),
    Defect(
        name="reward-trains-the-gate",
        source="RLTT: its exit weights are not detached, so that the reward trains the gate",
        file="mulligan/objective.py",
        old="view.exit_probabilities if self.train_gate else view.exit_probabilities.detach()",
        new="view.exit_probabilities",
        tests=("tests/golden/test_parts.py::test_loops_by_exit_probability",),
    ),
    Defect(
        name="first-group-biased",
        source="SRPO: the first failure is the parent and is thrown away: the fresh group looks better than it is",
        file="mulligan/reset.py",
        old="        prefix = chosen.tokens[: parent.begin(step)]",
        new="        prefix = chosen.tokens[: parent.begin(step)]\n        tree.samples.remove(chosen)",
        tests=("tests/test_reset.py::test_the_parent_stays_in_its_group",),
    ),
    Defect(
        name="hint-reaches-the-learner",
        source="LTE: the learner conditions on what the sampler saw, so that nothing is learned without the hint",
        file="mulligan/context.py",
        old="""prompt = Context("prompt", lambda sample, texts: texts.prompt(sample.request.problem))""",
        new="""prompt = Context("prompt", lambda sample, texts: sample.request.context)""",
        tests=("tests/golden/test_lte.py::test_the_hint_is_where_the_start_was_sampled_and_nowhere_else",),
    ),
    Defect(
        name="hinted-log-prob-after-the-hint-is-dropped",
        source="LTE: the ratio's lower half is taken without the hint, so that it is 1 for every rescue",
        file="mulligan/objective.py",
        old="""SAMPLED = Stream(model="start", context="sampling")""",
        new="""SAMPLED = Stream(model="start", context="prompt")""",
        tests=("tests/golden/test_lte.py::test_the_hint_is_where_the_start_was_sampled_and_nowhere_else",),
    ),
    Defect(
        name="every-failure-replaced",
        source="LTE: G' = G rescues leave a group that only passes, with advantage 0",
        file="mulligan/select.py",
        old="len(group) - 1 if self.most is None",
        new="len(group) if self.most is None",
        tests=("tests/golden/test_lte.py::test_as_many_rescues_as_failures",),
    ),
    Defect(
        name="switches-itself-off",
        source="DSRL: where P(y) cannot be scored, the method goes on without it; here: any token stands in for BOS",
        file="mulligan/models/loading.py",
        old="    if tokenizer.bos_token_id is None:\n        raise",
        new="    if tokenizer.bos_token_id is None:\n        return 0\n    if False:\n        raise",
        tests=("tests/golden/test_prerl.py::test_a_tokenizer_without_bos_is_refused",),
    ),
    Defect(
        name="std-with-n-1",
        source="presets that stem from verl: a sample's standard deviation where the paper has the population's",
        file="mulligan/credit.py",
        old="    ddof: int = 0\n    eps",
        new="    ddof: int = 1\n    eps",
        tests=("tests/golden/test_credit.py::test_zscore",),
    ),
    Defect(
        name="ratios-at-temperature-1",
        source="the GRPO family: log-probs at temperature 1 of what was drawn at another",
        file="mulligan/learner/update.py",
        old="(self.plan.temperature if temperature is None else temperature) or 1.0",
        new="1.0",
        tests=(f"{SCORING}test_the_samplers_logprobs_are_the_learners[0.7-looped]",),
    ),
)


def serve() -> None:
    """Answers each line of the input, a JSON array of a defect's name ("" is the package as it is) and tests, with
    one line: a JSON array of the exit status and the output."""
    preload()
    by_name = {defect.name: defect for defect in DEFECTS}
    for line in sys.stdin:
        name, tests = json.loads(line)
        outcome: Outcome = attempt(by_name[name].changed() if name else {}, tests, LIMIT)
        print(json.dumps([outcome.exit, outcome.output]), flush=True)


if __name__ == "__main__":
    serve()

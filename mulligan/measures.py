"""What a step's samples were like, as numbers; each mechanism's own where its samples are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mulligan.diagnosis import parse_step
from mulligan.errors import UserError
from mulligan.objective import SAMPLED, START
from mulligan.retry import BRANCHES, branch_of
from mulligan.texts import Texts
from mulligan.types import DIAGNOSIS, EXTRA, FRESH, HINTED, RESET, Forest, Metrics, Row, Sample, Tree

KNOWN = (FRESH, HINTED, EXTRA, RESET)


def rollout_metrics(forest: Forest, rows: Sequence[Row] = ()) -> Metrics:
    """Of all graded samples; those of a method's own origins count where they are trained, so that probes do not.
    ``entropy`` is estimated from the drawn tokens, in nats a token; ``signal`` is the share of groups whose rewards
    differ."""
    trained = {row.sample.uid for row in rows}
    samples = [s for s in forest.samples if (s.passed or s.failed) and (s.origin in KNOWN or s.uid in trained)]
    if not samples:
        raise UserError(f"step {forest.step + 1}: the verifier could score none of {len(forest.samples)} responses")
    own = [len(s.behavior_logprobs) for s in samples]
    passes = [p for t in forest.trees if (p := [s.passed for s in t.of(FRESH) if s.passed or s.failed])]
    groups: dict[int, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.grade.reward)
    judged = [s.grade.process_correct for s in samples if s.grade.process_correct is not None]
    out = {
        "rollout/reward": _mean(s.grade.reward for s in samples),
        "rollout/pass": _mean(s.passed for s in samples),
        "rollout/none_pass": _mean(not any(p) for p in passes),
        "rollout/some_pass": _mean(any(p) and not all(p) for p in passes),
        "rollout/all_pass": _mean(all(p) for p in passes),
        "rollout/signal": _mean(len(set(g)) > 1 for g in groups.values()),
        "rollout/length": _mean(own),
        "rollout/truncated": _mean(s.truncated for s in samples),
        "rollout/entropy": -sum(sum(s.behavior_logprobs) for s in samples) / max(sum(own), 1),
        "rollout/samples": float(len(forest.samples)),
        "rollout/unscorable": float(sum(s.grade.verdict == "unscorable" for s in forest.samples)),
        "rollout/filtered": float(len(forest.filtered)),
    }
    if judged:
        out["rollout/process_correct"] = _mean(judged)
    return out | _by_part(samples)


def _by_part(samples: Sequence[Sample]) -> Metrics:
    """Reward, passes and length of a mixture's parts, under ``rollout/<part>/``; nothing for any other task."""
    parts: dict[str, list[Sample]] = {}
    for sample in samples:
        _, mixed, part = sample.request.problem.task.partition("/")
        if mixed:
            parts.setdefault(part, []).append(sample)
    out: Metrics = {}
    for part, mine in sorted(parts.items()):
        out[f"rollout/{part}/reward"] = _mean(s.grade.reward for s in mine)
        out[f"rollout/{part}/pass"] = _mean(s.passed for s in mine)
        out[f"rollout/{part}/length"] = _mean(len(s.behavior_logprobs) for s in mine)
    return out


def mechanism_metrics(forest: Forest, rows: Sequence[Row], texts: Texts) -> Metrics:
    """Of second rounds (``retry/``), resets (``reset/``) and diagnoses (``diagnosis/``), where there are any."""
    return _retries(forest, rows) | _resets(forest, texts)


def _retries(forest: Forest, rows: Sequence[Row]) -> Metrics:
    """``share``: prompts with a second round; ``rescued``: of those, the share that it solves, for each of LTE's
    branches too; ``trained``: its samples that got a place. ``ratio`` is the mean of pi(o|x) / pi(o|x, hint) by token,
    ``hint_reliance`` the mean of log pi(y|x) - log pi(y|x, hint) by token: the lower, the more the hint did."""
    again = [t for t in forest.trees if t.of(HINTED, EXTRA)]
    if not again:
        return {}
    drawn = [s for t in again for s in t.of(HINTED, EXTRA)]
    out = {
        "retry/share": len(again) / len(forest.trees),
        "retry/rescued": _mean(_rescued(t) for t in again),
        "retry/pass": _mean(s.passed for s in drawn),
        "retry/mentions_hint": _mean(s.grade.mentions_hint for s in drawn),
        "retry/trained": float(sum(row.sample.origin in (HINTED, EXTRA) for row in rows)),
    }
    for branch in BRANCHES:
        mine = [t for t in again if branch_of([s for s in t.of(FRESH) if s.failed]) == branch]
        if mine:
            out[f"retry/rescued_{branch}_truncated"] = _mean(_rescued(t) for t in mine)
    gaps = [
        (row.streams[START.name] - row.streams[SAMPLED.name])[row.mask]
        for row in rows
        if row.sample.origin == HINTED and {START.name, SAMPLED.name} <= row.streams.keys()
    ]
    if gaps:
        out["retry/ratio"] = _mean(float(gap.exp().mean()) for gap in gaps)
        out["retry/hint_reliance"] = _mean(float(gap.mean()) for gap in gaps)
    return out


def _rescued(tree: Tree) -> bool:
    return any(s.passed for s in tree.of(HINTED, EXTRA))


def _resets(forest: Forest, texts: Texts) -> Metrics:
    """``position``: steps kept as a share of the parent's, by reset; ``to_first``: resets to the very beginning;
    ``pass_early`` and ``pass_late``: passes after resets to the first or second half of the chain; ``agreement``:
    resets to exactly the first wrong step, where a task knows it; ``parse_failures``: diagnoses that named no step."""
    again = [t for t in forest.trees if t.of(RESET)]
    if not again:
        return {}
    shares, first, early, late, right = [], [], [], [], []
    for tree in again:
        by_uid = {s.uid: s for s in tree.samples}
        for group in tree.groups().values():
            if group[0].origin != RESET:
                continue
            parent = by_uid[group[0].request.parent or 0]
            ends = texts.of(tree.problem).step_ends(parent.tokens)
            kept = sum(end <= group[0].branch for end in ends)
            shares.append(kept / max(len(ends), 1))
            first.append(kept == 0)
            (early if 2 * kept < len(ends) else late).extend(s.passed for s in group)
            if parent.grade.first_wrong_step is not None:
                right.append(kept + 1 == parent.grade.first_wrong_step)
    out = {
        "reset/share": len(again) / len(forest.trees),
        "reset/position": _mean(shares),
        "reset/to_first": _mean(first),
    }
    named = {"reset/pass_early": early, "reset/pass_late": late, "reset/agreement": right}
    out |= {name: _mean(values) for name, values in named.items() if values}
    said = [(s, _parent(tree, s)) for tree in forest.trees for s in tree.of(DIAGNOSIS)]
    if said:
        out["diagnosis/parse_failures"] = _mean(parse_step(s.text, p.grade.steps) is None for s, p in said)
        out["diagnosis/tokens"] = _mean(len(s.behavior_logprobs) for s, _ in said)
    return out


def _parent(tree: Tree, sample: Sample) -> Sample:
    return next(s for s in tree.samples if s.uid == sample.request.parent)


def _mean(values: Iterable[float]) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed) if listed else 0.0

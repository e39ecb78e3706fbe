"""The methods by name. Each is a function from its own settings to a composition of parts."""

from __future__ import annotations

from collections.abc import Collection

from mulligan.methods import controls, dapo, dsrl, grpo, lte, nsr, prerl, reinforce_pp, rltt, srpo
from mulligan.methods.cispo import cispo
from mulligan.methods.dr_grpo import dr_grpo
from mulligan.methods.expression import Built, build
from mulligan.methods.gspo import gspo
from mulligan.methods.maxrl import maxrl
from mulligan.methods.preset import Preset, with_published
from mulligan.methods.reinforce import reinforce
from mulligan.methods.rloo import rloo

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *with_published("grpo", grpo.grpo, grpo.PUBLISHED),
        *with_published("dr-grpo", dr_grpo),
        *with_published("dapo", dapo.dapo, dapo.PUBLISHED, dapo.RUN),
        *with_published("gspo", gspo, run={"optimizer.updates_per_batch": 4}),
        *with_published("cispo", cispo),
        *with_published("rloo", rloo),
        *with_published("reinforce", reinforce),
        *with_published("reinforce++", reinforce_pp.reinforce_pp, reinforce_pp.PUBLISHED),
        *with_published("maxrl", maxrl),
        *with_published("nsr", nsr.nsr, nsr.PUBLISHED, nsr.RUN),
        *with_published("psr", nsr.psr, nsr.PUBLISHED, nsr.RUN),
        *with_published("w-reinforce", nsr.w_reinforce, nsr.PUBLISHED, nsr.RUN),
        *with_published("prerl", prerl.prerl, prerl.PUBLISHED, dsrl.RUN),
        *with_published("psr-prerl", prerl.psr_prerl, {"weight": prerl.PUBLISHED["weight"]}, dsrl.RUN),
        *with_published("nsr-prerl", prerl.nsr_prerl, prerl.PUBLISHED, dsrl.RUN),
        *with_published("dsrl", dsrl.dsrl, dsrl.PUBLISHED, dsrl.RUN),
        *with_published("lte", lte.lte, lte.PUBLISHED, lte.RUN),
        *with_published("lte-dagger", lte.lte_dagger, run=lte.RUN),
        *with_published("grpo-extra", lte.grpo_extra, lte.PUBLISHED, lte.RUN),
        *with_published("rrpo", srpo.rrpo, run=srpo.RUN),
        *with_published("srpo", srpo.srpo, run=srpo.RUN),
        *with_published("early-random", srpo.early_random, run=srpo.RUN),
        *with_published("rltt", rltt.rltt, rltt.PUBLISHED, rltt.RUN),
        Preset("reset-entropy", controls.reset_entropy),
        Preset("reset-restart", controls.reset_restart),
        Preset("reset-oracle", controls.reset_oracle),
        Preset("srpo-permuted", controls.srpo_permuted),
        Preset("lte-other-answers", controls.lte_other_answers),
        Preset("lte-silent-failures", controls.lte_silent_failures),
        Preset("dsrl-shuffled", controls.dsrl_shuffled),
        Preset("dsrl-conditional", controls.dsrl_conditional),
        Preset("rltt-distillation", controls.rltt_distillation),
    )
}


def build_schedule(text: str, settings: dict | None = None, named: Collection[str] = ()) -> Built:
    """What ``method.name`` and its settings say, built: ``"lte"``, ``"srpo+rltt"``, ``"dsrl(lte, steps=20)"``,
    ``"./mine.py:my_method"``.

    Args:
        named: settings of the run that the user gives, so that no preset brings its own.

    Raises:
        UserError: an unknown name or setting, a wrong type, parts that clash; names the nearest valid one.
    """
    return build(text, settings or {}, PRESETS, named)

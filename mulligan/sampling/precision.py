"""Sampling with bfloat16 weights from a float32 policy, and finding out whether that is faster here.

The learner's float32 weights stay the only ones that are trained, evaluated and saved. The sampler decodes a bfloat16
copy of them, rounded anew before it draws. What it says of a token (``behavior_``) is then not quite what the learner
says (``start_``). Ratios are between the learner's own numbers, and the difference is logged (``mismatch/``).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mulligan.models.compiled import is_compiled, warm_up
from mulligan.sampling import OnDone
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.seeds import seed_of
from mulligan.types import Problem, Request, Tokens

PAYS = 1.15  # times faster bfloat16 has to be, since its log-probs are further from the learner's
TRIAL_TOKENS = 2048  # sampled in each trial, about
_SAMPLES = 8  # of each prompt in a trial


class RoundedSampler(EmbeddedSampler):
    """An :class:`EmbeddedSampler` of a bfloat16 copy of a policy; each run draws with the policy's weights of then.

    Parameters alone are rounded. Buffers (rotary tables) stay as the model made them, as in a checkpoint that is loaded
    in bfloat16, and tied parameters stay tied. The matrices of an adapter are rounded by themselves and not added to
    the base first, where an update below 1/256 of a weight would be lost.

    Args:
        policy: float32; it is never touched.
        settings: as for :class:`EmbeddedSampler`.
    """

    def __init__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        # Rounded before the model is copied, so that there is never a second one in float32.
        rounded: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in policy.parameters()
        }
        self._trained = [(rounded[id(p)], p) for p in policy.parameters() if p.requires_grad]
        model = copy.deepcopy(policy, rounded).eval()
        if is_compiled(model) and model.device.type != "cpu":  # where decoding is compiled
            warm_up(model)  # before anything else goes through it
        super().__init__(model, tokenizer, **settings)

    def run(self, requests: Sequence[Request], on_done: OnDone) -> None:
        """As :meth:`EmbeddedSampler.run`."""
        # Here and not behind the learner's step, so that weights that were loaded, put back or changed in any other way
        # are seen too. It is one pass over the weights, of which a step makes thousands.
        with torch.no_grad():
            for ours, source in self._trained:
                ours.copy_(source)
        super().run(requests, on_done)


def speedup(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Problem, Tokens]],
    settings: Mapping[str, Any],
    *,
    tokens: int = TRIAL_TOKENS,
    pairs: int = 5,
) -> float:
    """How many times faster a float32 policy is sampled in bfloat16: the median over interleaved pairs of trials.

    Args:
        prompts: what a step begins with. Each is sampled 8 times, in as many places as ``settings`` has.
        settings: the run's, for :class:`EmbeddedSampler`; stop strings are left out.
        tokens: sampled in each trial; at least two a row.
    """
    rows = min(settings["max_rows"], _SAMPLES * len(prompts))
    new = max(2, min(settings["max_new_tokens"], tokens // rows))
    requests = []
    for group, (problem, context) in enumerate(prompts[: -(-rows // _SAMPLES)]):
        n = min(_SAMPLES, rows - _SAMPLES * group)
        seeds = tuple(seed_of("speedup", group, attempt) for attempt in range(n))
        requests.append(Request(problem=problem, group=group, n=n, context=context, seeds=seeds, max_new_tokens=new))
    samplers = [kind(policy, tokenizer, **{**settings, "stop": ()}) for kind in (EmbeddedSampler, RoundedSampler)]

    def seconds(sampler: EmbeddedSampler) -> float:
        sampler._eos = sampler._eos[:0]  # no response ends early, so both do the same work
        begun = time.perf_counter()
        sampler.run(requests, lambda *_: ())  # its results are lists, so the device has done its work
        return time.perf_counter() - begun

    times = [(seconds(samplers[0]), seconds(samplers[1])) for _ in range(pairs + 1)]
    return statistics.median(own / rounded for own, rounded in times[1:])  # the first pair warms up

"""What has to be computed of new prompts: what each begins with alike, among themselves or with what is there, once.

Hinted retries, continuations behind a reset and questions behind one long instruction share beginnings. A prompt goes
on from the stored one that it has most in common with, and where new prompts begin alike their stem comes first.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mulligan.sampling.cache import GrowingCache, GrowingSlot
from mulligan.types import Tokens

_TOKENS = 16_384  # padded tokens in one prefill; a longer prompt goes alone
_SHARED = 16  # tokens that two prompts have in common at least to be worth copying
_SAVED = 256  # tokens that a stem saves at least, since it costs a forward pass of its own


@dataclass(frozen=True, slots=True)
class Part:
    """A prompt whose first tokens are there already."""

    prompt: Tokens
    source: int = 0  # the stored prompt that it begins like
    common: int = 0  # for so many tokens; at least one is left to be computed

    @property
    def rest(self) -> Tokens:
        """The tokens to be computed."""
        return self.prompt[self.common :]


def common_length(a: Tokens, b: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def continued(prompts: Sequence[Tokens], stored: Sequence[Tokens]) -> list[Part]:
    """Each prompt with the stored one that it has most in common with."""
    order = sorted(range(len(stored)), key=lambda i: stored[i])
    known = [stored[i] for i in order]
    parts = []
    for prompt in prompts:
        at = bisect(known, prompt)
        # Whatever has most in common with it stands beside it in the order of a dictionary.
        best = max(
            (Part(prompt, order[i], common_length(prompt[:-1], known[i])) for i in (at - 1, at) if 0 <= i < len(known)),
            key=lambda part: part.common,
            default=Part(prompt),
        )
        parts.append(best if best.common >= _SHARED else Part(prompt))
    return parts


def stems(prompts: Sequence[Tokens]) -> list[Tokens]:
    """What runs of prompts begin with alike, where computing it first saves tokens enough."""
    found: list[Tokens] = []
    run: list[Tokens] = []
    shared = 0
    for prompt in [*sorted(prompts), ()]:
        common = common_length(run[-1], prompt) if run else 0
        if run and common < _SHARED:
            if len(run) > 1 and (len(run) - 1) * shared >= _SAVED:
                found.append(run[0][:shared])
            run = []
        shared = min(shared, common) if len(run) > 1 else common
        run.append(prompt)
    return found


def groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts to compute together: within the budget, and nothing padded to over twice itself."""
    group: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.common > 0, len(part.rest), part.common)):
        if group and (
            (group[0].common > 0) != (part.common > 0)
            or (len(group) + 1) * max(len(part.prompt), *(len(each.prompt) for each in group)) > _TOKENS
            or len(part.rest) > 2 * len(group[0].rest)
        ):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


@dataclass(slots=True)
class Block:
    """One forward pass: what a group's prompts begin with in a cache, and the rest of each padded on the left."""

    cache: GrowingCache
    ids: torch.Tensor  # int64 [prompts, longest rest]; any id is padding, since the mask hides it
    positions: torch.Tensor  # int64, likewise
    mask: torch.Tensor | None  # int64 [prompts, columns of the cache and ids]; None: nothing is padded
    packed: torch.Tensor | None  # int64 [prompts, longest prompt]: the columns of each prompt; None: as they are

    @classmethod
    def of(cls, group: Sequence[Part], stored: Sequence[Tokens], cache: GrowingCache, device: torch.device) -> Block:
        """Takes what is shared out of the stored prompts' cache."""

        def column(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor(numbers, device=device)[:, None]

        common, rest = column([part.common for part in group]), column([len(part.rest) for part in group])
        before, new, length = int(common.max()), int(rest.max()), int((common + rest).max())
        index = torch.arange(before + new, device=device)
        past = GrowingCache(room=new)
        if before:
            begin = column([cache.get_seq_length() - len(stored[part.source]) for part in group])
            source = column([part.source for part in group])
            past = gathered(cache, source, (begin + index[:before] - (before - common)).clamp(min=0), room=new)
        ids = [[0] * (new - len(part.rest)) + list(part.rest) for part in group]
        seen = ((index < before) & (index >= before - common)) | (index >= before + new - rest)
        token = torch.arange(length, device=device) - (length - common - rest)  # of each prompt, padded on the left
        packed = torch.where(token < common, before - common + token, before + new - rest - common + token)
        tidy = bool((seen.all(1) | (common.squeeze(1) == 0)).all())
        return cls(
            cache=past,
            ids=torch.tensor(ids, device=device),
            positions=(common + index[:new] - (new - rest)).clamp(min=0),
            mask=None if bool(seen.all()) else seen.long(),
            packed=None if tidy else packed.clamp(min=0),
        )

    def result(self) -> GrowingCache:
        """After the forward pass: the cache of the whole prompts, padded on the left alone."""
        if self.packed is None:
            return self.cache
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        return gathered(self.cache, rows, self.packed, room=0)


def gathered(cache: GrowingCache, rows: torch.Tensor, columns: torch.Tensor, room: int) -> GrowingCache:
    """A cache of chosen columns (int64 [n, length]) of chosen rows (int64 [n, 1])."""
    out = GrowingCache(room)
    for index, slot in enumerate(cache.layers):
        assert isinstance(slot, GrowingSlot)
        keys, values = (x.transpose(1, 2)[rows, columns].transpose(1, 2) for x in slot.states())
        out.update(keys, values, index)
    return out

"""Prompts that the sampler has computed: each once, for as long as a row goes on from it or a sample waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mulligan.sampling.batch import Next
from mulligan.sampling.cache import GrowingCache
from mulligan.types import Tokens


class Prompts:
    """Distinct prompts, with their keys and values and what their first tokens are drawn from; row i is prompt i."""

    def __init__(self) -> None:
        self.tokens: list[Tokens] = []
        self.cache = GrowingCache(room=0)
        self.after: Next | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def places(self) -> dict[Tokens, int]:
        """Which prompt is where."""
        return {prompt: i for i, prompt in enumerate(self.tokens)}

    def pads(self, device: torch.device) -> torch.Tensor:
        """int64 [prompts]: columns of the cache before each prompt."""
        width = self.cache.get_seq_length()
        return torch.tensor([width - len(prompt) for prompt in self.tokens], device=device)

    def add(self, tokens: Sequence[Tokens], cache: GrowingCache, after: Next) -> None:
        """Takes in prompts that are computed, none of them here already."""
        if self.after is None:
            self.cache, self.after = cache, after
        else:
            self.cache.admit([(cache, torch.arange(len(tokens), device=after.loop.device))])
            self.after = Next.join([self.after, after])
        self.tokens += tokens

    def keep(self, needed: Iterable[Tokens]) -> torch.Tensor:
        """Forgets the others; int64 [prompts there were]: where each is now, -1 for those that are gone."""
        needed = set(needed)
        index = [i for i, prompt in enumerate(self.tokens) if prompt in needed]
        if len(index) == len(self.tokens):
            return torch.arange(len(index))
        moved = torch.full((len(self.tokens),), -1)
        moved[index] = torch.arange(len(index))
        self.tokens = [self.tokens[i] for i in index]
        if not index:
            self.cache, self.after = GrowingCache(room=0), None
            return moved
        assert self.after is not None
        self.after = self.after.rows(torch.tensor(index, device=self.after.loop.device))
        self.cache.keep(torch.tensor(index, device=self.after.loop.device))
        self.cache.drop(self.cache.get_seq_length() - max(map(len, self.tokens)))
        return moved

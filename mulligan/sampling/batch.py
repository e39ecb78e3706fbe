"""What the embedded sampler decodes together: the requests that wait, and the rows that are in the batch."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn import functional

from mulligan.sampling.stops import StopFinder
from mulligan.types import Completion, Request, Tokens


@dataclass(slots=True, eq=False)
class Order:
    """A request with the run's settings filled in, and its completions so far."""

    request: Request
    prompt: Tokens  # context, then prefix
    limit: int  # own tokens at most, at least 1
    temperature: float
    finder: StopFinder | None
    completions: list[Completion | None] = field(default_factory=list)
    taken: int = 0  # samples that are in the batch or done
    missing: int = 0  # samples that are not done


Draw = tuple[Order, int]  # one sample: its order and the attempt


class Queue:
    """Orders whose samples wait for a place, first come, first served."""

    def __init__(self) -> None:
        self._orders: deque[Order] = deque()
        self.waiting = 0  # samples

    def add(self, order: Order) -> None:
        self._orders.append(order)
        self.waiting += order.missing

    def take(self, most: int) -> list[Draw]:
        """The next samples, at most so many; an order may be taken in parts."""
        draws: list[Draw] = []
        while self._orders and len(draws) < most:
            order = self._orders[0]
            end = min(order.request.n, order.taken + most - len(draws))
            draws += [(order, attempt) for attempt in range(order.taken, end)]
            order.taken = end
            if end == order.request.n:
                self._orders.popleft()
        self.waiting -= len(draws)
        return draws

    def begun(self) -> Tokens | None:
        """The prompt of the order that has been taken in part; there is one at most."""
        return self._orders[0].prompt if self._orders and self._orders[0].taken else None


@dataclass(slots=True, eq=False)
class Next:
    """What the next token of each row is drawn from."""

    logits: Tensor  # float32 [rows, vocabulary]
    loop: Tensor  # int64 [rows]: the loop the logits are read out of, 0 without adaptive exit

    def rows(self, index: Tensor) -> Next:
        """Row j of the result is row ``index[j]``."""
        return Next(self.logits.index_select(0, index), self.loop.index_select(0, index))

    @staticmethod
    def join(parts: list[Next]) -> Next:
        """All rows, one part after the other."""
        return Next(torch.cat([p.logits for p in parts]), torch.cat([p.loop for p in parts]))


@dataclass(slots=True, eq=False)
class Rows:
    """The rows in the batch; every tensor's first dimension is the row."""

    draws: list[Draw]
    seed: Tensor  # int64
    start: Tensor  # int64: index in the response of the first own token
    count: Tensor  # int64: own tokens so far
    position: Tensor  # int64: of the token to be fed next
    prompt: Tensor  # int64: which of the prompts that are kept apart; 0 where none are
    apart: Tensor  # int64: tokens of that prompt, which are no columns of the row
    pad: Tensor  # int64: columns of the cache before the row's first one
    limit: Tensor  # int64: own tokens at most
    temperature: Tensor  # float32; 0 is greedy
    finished: Tensor  # bool; whatever else such a row holds is meaningless
    loops: Tensor  # int64: sum of the loops that the own tokens were read out of
    tokens: Tensor  # int64 [rows, steps], the first ``count`` are drawn
    logprobs: Tensor  # float32 [rows, steps]; as for tokens
    gone: int = 0  # finished rows
    unused: int = 0  # first columns that are padding of all rows
    padded: bool = False  # some row has padding; without a mask attention is faster
    finders: list[tuple[StopFinder, Tensor]] = field(default_factory=list)  # of stop strings: bool [rows], whose

    @classmethod
    def new(cls, draws: list[Draw], width: int, prompt: Tensor | None, device: torch.device) -> Rows:
        """Rows of which nothing is drawn yet.

        Args:
            width: columns of the cache; each row's prompt is in the last ones, unless prompts are kept apart.
            prompt: where they are: which one it is of each row.
        """

        def column(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        lengths = column([len(order.prompt) for order, _ in draws])
        none, steps = torch.zeros_like(lengths), max(order.limit for order, _ in draws)
        rows = cls(
            draws=draws,
            seed=column([order.request.seeds[attempt] for order, attempt in draws]),
            start=column([len(order.request.prefix) for order, _ in draws]),
            count=none,
            position=lengths,
            prompt=none if prompt is None else prompt,
            apart=none if prompt is None else lengths,
            pad=none,
            limit=column([order.limit for order, _ in draws]),
            temperature=torch.tensor([order.temperature for order, _ in draws], device=device),
            finished=torch.zeros_like(none, dtype=torch.bool),
            loops=none.clone(),
            tokens=none.new_zeros(len(draws), steps),
            logprobs=torch.zeros(len(draws), steps, device=device),
        )
        rows.settle(width)
        return rows

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def live(self) -> int:
        """Rows that have not finished."""
        return len(self.draws) - self.gone

    def keep(self, index: Tensor) -> None:
        """Row j becomes row ``index[j]``, none of them finished."""
        self.draws = [self.draws[i] for i in index.tolist()]
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).index_select(0, index))
        self._note()

    def drop(self) -> int:
        """Takes the columns off that are padding of all rows, and says how many the cache has to drop."""
        columns = self.unused
        if columns:
            self.pad = self.pad - columns
            self._note()
        return columns

    def add(self, others: Rows, width: int) -> None:
        """Puts other rows below these, all of them new, in a cache of ``width`` columns."""
        steps = max(self.tokens.shape[1], others.tokens.shape[1])
        self.draws = self.draws + others.draws
        for name in _TENSORS:
            parts = [getattr(rows, name) for rows in (self, others)]
            if parts[0].dim() == 2:
                parts = [functional.pad(part, (0, steps - part.shape[1])) for part in parts]
            setattr(self, name, torch.cat(parts))
        self.settle(width)

    def settle(self, width: int) -> None:
        """The rows end at the last of ``width`` columns."""
        self.pad = width - (self.position - self.apart)
        self._note()

    def _note(self) -> None:
        self.gone = 0
        self.unused, most = torch.stack(self.pad.aminmax()).tolist()
        self.padded = most > 0
        own = [order.finder for order, _ in self.draws]
        self.finders = [
            (finder, torch.tensor([each is finder for each in own], device=self.pad.device))
            for finder in dict.fromkeys(own)
            if finder is not None
        ]

    def mask(self, width: int) -> Tensor | None:
        """int64 [rows, width]: 0 at the padding; None where no row has any."""
        if not self.padded:
            return None
        return (torch.arange(width, device=self.pad.device) >= self.pad[:, None]).long()

    def write(self, token: Tensor, logprob: Tensor, loop: Tensor) -> None:
        """Takes in one token [rows] each, with its log-prob and the loop it was read out of."""
        # A row that waits to be packed away has nothing to lose, so it may write over its last token.
        column = self.count.clamp(max=self.tokens.shape[1] - 1)[:, None]
        self.tokens.scatter_(1, column, token[:, None])
        self.logprobs.scatter_(1, column, logprob[:, None])
        self.loops = self.loops + loop
        self.count = self.count + 1

    def at_stop(self, token: Tensor) -> Tensor:
        """bool [rows]: whether the token just written completes one of the row's stop strings."""
        found = torch.zeros_like(self.finished)
        for finder, mine in self.finders:
            for row in (mine & finder.may_end(token)).nonzero().squeeze(1).tolist():
                end = int(self.count[row])
                found[row] = finder.ends(self.tokens[row, max(0, end - finder.window) : end].tolist())
        return found


_TENSORS = tuple(f.name for f in fields(Rows) if f.name not in ("draws", "gone", "unused", "padded", "finders"))

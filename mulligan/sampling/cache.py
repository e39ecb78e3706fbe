"""A key-value cache for sampling: written in place, forked from shared contexts, packed as rows finish.

transformers' own ``DynamicCache`` concatenates a whole new cache for every token, which is most of the time
of a small model. Here each slot owns a buffer ``[rows, heads, capacity, head_dim]`` and a token costs one
column. A slot is what a model calls ``layer_idx``; a looped model uses one for each loop of each layer, so
slots appear on their first update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from mulligan.native.decode import Columns


class GrowingSlot(CacheLayerMixin):
    """The keys and values of one attention application.

    Args:
        room: columns to allocate beyond those in use, at the start and at least at every growth.
    """

    is_sliding = False

    def __init__(self, room: int = 64):
        super().__init__()
        self.room = room
        self.rows = 0
        self.begin = self.end = 0  # the columns in use
        self.prompts: GrowingSlot | None = None  # what the rows go on from, where it is kept apart
        self._buffers: list[torch.Tensor] = []  # of keys and of values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates for states ``[rows, heads, new, head_dim]``, and ``room`` more columns."""
        self.rows = key_states.shape[0]
        self._allocate((key_states, value_states), self.rows, key_states.shape[2] + self.room)

    def _allocate(self, like: Iterable[torch.Tensor], rows: int, capacity: int) -> None:
        self._buffers = [each.new_empty(rows, each.shape[1], capacity, each.shape[3]) for each in like]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[rows, heads, new, head_dim]`` states; returns views ``[rows, heads, length, head_dim]`` of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self._extend(new)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, self.end - new : self.end] = states
        return self._show()

    def extend(self) -> Columns:
        """The columns with one more, for the caller to fill."""
        self._extend(1)
        return self.columns()

    def columns(self) -> Columns:
        """Where the keys and values are."""
        keys, values = self._buffers
        return Columns(keys, values, self.begin, self.end)

    def _extend(self, new: int) -> None:
        if self.end + new > self._buffers[0].shape[2]:
            self._move_house(self._row_capacity(), self.end - self.begin, new)
        self.end += new

    def admit(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds rows below those there are.

        Args:
            parts: keys and values ``[rows, heads, length, head_dim]``; each part ends at the last column in use and is
                padded on the left with zeros, and so are the rows that are there when a part is longer.
        """
        # Zero and not garbage, because a masked column still takes part in the weighted sum, with weight 0,
        # and 0 times NaN is NaN.
        first, rows = self.rows, self.rows + sum(len(keys) for keys, _ in parts)
        width = max(self.end - self.begin, *(keys.shape[2] for keys, _ in parts))
        if not self.is_initialized:
            self._allocate(parts[0], rows, width + self.room)
            self.begin = self.end = width
        elif rows > self._buffers[0].shape[0] or width > self.end:
            self._move_house(max(rows, self._row_capacity()), width, 0)
        start = self.end - width
        for buffer in self._buffers:
            buffer[:first, :, start : self.begin] = 0
        for keys, values in parts:
            there, column = slice(first, first + len(keys)), self.end - keys.shape[2]
            for buffer, states in zip(self._buffers, (keys, values), strict=True):
                buffer[there, :, start:column] = 0
                buffer[there, :, column : self.end] = states
            first = there.stop
        self.begin, self.rows = start, rows
        self._show()

    def move(self, sources: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
        """Copies rows ``sources`` over rows ``targets`` (both int64 [moved]) and keeps the first ``rows``."""
        if len(targets):
            for buffer in self._buffers:
                buffer[targets, :, self.begin : self.end] = buffer[sources, :, self.begin : self.end]
        self.rows = rows
        self._show()

    def drop(self, columns: int) -> None:
        """Forgets so many of the first columns; their memory is used again at the next growth."""
        self.begin += columns
        self._show()

    def _row_capacity(self) -> int:
        # Memory of rows that left is given back once it is most of what there is; until then rows may still join.
        there = self._buffers[0].shape[0]
        return there if 2 * self.rows > there else self.rows

    def _move_house(self, rows: int, width: int, new: int) -> None:
        """New buffers, where the columns in use end at ``width`` and ``new`` more are sure to fit."""
        # By half of what is there, so that copying costs a constant per token.
        old, begin = self._buffers, width - (self.end - self.begin)
        self._allocate(old, rows, width + new + max(self.room, width // 2))
        for buffer, before in zip(self._buffers, old, strict=True):
            buffer[: self.rows, :, begin:width] = before[: self.rows, :, self.begin : self.end]
        self.begin, self.end = begin, width

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.states()
        if self.prompts is not None:
            # This is how they get to the attention through the code of a model that knows nothing of them.
            keys.prompts = (self.prompts.keys, self.prompts.values)  # pyright: ignore[reportAttributeAccessIssue]
        self.keys, self.values = keys, values
        return keys, values

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[rows, heads, length, head_dim]``, as views."""
        keys, values = (buffer[: self.rows, :, self.begin : self.end] for buffer in self._buffers)
        return keys, values

    def nothing(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``rows`` rows without a column."""
        keys, values = (buffer.new_empty(rows, buffer.shape[1], 0, buffer.shape[3]) for buffer in self._buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.end - self.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no limit"


class GrowingCache(Cache):
    """A :class:`transformers.Cache` of :class:`GrowingSlot`, one for each ``layer_idx`` that is ever updated.

    Rows may join at any time: all rows end at the same column.

    It keeps every column, also for sliding-window and chunked layers, whose masks then do the forgetting.
    Under autograd its in-place writes would be errors: it is for ``torch.no_grad``.

    Args:
        room: columns to allocate ahead; 0 for a cache that is only filled once.
    """

    def __init__(self, room: int = 64):
        # transformers calls this as a class, without arguments, when a slot is first updated.
        self._room = room
        super().__init__(layer_class_to_replicate=cast(type[GrowingSlot], partial(GrowingSlot, room)))

    def admit(self, parts: Sequence[tuple[GrowingCache, torch.Tensor]]) -> None:
        """Adds chosen rows of other caches below those there are; what is shorter is padded on the left with zeros.

        Args:
            parts: caches with, for each, the int64 [n] rows to take, repeats allowed: contexts to their samples. The
                new rows are in this order. All caches must have the same slots, or this one none.
        """
        slots = cast(list[GrowingSlot], self.layers)
        if not slots:
            slots.extend(GrowingSlot(self._room) for _ in parts[0][0].layers)
        for slot, *sources in zip(slots, *(cache.layers for cache, _ in parts), strict=True):
            slot.admit(
                [
                    (source.keys.index_select(0, index), source.values.index_select(0, index))
                    for source, (_, index) in zip(sources, parts, strict=True)
                ]
            )

    def fork(self, prompts: GrowingCache, rows: int) -> None:
        """Adds rows that go on from prompts which stay where they are (:mod:`mulligan.models.forks`).

        Args:
            prompts: the same object for as long as this cache lives; it may change between two steps.
            rows: how many; they have no columns of their own yet.
        """
        slots = cast(list[GrowingSlot], self.layers)
        if not slots:
            slots.extend(GrowingSlot(self._room) for _ in prompts.layers)
        for slot, above in zip(slots, cast(list[GrowingSlot], prompts.layers), strict=True):
            slot.prompts = above
            slot.admit([above.nothing(rows)])

    def keep(self, index: torch.Tensor) -> None:
        """Row j becomes row ``index[j]`` (int64 [n], n at most the rows there are), in place.

        Only rows with ``index[j] != j`` are copied, so an index that fills the holes of finished rows with
        rows from the end costs least. Memory is given back at the next growth.
        """
        targets = (index != torch.arange(len(index), device=index.device)).nonzero().squeeze(1)
        for slot in cast(list[GrowingSlot], self.layers):
            slot.move(index[targets], targets, len(index))

    def drop(self, columns: int) -> None:
        """Forgets so many of the first columns, which must be padding of every row."""
        for slot in cast(list[GrowingSlot], self.layers):
            slot.drop(columns)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """transformers' name for :meth:`keep`."""
        self.keep(beam_idx)


def can_grow(config: PreTrainedConfig) -> bool:
    """Whether a :class:`GrowingCache` can serve a model of this config.

    True where every layer attends to keys and values of its own. Models with recurrent or convolutional
    states, shared caches or index caches need transformers' ``DynamicCache(config=config)`` instead, which
    lacks :meth:`GrowingCache.admit` but can be forked and packed with :func:`select_rows`.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def select_rows(cache: Cache, index: torch.Tensor) -> None:
    """Makes row ``index[j]`` row j, in any cache of transformers.

    Args:
        cache: a :class:`GrowingCache`, which cannot gain rows this way, or any other, which can.
        index: int64 [n].
    """
    cache.reorder_cache(cast(torch.LongTensor, index))

"""A key-value cache for sampling: written in place, forked from shared contexts, packed as rows finish.

transformers' own ``DynamicCache`` concatenates a whole new cache for every token, which is most of the time
of a small model. Here each slot owns a buffer ``[rows, heads, capacity, head_dim]`` and a token costs one
column. A slot is what a model calls ``layer_idx``; a looped model uses one for each loop of each layer, so
slots appear on their first update.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


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
        self.length = 0
        self._buffers: list[torch.Tensor] = []  # of keys and of values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates for states ``[rows, heads, new, head_dim]``, and ``room`` more columns."""
        self.allocate(key_states, value_states, rows=key_states.shape[0], capacity=key_states.shape[2] + self.room)

    def allocate(self, keys: torch.Tensor, values: torch.Tensor, *, rows: int, capacity: int) -> None:
        """Uninitialised buffers with the heads, widths, type and device of ``keys`` and ``values``."""
        self._buffers = [like.new_empty(rows, like.shape[1], capacity, like.shape[3]) for like in (keys, values)]
        self.rows = rows
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[rows, heads, new, head_dim]`` states; returns views ``[rows, heads, length, head_dim]`` of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self._buffers[0].shape[2]:
            self._grow(start)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self.rows, :, start : self.length] = states
        return self._show()

    def put(self, rows: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fills these rows with states that end at the last column in use; what is left of them becomes zero.

        Zero and not garbage, because a masked column still takes part in the weighted sum, with weight 0,
        and 0 times NaN is NaN.
        """
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            pad = self.length - states.shape[2]
            buffer[rows, :, :pad] = 0
            buffer[rows, :, pad : self.length] = states
        self._show()

    def move(self, sources: torch.Tensor, targets: torch.Tensor, rows: int) -> None:
        """Copies rows ``sources`` over rows ``targets`` (both int64 [moved]) and keeps the first ``rows``."""
        if len(targets):
            for buffer in self._buffers:
                buffer[targets, :, : self.length] = buffer[sources, :, : self.length]
        self.rows = rows
        self._show()

    def _grow(self, used: int) -> None:
        # By half of what is there, so that copying costs a constant per token; rows that left are not copied.
        old = self._buffers
        self.allocate(*old, rows=self.rows, capacity=self.length + max(self.room, used // 2))
        for new, buffer in zip(self._buffers, old, strict=True):
            new[:, :, :used] = buffer[: self.rows, :, :used]

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[: self.rows, :, : self.length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no limit"


class GrowingCache(Cache):
    """A :class:`transformers.Cache` of :class:`GrowingSlot`, one for each ``layer_idx`` that is ever updated.

    It keeps every column, also for sliding-window and chunked layers, whose masks then do the forgetting.
    Under autograd its in-place writes would be errors: it is for ``torch.no_grad``.

    Args:
        room: columns to allocate ahead; 0 for a cache that is only filled once.
    """

    def __init__(self, room: int = 64):
        # transformers calls this as a class, without arguments, when a slot is first updated.
        super().__init__(layer_class_to_replicate=cast(type[GrowingSlot], partial(GrowingSlot, room)))

    @classmethod
    def join(cls, parts: Sequence[tuple[GrowingCache, torch.Tensor]], room: int = 64) -> GrowingCache:
        """One cache from chosen rows of several; rows of shorter caches are padded on the left with zeros.

        Args:
            parts: caches with, for each, the int64 [n] rows to take, repeats allowed. The result's rows are
                in this order. All caches must have the same slots.
            room: columns to allocate beyond the longest cache.
        """
        joined = cls(room)
        length = max(cache.get_seq_length() for cache, _ in parts)
        rows = sum(len(index) for _, index in parts)
        for sources in zip(*(cache.layers for cache, _ in parts), strict=True):
            slot = GrowingSlot(room)
            slot.allocate(sources[0].keys, sources[0].values, rows=rows, capacity=length + room)
            slot.length = length
            start = 0
            for source, (_, index) in zip(sources, parts, strict=True):
                there = slice(start, start + len(index))
                slot.put(there, source.keys.index_select(0, index), source.values.index_select(0, index))
                start = there.stop
            joined.layers.append(slot)
        return joined

    def fork(self, index: torch.Tensor, room: int = 64) -> GrowingCache:
        """A new cache whose row j is a copy of row ``index[j]`` (int64 [n]): contexts to their samples."""
        return type(self).join([(self, index)], room)

    def keep(self, index: torch.Tensor) -> None:
        """Row j becomes row ``index[j]`` (int64 [n], n at most the rows there are), in place.

        Only rows with ``index[j] != j`` are copied, so an index that fills the holes of finished rows with
        rows from the end costs least. Memory is given back at the next growth.
        """
        targets = (index != torch.arange(len(index), device=index.device)).nonzero().squeeze(1)
        for slot in cast(list[GrowingSlot], self.layers):
            slot.move(index[targets], targets, len(index))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """transformers' name for :meth:`keep`."""
        self.keep(beam_idx)


def can_grow(config: PreTrainedConfig) -> bool:
    """Whether a :class:`GrowingCache` can serve a model of this config.

    True where every layer attends to keys and values of its own. Models with recurrent or convolutional
    states, shared caches or index caches need transformers' ``DynamicCache(config=config)`` instead, which
    lacks :meth:`GrowingCache.join` but can be forked and packed with :func:`select_rows`.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


def select_rows(cache: Cache, index: torch.Tensor) -> None:
    """Makes row ``index[j]`` row j, in any cache of transformers.

    Args:
        cache: a :class:`GrowingCache`, which cannot gain rows this way, or any other, which can.
        index: int64 [n].
    """
    cache.reorder_cache(cast(torch.LongTensor, index))

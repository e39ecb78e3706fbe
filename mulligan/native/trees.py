"""Attention over trees of tokens (``trees.cpp``): every node of every tree and both passes in one call."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mulligan.native.build import library


class _Trees(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("threads", "heads", "shared", "size", "nodes", "trees", "longest")),
        ("scale", c_float),
    ]


class _Layout(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("node", "above", "ancestors", "tree")]


class _Given(ctypes.Structure):
    _fields_ = [("first", c_void_p), ("head", c_int64), ("token", c_int64)]


def _given(x: Tensor) -> _Given:
    """x [1, heads, N, head_dim], whose last dimension lies side by side."""
    return _Given(x.data_ptr(), x.stride(1), x.stride(2))


class Layout:
    """Which tokens are whose, as the kernels read it.

    Args:
        runs: (start, length, count): nodes of one length, side by side, all of them together every token.
        shared: (start, end, last): tokens end to last hang below tokens start to end.
    """

    def __init__(self, runs: tuple[tuple[int, int, int], ...], shared: tuple[tuple[int, int, int], ...]):
        nodes = [
            (at, at + length) for start, length, count in runs for at in range(start, start + length * count, length)
        ]
        above: list[list[tuple[int, int]]] = []
        open_: list[tuple[int, int, int]] = []  # the ancestors of the node at hand, outermost first
        waiting = sorted(shared)[::-1]
        for start, _ in nodes:
            open_ = [each for each in open_ if start < each[2]]
            while waiting and waiting[-1][1] <= start:
                # Whatever began and ended before, and has something below it that begins here.
                each = waiting.pop()
                if start < each[2]:
                    open_.append(each)
            above.append([each[:2] for each in open_])
        ends = [0]
        for one in above:
            ends.append(ends[-1] + len(one))
        flat = [pair for one in above for pair in one]
        # A tree begins where a node has nothing above it.
        roots = [i for i, one in enumerate(above) if not one]
        self._arrays = [
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (nodes, ends, flat or [(0, 0)], [*roots, len(nodes)])
        ]
        self.nodes, self.trees = len(nodes), len(roots)
        self.longest = max(
            end - start + sum(b - a for a, b in one) for (start, end), one in zip(nodes, above, strict=True)
        )
        self.given = _Layout(*(each.data_ptr() for each in self._arrays))


@cache
def _functions(dtype: torch.dtype) -> tuple[Any, Any]:
    functions, name = library(), str(dtype).removeprefix("torch.")
    forward, backward = (getattr(functions, f"tree_{kind}_{name}") for kind in ("forward", "backward"))
    forward.argtypes = [ctypes.POINTER(_Trees), ctypes.POINTER(_Layout)] + [ctypes.POINTER(_Given)] * 4
    forward.argtypes += [c_void_p, c_int64]
    backward.argtypes = [ctypes.POINTER(_Trees), ctypes.POINTER(_Layout)] + [ctypes.POINTER(_Given)] * 5
    backward.argtypes += [c_void_p] + [ctypes.POINTER(_Given)] * 3 + [c_int64]
    forward.restype = backward.restype = None
    return forward, backward


def _beside(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _like(x: Tensor, dtype: torch.dtype | None = None, zero: bool = False) -> Tensor:
    """A tensor as x [1, heads, N, head_dim], in the order in which projections read and write it."""
    make = torch.zeros if zero else torch.empty
    return make(1, x.shape[2], x.shape[1], x.shape[3], dtype=dtype or x.dtype).transpose(1, 2)


class TreeAttention(torch.autograd.Function):
    """Softmax attention of queries [1, heads, N, head_dim] to keys and values [1, shared heads, N, head_dim]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        q, k, v = map(_beside, (q, k, v))
        out, norm = _like(q), torch.empty(q.shape[1:3])
        shape = _shape(q, k, layout, scale)
        _functions(q.dtype)[0](shape, layout.given, *map(_given, (q, k, v, out)), norm.data_ptr(), q.shape[2])
        ctx.save_for_backward(q, k, v, out, norm)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, norm = ctx.saved_tensors
        shape = _shape(q, k, ctx.layout, ctx.scale)
        # Keys add up what every token below them gives, in float32.
        by_q, by_k, by_v = _like(q), _like(k, torch.float32, True), _like(v, torch.float32, True)
        given = map(_given, (q, k, v, out, _beside(grads[0])))
        _functions(q.dtype)[1](
            shape, ctx.layout.given, *given, norm.data_ptr(), *map(_given, (by_q, by_k, by_v)), q.shape[2]
        )
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype), None, None


def _shape(q: Tensor, k: Tensor, layout: Layout, scale: float) -> _Trees:
    threads = torch.get_num_threads()
    return _Trees(threads, q.shape[1], k.shape[1], q.shape[3], layout.nodes, layout.trees, layout.longest, scale)

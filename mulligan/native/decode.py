"""One decoding step between its matrix products (``decode.cpp``)."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from mulligan.native.build import library


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("threads", "rows", "heads", "shared", "size")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "table_stride")),
        *((name, c_int64) for name in ("row_stride", "head_stride", "prompt_row_stride", "prompt_head_stride")),
        *((name, c_int64) for name in ("prompt_first", "prompt_end", "first", "column")),
        ("eps", c_float),
        ("scale", c_float),
    ]


class Columns(NamedTuple):
    """Where keys and values lie: buffers [rows or more, heads, capacity, head_dim], and the columns in use."""

    keys: Tensor
    values: Tensor
    first: int
    end: int  # behind the last


class DecodeKernels:
    """The functions for one dtype.

    Raises:
        UserError: as for :func:`mulligan.native.build.library`.
    """

    def __init__(self, dtype: torch.dtype):
        functions, name = library(), str(dtype).removeprefix("torch.")
        self._attend, self._add_norm, self._gated = (
            getattr(functions, f"{kind}_{name}") for kind in ("attend", "add_norm", "gated")
        )
        self._attend.argtypes = [ctypes.POINTER(_Step)] + [c_void_p] * 16
        self._add_norm.argtypes = [c_int64, c_int64, c_int64, c_float] + [c_void_p] * 6
        self._gated.argtypes = [c_int64, c_int64] + [c_void_p] * 3
        for function in (self._attend, self._add_norm, self._gated):
            function.restype = None
        self.threads = torch.get_num_threads()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor | None, Tensor | None],
        eps: float,
        cos: Tensor,
        sin: Tensor,
        own: Columns,
        prompts: Columns,
        of: tuple[Tensor, Tensor, Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        """Norms and rotates one token's queries and keys, writes its key and value behind the row's own, and attends.

        Args:
            q: [R, heads * head_dim], as the projection gives it; k and v as well, with their own number of heads.
            norms: weights [head_dim] of the RMS norms of a head's query and key; None: there is none.
            eps: of those norms.
            cos: [R, head_dim]; sin as well.
            own: the rows' own columns, the last of them the new token's.
            prompts: the columns of the prompts.
            of: int64: the rows in the order of their prompts [R], the prompt of each row [R], the padding in front of
                each prompt [P] and of each row's own columns [R], both counted from the first column in use.
            scale: of the scores.

        Returns:
            [R, heads * head_dim].
        """
        rows, size, out = len(q), cos.shape[-1], torch.empty_like(q)
        step = _Step(
            self.threads,
            rows,
            q.shape[1] // size,
            k.shape[1] // size,
            size,
            *(each.stride(0) for each in (q, k, v, cos)),
            *own.keys.stride()[:2],
            *prompts.keys.stride()[:2],
            prompts.first,
            prompts.end,
            own.first,
            own.end - 1,
            eps,
            scale,
        )
        arrays = (q, k, v, *norms, cos, sin, own.keys, own.values, prompts.keys, prompts.values, *of, out)
        self._attend(step, *(None if each is None else each.data_ptr() for each in arrays))
        return out

    def add_norm(
        self, x: Tensor, h: Tensor | None, h_weight: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """``x + h``, and its RMS norm; with ``h_weight`` it is the RMS norm of h that is added, without h nothing.

        Args:
            x: [R, size], h as well.
            weight: [size], ``h_weight`` as well.
        """
        out, total = torch.empty_like(x), x if h is None else torch.empty_like(x)
        arrays = (x, h, h_weight, weight, total, out)
        self._add_norm(self.threads, *x.shape, eps, *(None if each is None else each.data_ptr() for each in arrays))
        return total, out

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``, both [R, size]."""
        out = torch.empty_like(gate)
        self._gated(self.threads, gate.numel(), gate.data_ptr(), up.data_ptr(), out.data_ptr())
        return out

"""A pass in which every row brings one token, through all decoder layers in one call of the kernels.

Shapes: R rows, D hidden size, H query heads, Hkv key heads, Dh head size, I intermediate size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.model.cpu_kernels import DTYPES, Kernels, Layer, PassAdapters
from tunesmith.model.kv_cache import Paged

_POINTERS = (
    *("layers", "k_pages", "v_pages", "slots", "tables", "lengths", "adapters"),
    *("x", "cos", "sin", "normed", "q", "k", "v", "seen", "inner"),
)


class Decode(ctypes.Structure):
    """As in cpu_decode.cpp, where its fields are explained."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in _POINTERS],
        *[(name, ctypes.c_int64) for name in ("num_layers", "rows", "widest")],
        *[(name, ctypes.c_int32) for name in ("page_format", "heads", "key_heads", "head_size")],
        ("scale", ctypes.c_float),
    )


class DecodePass:
    """The decoder layers of a model, all of them alike in shape, for the kernels.

    layers are kept: the kernels hold their addresses. scale: of the attention scores.
    """

    def __init__(self, kernels: Kernels, layers: Sequence[Layer], scale: float) -> None:
        self._kernels, self._scale, self._layers = kernels, scale, list(layers)
        self._addresses = (ctypes.c_void_p * len(layers))(*map(ctypes.addressof, self._layers))

    def run_(self, x: Tensor, cos: Tensor, sin: Tensor, paged: Paged, adapters: PassAdapters | None) -> None:
        """In place: x [R, D] after all layers; cos and sin [R, Dh]; the pages get the new keys and values."""
        one, rows = self._layers[0], len(x)
        sizes = (one.q.inputs, one.q.outputs, one.k.outputs, one.v.outputs, one.q.outputs, one.gate.outputs)
        room = torch.empty(rows * sum(sizes)).split([rows * size for size in sizes])
        self._kernels.decode_layers(
            Decode(
                ctypes.addressof(self._addresses),
                ctypes.addressof(paged.k_pages),
                ctypes.addressof(paged.v_pages),
                *(part.data_ptr() for part in (paged.slots, paged.tables, paged.lengths)),
                None if adapters is None else ctypes.addressof(adapters),
                *(part.data_ptr() for part in (x, cos, sin, *room)),
                len(self._layers),
                rows,
                paged.tables.shape[1],
                DTYPES[paged.dtype],
                one.heads,
                one.key_heads,
                one.head_size,
                self._scale,
            )
        )

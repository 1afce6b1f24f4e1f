"""Our own kernels for decoding on a CPU, in C++ (cpu_*.cpp; built by cpu_build).

They compute with torch's threads. Where they cannot be had, `load` says so once and everything runs on
torch's operations. All tensors are on the CPU; no row's result depends on the other rows or the threads.

Shapes: R rows, T tokens, D hidden size, H query heads, Hkv key heads, Dh head size, N outputs, I inputs,
P pages of a row's table.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import say
from tunesmith.model.cpu_build import open_library
from tunesmith.model.pages import PAGE

OFF = "TUNESMITH_NO_KERNELS"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
PACKED_FORMATS = ("fp32", "bf16", "int8", "nf4")

_ADDRESS, _NUMBER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "paged_attention": [*[_INT] * 3, *[_ADDRESS] * 5, *[_NUMBER] * 2, *[_INT] * 3, _FLOAT, _ADDRESS],
    "write_pages": [*[_INT] * 2, *[_ADDRESS] * 5, *[_NUMBER] * 2],
    "pack": [*[_INT] * 2, *[_ADDRESS] * 2, *[_NUMBER] * 2],
    "unpack": [_INT, *[_ADDRESS] * 2],
    "product": [_INT, *[_ADDRESS] * 2, _NUMBER, _ADDRESS],
    "rms_norm": [_INT, *[_ADDRESS] * 2, _FLOAT, *[_NUMBER] * 2, _ADDRESS],
    "rotate": [_INT, *[_ADDRESS] * 2, _FLOAT, *[_ADDRESS] * 2, _NUMBER, *[_INT] * 2],
    "swiglu": [_INT, *[_ADDRESS] * 2, *[_NUMBER] * 2],
    "before_attention": [_INT, *[_ADDRESS] * 2, _NUMBER, _ADDRESS, _NUMBER, *[_ADDRESS] * 6],
    "decode_layers": [_INT, _ADDRESS],
    "after_attention": [_INT, *[_ADDRESS] * 2, _NUMBER, _ADDRESS, _NUMBER, *[_ADDRESS] * 3],
}


class Matrix(ctypes.Structure):
    """A packed matrix; as in cpu_products.h, where its fields are explained."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """A decoder layer's matrices and norms; as in cpu_layers.cpp."""

    _fields_ = (
        *[(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, ctypes.c_void_p) for name in ("norm", "post_norm", "q_norm", "k_norm")],
        *[(name, ctypes.c_float) for name in ("eps", "post_eps", "q_eps", "k_eps")],
        *[(name, ctypes.c_int32) for name in ("heads", "key_heads", "head_size")],
    )


class Update(ctypes.Structure):
    """Of an adapter on one projection; as in cpu_adapters.h, also those below."""

    _fields_ = (("b", ctypes.c_void_p), ("column", ctypes.c_int32), ("rank", ctypes.c_int32))


class LayerUpdates(ctypes.Structure):
    """Of an adapter on one layer: four inputs, seven projections."""

    _fields_ = (("a", ctypes.c_void_p * 4), ("to", Update * 7), ("ranks", ctypes.c_int32 * 4))


class RowGroup(ctypes.Structure):
    """Rows of a pass that have the same adapter."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("which", "first", "count"))


class PassAdapters(ctypes.Structure):
    """The adapters of a pass."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("adapters", "owner", "order", "groups", "z")],
        *[(name, ctypes.c_int64) for name in ("num_groups", "step")],
    )


class OnLayer(NamedTuple):
    """A decoder layer, its number, and the adapters of the pass, if it has any."""

    layer: Layer
    number: int
    adapters: PassAdapters | None = None

    def arguments(self) -> tuple[Any, ...]:
        adapters = None if self.adapters is None else ctypes.byref(self.adapters)
        return ctypes.byref(self.layer), adapters, self.number


class Kernels:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library
        self.panel_width: int = library.panel_width()

    @staticmethod
    def knows(dtype: torch.dtype) -> bool:
        """True for the number formats of keys, values and queries: float32 and bfloat16."""
        return dtype in DTYPES

    def paged_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: Tensor,
        lengths: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention of one new token a row over its pages: q [R, H, Dh] -> [R, H, Dh], of q's dtype.

        k_pages, v_pages [pages, PAGE, Hkv, Dh], contiguous, of one dtype, which may differ from q's;
        tables [R, P] int32: a row's pages in order; lengths [R] int32: how many tokens it sees, at least 1.
        """
        q, tables = q.contiguous(), tables.contiguous()
        rows, heads, dh = q.shape
        key_heads = k_pages.shape[2]
        assert tables.dtype == lengths.dtype == torch.int32 and len(tables) == len(lengths) == rows
        assert k_pages.shape == v_pages.shape and k_pages.shape[1] == PAGE and k_pages.shape[3] == dh
        assert k_pages.is_contiguous() and v_pages.is_contiguous() and heads % key_heads == 0
        assert k_pages.dtype == v_pages.dtype and lengths.is_contiguous()
        out = torch.empty_like(q)
        self._library.paged_attention(
            torch.get_num_threads(),
            DTYPES[q.dtype],
            DTYPES[k_pages.dtype],
            q.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            tables.data_ptr(),
            lengths.data_ptr(),
            rows,
            tables.shape[1],
            heads,
            key_heads,
            dh,
            scale,
            out.data_ptr(),
        )
        return out

    def write_pages(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
        """Store k and v [T, Hkv, Dh] in the pages, rounding where these are bfloat16.

        slots [T] int64: for each token its page * PAGE + its place in the page.
        """
        k, v = k.contiguous(), v.contiguous()
        assert k.dtype == v.dtype and k_pages.dtype == v_pages.dtype and slots.dtype == torch.int64
        assert k.shape == v.shape and k.shape[1:] == k_pages.shape[2:] and len(slots) == len(k)
        assert k_pages.is_contiguous() and v_pages.is_contiguous()
        self._library.write_pages(
            DTYPES[k.dtype],
            DTYPES[k_pages.dtype],
            k.data_ptr(),
            v.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            slots.data_ptr(),
            len(k),
            k.shape[1] * k.shape[2],
        )

    def pack(self, format: str, rows: Tensor) -> Tensor:
        """The panels (bytes) of rows [N, I]: float32, bfloat16, int8, or NF4's codes as uint8."""
        rows = rows.contiguous()
        outputs, inputs = rows.shape
        number = PACKED_FORMATS.index(format)
        panels = -(-outputs // self.panel_width)
        bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}[format]
        packed = torch.empty(panels * self.panel_width * inputs * bits // 8, dtype=torch.uint8)
        self._library.pack(
            torch.get_num_threads(),
            number,
            rows.data_ptr(),
            packed.data_ptr(),
            outputs,
            inputs,
        )
        return packed

    def unpack(self, matrix: Matrix) -> Tensor:
        """[N, I] float32: the weights as the products see them."""
        out = torch.empty(matrix.outputs, matrix.inputs)
        self._library.unpack(torch.get_num_threads(), ctypes.byref(matrix), out.data_ptr())
        return out

    def product(self, matrix: Matrix, x: Tensor) -> Tensor:
        """x [R, I] float32 -> x Wᵀ + bias [R, N]."""
        x = x.contiguous()
        assert x.dtype == torch.float32 and x.shape[1] == matrix.inputs
        out = torch.empty(len(x), matrix.outputs)
        threads = torch.get_num_threads()
        self._library.product(threads, ctypes.byref(matrix), x.data_ptr(), len(x), out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight · x / √(mean(x²) + eps): x [T, D] float32."""
        assert x.is_contiguous() and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
        out = torch.empty_like(x)
        threads = torch.get_num_threads()
        self._library.rms_norm(
            threads, x.data_ptr(), weight.data_ptr(), eps, x.shape[0], x.shape[1], out.data_ptr()
        )
        return out

    def rotate_(
        self, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        """In place: x [T, H, Dh] through its heads' RMSNorm [Dh], if any, then turned by cos, sin [T, Dh]."""
        assert all(part.is_contiguous() and part.dtype == torch.float32 for part in (x, cos, sin))
        self._library.rotate(
            torch.get_num_threads(),
            x.data_ptr(),
            None if norm is None else norm.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            *x.shape,
        )
        return x

    def swiglu_(self, gate: Tensor, up: Tensor) -> Tensor:
        """In place: gate = silu(gate) · up; both [T, I] float32."""
        assert gate.is_contiguous() and up.is_contiguous() and gate.dtype == up.dtype == torch.float32
        threads = torch.get_num_threads()
        self._library.swiglu(threads, gate.data_ptr(), up.data_ptr(), gate.shape[0], gate.shape[1])
        return gate

    def before_attention(
        self, on: OnLayer, x: Tensor, cos: Tensor, sin: Tensor, normed: Tensor, qkv: tuple[Tensor, ...]
    ) -> None:
        """x [T, D] -> q, k, v [T, heads, Dh]: norm, products, heads' norms, rotation. normed [T, D]: room."""
        self._library.before_attention(
            torch.get_num_threads(),
            *on.arguments(),
            x.data_ptr(),
            len(x),
            cos.data_ptr(),
            sin.data_ptr(),
            normed.data_ptr(),
            *(part.data_ptr() for part in qkv),
        )

    def decode_layers(self, decode: ctypes.Structure) -> None:
        """All layers of a pass in which each row brings one token: a `decode_pass.Decode`."""
        self._library.decode_layers(torch.get_num_threads(), ctypes.byref(decode))

    def after_attention(self, on: OnLayer, x: Tensor, seen: Tensor, normed: Tensor, inner: Tensor) -> None:
        """In place: x [T, D] += o(seen [T, H · Dh]), then += the MLP of its norm. inner [T, I]: room."""
        self._library.after_attention(
            torch.get_num_threads(),
            *on.arguments(),
            x.data_ptr(),
            len(x),
            seen.data_ptr(),
            normed.data_ptr(),
            inner.data_ptr(),
        )


@functools.cache
def load() -> Kernels | None:
    """The kernels; compiled first when the cache folder does not have them yet (some seconds).

    None, after saying why on stderr, where there is no C++ compiler, the build fails, or torch computes
    with an OpenMP library that they cannot share; None without a word when TUNESMITH_NO_KERNELS is set.
    """
    if os.environ.get(OFF, "") not in ("", "0"):
        return None
    try:
        return Kernels(open_library())
    except (TunesmithError, OSError, AttributeError) as error:
        say(f"decoding on the CPU runs without compiled kernels, more slowly: {error}")
        return None

"""Counts the bytes of live tensors, operation by operation, on any device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.model.quant import product_of_four_bits

ATEN = torch.ops.aten
# What stands in for a matrix product: zeros of its shape and format.
PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    ATEN.mm.default: lambda a, b: a.new_zeros(a.shape[0], b.shape[1]),
    ATEN.mm.out: lambda a, b, out: out.zero_(),
    ATEN.bmm.default: lambda a, b: a.new_zeros(a.shape[0], a.shape[1], b.shape[2]),
    ATEN.baddbmm.default: lambda onto, a, b, **_: a.new_zeros(a.shape[0], a.shape[1], b.shape[2]),
    ATEN.addmm.default: lambda onto, a, b, **_: a.new_zeros(a.shape[0], b.shape[1]),
    ATEN.addmm_.default: lambda onto, a, b, **_: onto,
}


class LiveTensors(TorchDispatchMode):
    """While it is active, every tensor that an operation makes counts from then on until it is freed.

    Tensors made before count once an operation returns them, or by `track`. A storage counts once, whatever
    number of tensors look at it. What a kernel takes for itself and gives back is not seen.
    products: False leaves matrix products uncomputed, all zeros, which is many times faster and has the
    same tensors.
    """

    def __init__(self, *, products: bool = True) -> None:
        super().__init__()
        self.products = products
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, tuple[int, str]] = {}
        self._changes: list[tuple[int, str]] = []
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() == "bitsandbytes::gemm_4bit":
            with self:
                return product_of_four_bits(*args, **(kwargs or {}))
        make = func if self.products else PRODUCTS.get(func, func)
        out = make(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.track(value, func.name().removeprefix("aten::"))
        return out

    def track(self, tensor: Tensor, made_by: str) -> None:
        """Count a tensor's storage, if it is not counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or storage.nbytes() == 0:
            return
        label = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} by {made_by}"
        self._sizes[key] = (storage.nbytes(), label)
        self._watched[key] = weakref.ref(storage, self._forgetter(key))
        self._change(storage.nbytes(), label)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            size, label = self._sizes.pop(key)
            del self._watched[key]
            self._change(-size, label)

        return forget

    def _change(self, size: int, label: str) -> None:
        self.live_bytes += size
        self._changes.append((size, label))

    def reset_peak(self) -> None:
        """Forget the peak so far; what is live stays counted."""
        self.peak_bytes = self.live_bytes
        self._changes = [(size, label) for size, label in self._sizes.values()]

    def at_peak(self, count: int = 10) -> list[tuple[int, str]]:
        """The kinds of tensors that were live at the peak and took most, as (bytes, format and maker)."""
        held: Counter[str] = Counter()
        total = highest = 0
        at_highest: Counter[str] = Counter()
        for size, label in self._changes:
            total += size
            held[label] += size
            if total > highest:
                highest, at_highest = total, held.copy() if total == self.peak_bytes else at_highest
        return [(size, label) for label, size in at_highest.most_common(count) if size]

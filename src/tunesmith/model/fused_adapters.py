"""The adapters of a pass for the kernels: where each one's matrices lie, and which rows are whose.

An adapter's addresses are written down once, at its first pass; a pass then only lists its rows.

Shapes: T tokens of a pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.model.adapter_slots import Adapter, Pass, slot_of
from tunesmith.model.cpu_kernels import LayerUpdates, PassAdapters, RowGroup, Update

# The input of each projection, in the order of fast_layers.ATTENTION and MLP; as in cpu_adapters.h.
INPUT_OF = (0, 0, 0, 1, 2, 2, 3)
Layers = Sequence[Sequence[Any]]


class AdapterTable:
    """One adapter's matrices on all decoder layers. They live as long as the adapter."""

    def __init__(self, adapter: Adapter, layers: Layers) -> None:
        self._table = (LayerUpdates * len(layers))()
        self.address = ctypes.addressof(self._table)
        for updates, linears in zip(self._table, layers, strict=True):
            _write(updates, adapter, linears)
        self.most_ranks = max(max(updates.ranks) for updates in self._table)


def _write(updates: LayerUpdates, adapter: Adapter, linears: Sequence[Any]) -> None:
    for place, (linear, input) in enumerate(zip(linears, INPUT_OF, strict=True)):
        slot = slot_of(linear)
        stack = None if slot is None else adapter.stacks[slot.group.index]
        if slot is None or stack is None:
            continue
        b = stack.b[slot.place]
        updates.to[place] = Update(b.data_ptr(), stack.columns[slot.place].start, len(b))
        updates.a[input], updates.ranks[input] = stack.a.data_ptr(), len(stack.a)


class FusedPass:
    """The adapters of one pass; `given` is what the kernels take, while this object lives."""

    def __init__(self, current: Pass, layers: Layers) -> None:
        rows = _rows_of(current)
        tables = [_table(adapter, layers) for adapter in rows]
        owner = [-1] * current.num_tokens
        groups, first = [], 0
        for which, own in enumerate(rows.values()):
            groups.append(RowGroup(which, first, len(own)))
            first += len(own)
            for row in own:
                owner[row] = which
        order = [row for own in rows.values() for row in own]
        step = max(table.most_ranks for table in tables)
        self._held: tuple[ctypes.Array[Any], ...] = (
            (ctypes.c_void_p * len(tables))(*(table.address for table in tables)),
            (ctypes.c_int32 * len(owner))(*owner),
            (ctypes.c_int32 * len(order))(*order),
            (RowGroup * len(groups))(*groups),
        )
        self._z = torch.empty(len(owner), step)
        self.given = PassAdapters(
            *(ctypes.addressof(part) for part in self._held),
            self._z.data_ptr(),
            num_groups=len(groups),
            step=step,
        )


def _rows_of(current: Pass) -> dict[Adapter, list[int]]:
    """The rows of every adapter of the pass."""
    found: dict[Adapter, list[int]] = {}
    first = 0
    for adapter, count in current.spans:
        if adapter is not None:
            found.setdefault(adapter, []).extend(range(first, first + count))
        first += count
    return found


def _table(adapter: Adapter, layers: Layers) -> AdapterTable:
    if adapter.table is None:
        adapter.table = AdapterTable(adapter, layers)
    found: AdapterTable = adapter.table
    return found

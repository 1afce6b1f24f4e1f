"""Many LoRA adapters on one base model: loaded and unloaded between passes, chosen for every row of a pass.

How they are computed: adapter_slots. What can be loaded: lora_files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.model.adapter_slots import (
    Adapter,
    Part,
    Pass,
    Stack,
    Turn,
    Work,
    install_slots,
    joined,
    own_stack,
    slot_of,
)
from tunesmith.model.limits import check_adapter
from tunesmith.model.lora_files import MAX_RANK, read_lora

Span = tuple[str | None, int]
Stacks = tuple[Stack | None, ...]
# A span of at least so many tokens is computed with its own adapter alone: a product with every adapter's
# matrices would cost it more than two products of its own (measured on SmolLM2-135M, eight adapters of r=8).
LONG_SPAN = 16


class AdapterBank:
    """The adapters on `model`: a plain transformers model in eval mode, with linear layers of any kind.

    Every linear layer gets an attribute `adapter_slot` at once, before any adapter is loaded. All calls but
    `read` belong to the thread that computes. max_rank: the highest rank that is taken.
    """

    def __init__(self, model: nn.Module, *, max_rank: int = MAX_RANK) -> None:
        if hasattr(model, "peft_config"):
            raise ValueError("the bank is for a plain model, not for a PeftModel")
        self._model, self._max_rank = model, max_rank
        found = ((name, part, features(part)) for name, part in model.named_modules())
        layers = {name: (part, sizes) for name, part, sizes in found if sizes is not None}
        self._features = {name: sizes for name, (_, sizes) in layers.items()}
        self._turn = Turn()
        self._groups = install_slots({name: part for name, (part, _) in layers.items()}, self._turn)
        self._adapters: dict[str, Adapter] = {}
        self._versions: dict[str, int] = {}
        self._num_loads = 0
        self._joined: tuple[tuple[str, ...], Stacks] = ((), ())

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(self._adapters)

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters; those that answer together take as much again while they do."""
        return sum(adapter.num_bytes for adapter in self._adapters.values())

    def version(self, name: str) -> int:
        """A number that no other loading, of this or another name, has. Raises UserError as `check` does."""
        self.check(name)
        return self._versions[name]

    def check(self, name: str | None) -> None:
        """Raise UserError, naming the loaded ones, when no adapter has this name; None is the base."""
        check_adapter(name, self._adapters)

    def load(self, name: str, folder: Path) -> None:
        """Serve the adapter in `folder` (peft's format) as `name`; one of that name is replaced.

        Raises UserError with the reason for what cannot be served this way; the bank is then as it was.
        """
        self.put(name, self.read(folder))

    def read(self, folder: Path) -> Adapter:
        """What `put` takes. Raises UserError as `load` does. Any thread may read, also during a pass."""
        updates = read_lora(folder, self._model, self._features, max_rank=self._max_rank)
        stacks = tuple(own_stack([updates.get(name) for name in group.names]) for group in self._groups)
        return Adapter(stacks, sum(stack.num_bytes for stack in stacks if stack is not None))

    def put(self, name: str, adapter: Adapter) -> None:
        """Serve an adapter that was read as `name`; one of that name is replaced."""
        self._forget(name)
        self._num_loads += 1
        self._adapters[name], self._versions[name] = adapter, self._num_loads

    def unload(self, name: str) -> None:
        """Forget an adapter and give its memory back. Raises UserError for unknown names."""
        self.check(name)
        self._forget(name)

    def close(self) -> None:
        """Leave the model as it was before the bank; another bank may follow."""
        for group in self._groups:
            group.remove()

    def _forget(self, name: str) -> None:
        self._adapters.pop(name, None)
        self._versions.pop(name, None)
        if name in self._joined[0]:
            self._joined = ((), ())

    @contextmanager
    def selected(self, spans: Sequence[Span]) -> Iterator[None]:
        """Inside, the model computes one pass whose tokens are the spans' one after the other.

        A span is (name of its adapter or None for the base, number of tokens). Not to be nested.
        """
        for name, _ in spans:
            self.check(name)
        whose = [(None if name is None else self._adapters[name], count) for name, count in spans]
        if any(adapter is not None and count for adapter, count in whose):
            self._turn.current = Pass(whose, partial(self._split, tuple(spans)))
        try:
            yield
        finally:
            self._turn.end()

    def add_(self, layer: nn.Module, x: Tensor, y: Tensor, spans: Sequence[Span]) -> Tensor:
        """Add the updates of one layer, such as the head, to its output in place; returns y.

        x [rows, D] and y [rows, N] were computed outside of `selected`; the spans are those of the rows.
        """
        slot = slot_of(layer)
        adapters = (self._adapters[name] for name, _ in spans if name is not None)
        if slot is None or not any(adapter.stacks[slot.group.index] for adapter in adapters):
            return y
        with self.selected(spans):
            return slot.add_(x, y)

    def _split(self, spans: Sequence[Span]) -> Work:
        runs = [run for run in _runs(spans) if run.names]
        together = self._together({name for run in runs if len(run.names) > 1 for name in run.names})
        parts = []
        for run in runs:
            names = run.names if len(run.names) == 1 else together
            parts.append(Part(run.first, run.count, names, run.owners(names, self._device)))
        stacks = {part.names: self._stacks(part.names) for part in parts}
        return Work(tuple(parts), stacks)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _stacks(self, names: tuple[str, ...]) -> Stacks:
        return self._adapters[names[0]].stacks if len(names) == 1 else self._joined[1]

    def _together(self, names: set[str]) -> tuple[str, ...]:
        """Join the stacks of these adapters, unless those that are joined have them all and few others."""
        kept = self._joined[0]
        if not names:
            return ()
        if not names <= set(kept) or self._size(kept) > 2 * self._size(names):
            kept = tuple(name for name in self._adapters if name in names)
            columns = zip(*(self._adapters[name].stacks for name in kept), strict=True)
            self._joined = (kept, tuple(joined(stacks) for stacks in columns))
        return kept

    def _size(self, names: Iterable[str]) -> int:
        return sum(self._adapters[name].num_bytes for name in names)


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring spans that are computed together, from token `first` on."""

    first: int
    spans: tuple[Span, ...]

    @property
    def count(self) -> int:
        return sum(count for _, count in self.spans)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.spans if name is not None))

    def owners(self, names: tuple[str, ...], device: torch.device) -> Tensor | None:
        """`Part.owner`."""
        if len(self.spans) == 1:
            return None
        places: dict[str | None, int] = {None: -1} | {name: i for i, name in enumerate(names)}
        rows = [places[name] for name, count in self.spans for _ in range(count)]
        return torch.tensor(rows, device=device)


def _runs(spans: Sequence[Span]) -> list[_Run]:
    """Long spans each alone, the short ones between them together."""
    merged = [(name, sum(count for _, count in same)) for name, same in groupby(spans, lambda span: span[0])]
    runs: list[_Run] = []
    first, short = 0, True
    for span in merged:
        was_short, short = short, span[1] < LONG_SPAN
        if runs and was_short and short:
            runs[-1] = _Run(runs[-1].first, (*runs[-1].spans, span))
        else:
            runs.append(_Run(first, (span,)))
        first += span[1]
    return runs


def features(part: nn.Module) -> tuple[int, int] | None:
    """(input, output) features of a linear layer of any kind; None for other modules."""
    if isinstance(part, Conv1D):
        return part.nx, part.nf
    size_in, size_out = getattr(part, "in_features", None), getattr(part, "out_features", None)
    return (size_in, size_out) if isinstance(size_in, int) and isinstance(size_out, int) else None

"""The updates of several LoRA adapters inside one pass, each row with its own (Punica: Chen et al. 2023,
arXiv:2310.18547; S-LoRA: Sheng et al. 2023, arXiv:2311.03285).

The adapters of a pass stand one below the other in one matrix, so a layer's update is two narrow products
however many there are: z = x Aᵀ, what is not the row's own is made zero, y += z B. Layers that share their
input (q, k, v; gate, up) share the first product. Rows without an adapter keep the base's values exactly.

Shapes: T tokens of a pass, D input features, N output features, R sum of the ranks that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunesmith.model.lora_files import LowRank

Ranks = tuple[tuple[int, ...], ...]
# Layers of one parent that decoders give the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Stack:
    """The matrices of some adapters on the layers of one group.

    a [R, D]: for each layer, for each adapter, its rows; b[layer] [the layer's rows of a, N], scaled;
    ranks[layer][adapter].
    """

    __slots__ = ("a", "b", "columns", "ranks")

    def __init__(self, a: Tensor, b: tuple[Tensor, ...], ranks: Ranks) -> None:
        self.a, self.b, self.ranks = a, b, ranks
        self.columns = [slice(*ends) for ends in pairwise(accumulate(map(sum, ranks), initial=0))]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.a, *self.b))


def own_stack(updates: Sequence[LowRank | None]) -> Stack | None:
    """One adapter's updates of a group's layers; None where it has none."""
    found = [update for update in updates if update is not None]
    if not found:
        return None
    nothing = found[0].b.new_empty(0, 0)
    b = tuple(nothing if update is None else update.b for update in updates)
    return Stack(torch.cat([update.a for update in found]), b, tuple((len(each),) for each in b))


def joined(stacks: Sequence[Stack | None]) -> Stack | None:
    """The stacks of several adapters on one group as one; None where none has an update."""
    found = [stack for stack in stacks if stack is not None]
    if not found:
        return None
    layers = range(len(found[0].b))
    ranks = tuple(tuple(stack.ranks[i][0] if stack else 0 for stack in stacks) for i in layers)
    a = torch.cat([stack.a[stack.columns[i]] for i in layers for stack in found])
    b = [torch.cat([stack.b[i] for stack in found if len(stack.b[i])] or [found[0].b[i]]) for i in layers]
    return Stack(a, tuple(b), ranks)


@dataclass(eq=False, slots=True)
class Adapter:
    """An adapter that was read: its matrices for each group of a bank's layers.

    table: the same for the kernels (fused_adapters), from its first pass there on.
    """

    stacks: tuple[Stack | None, ...]
    num_bytes: int
    table: Any = None


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens first … first + count - 1 of a pass, with the adapters `names` in their stacks.

    owner [count]: place of each token's adapter in `names`, -1 for none; None: all have the only one.
    """

    first: int
    count: int
    names: tuple[str, ...]
    owner: Tensor | None
    _masks: dict[Ranks, Tensor] = field(default_factory=dict)

    def mask(self, ranks: Ranks) -> Tensor | None:
        """[count, R]: True where a column of z is not of the row's own adapter. Made once for each pass."""
        if self.owner is None:
            return None
        found = self._masks.get(ranks)
        if found is None:
            columns = [i for layer in ranks for i, rank in enumerate(layer) for _ in range(rank)]
            whose = torch.tensor(columns, device=self.owner.device)
            found = self._masks[ranks] = self.owner[:, None] != whose
        return found


@dataclass(frozen=True, slots=True)
class Work:
    """The parts of a pass that have adapters; stacks[names][i] is for group i."""

    parts: tuple[Part, ...]
    stacks: Mapping[tuple[str, ...], Sequence[Stack | None]]


class Pass:
    """A pass whose tokens are the spans' one after the other; at least one has an adapter.

    split: makes the work of it, which those who compute from the spans themselves do not need.
    """

    def __init__(self, spans: Sequence[tuple[Adapter | None, int]], split: Callable[[], Work]) -> None:
        self.spans, self._split = spans, split
        self.num_tokens = sum(count for _, count in spans)

    @cached_property
    def work(self) -> Work:
        """Made at the first call."""
        return self._split()


class Turn:
    """Whose turn it is on the layers of a bank: the pass that is computed, None for one without adapters."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.begun: list[Group] = []

    def end(self) -> None:
        """Forget the pass and what was computed of it."""
        self.current = None
        for group in self.begun:
            group.end()
        self.begun.clear()


class Group:
    """Layers that get the same input, and the products with it that this pass has computed.

    index: the group's place among those of its bank.
    """

    def __init__(self, names: tuple[str, ...], index: int, turn: Turn) -> None:
        self.names, self.index, self.turn = names, index, turn
        self._begun: Pass | None = None
        self._layers: list[tuple[Any, RemovableHandle]] = []
        self._work: list[tuple[Part, Stack]] = []
        self._num_tokens = 0
        self._x: Tensor | None = None
        self._z: list[Tensor] = []

    def join(self, layer: Any) -> None:
        """Give a layer its slot and the hook."""
        layer.adapter_slot = AdapterSlot(self, len(self._layers))
        self._layers.append((layer, layer.register_forward_hook(layer.adapter_slot.hook)))

    def remove(self) -> None:
        """Take slots and hooks from the layers."""
        for layer, hook in self._layers:
            hook.remove()
            del layer.adapter_slot
        self._layers = []

    @property
    def active(self) -> bool:
        """True when the pass has an adapter on a layer of the group."""
        current = self.turn.current
        if current is not None and current is not self._begun:
            self._begin(current)
        return current is not None and bool(self._work)

    def _begin(self, current: Pass) -> None:
        work = current.work
        stacks = ((part, work.stacks[part.names][self.index]) for part in work.parts)
        self._work = [(part, stack) for part, stack in stacks if stack is not None]
        self._num_tokens, self._begun = current.num_tokens, current
        self.turn.begun.append(self)

    def end(self) -> None:
        """Forget the pass."""
        self._begun, self._work, self._x, self._z = None, [], None, []

    def add_(self, place: int, x: Tensor, y: Tensor) -> None:
        """Add the update of the group's layer number `place` to its output."""
        # The layers of a group are called with the very same tensor, which nobody changes in between.
        if self._x is not x:
            self._x, self._z = x, self._products(x)
        rows = y.view(-1, y.shape[-1])
        for (part, stack), z in zip(self._work, self._z, strict=True):
            b = stack.b[place]
            if len(b):
                own = rows if part.count == len(rows) else rows[part.first : part.first + part.count]
                _add_product(own, z[:, stack.columns[place]], b)

    def _products(self, x: Tensor) -> list[Tensor]:
        """z [count, R] of each part, for all layers of the group."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) != self._num_tokens:
            raise RuntimeError(f"{self.names[0]}: {len(rows)} tokens in a pass of {self._num_tokens}")
        return [_own_product(rows, part, stack) for part, stack in self._work]


def _own_product(rows: Tensor, part: Part, stack: Stack) -> Tensor:
    own = rows if part.count == len(rows) else rows[part.first : part.first + part.count]
    z = own.float() @ stack.a.T
    mask = part.mask(stack.ranks)
    # Filled, not multiplied: another adapter's product may be infinite, and 0 times that is NaN.
    return z if mask is None else z.masked_fill_(mask, 0.0)


def _add_product(y: Tensor, z: Tensor, b: Tensor) -> None:
    """y += z b, summed in fp32 and rounded to y's format once."""
    if y.dtype == torch.float32:
        y.addmm_(z, b)
    else:
        y.add_(z @ b)


class AdapterSlot:
    """A linear layer's place in a bank; the layer has it as its attribute `adapter_slot`.

    A hook on the layer calls it. Who computes the layer's product without calling the layer must call `add_`
    afterwards; given the same tensor x for all layers that share it, their first product is shared.
    """

    __slots__ = ("group", "place")

    def __init__(self, group: Group, place: int) -> None:
        self.group, self.place = group, place

    @property
    def active(self) -> bool:
        """True when this pass has an adapter on the layer, or on one that shares its input."""
        return self.group.active

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update to the layer's output in place: x [..., D] its input, y [..., N]. Returns y."""
        if self.group.active:
            self.group.add_(self.place, x, y)
        return y

    def hook(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        """torch's forward hook."""
        return self.add_(args[0], y) if self.group.active else None


def slot_of(layer: nn.Module) -> AdapterSlot | None:
    """The layer's place in a bank, None when its model has no bank."""
    found: AdapterSlot | None = getattr(layer, "adapter_slot", None)
    return found


def install_slots(layers: Mapping[str, Any], turn: Turn) -> list[Group]:
    """Give every linear layer, by its dotted name, a slot and the hook; the groups that they form."""
    groups = [Group(names, index, turn) for index, names in enumerate(_grouped(layers))]
    for group in groups:
        for name in group.names:
            group.join(layers[name])
    return groups


def _grouped(names: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The names of each group's layers: siblings together, each other layer alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        first = next((kinds[0] for kinds in SIBLINGS if last in kinds), last)
        found.setdefault(f"{parent}.{first}", []).append(name)
    return [tuple(group) for group in found.values()]

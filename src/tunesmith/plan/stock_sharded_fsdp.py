"""A model of which every process holds a part: what FSDP1 and FSDP2 gather and free, and when.

The traced model keeps its whole parameters, which count as this process' part of them; what is gathered is
made and freed by hooks on the units, at the moments at which the framework makes and frees it. (PyTorch:
torch/distributed/fsdp/_runtime_utils.py, torch/distributed/fsdp/_fully_shard; arXiv 2304.11277.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from tunesmith.plan.allocator import Event, simulate
from tunesmith.plan.timeline import Timeline
from tunesmith.plan.trace import Trace

Kind = Literal["fsdp1", "fsdp2"]

COLLECTIVE = "a collective"


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model is divided among `ranks` processes.

    stored: format of this process' part of what is trained, and so of its gradients and optimizer states;
    None: as it computes. reduced: format in which gradients are summed. keeps_last: the last layer stays
    whole between the passes. accumulates: gradients of earlier micro-batches are there, whole, for they are
    summed over the processes with the last one only. apart: the embedding is gathered by itself.
    """

    kind: Kind
    ranks: int
    stored: torch.dtype | None
    reduced: torch.dtype | None
    keeps_last: bool = False
    accumulates: bool = False
    apart: bool = False


@dataclass(eq=False)
class Unit:
    """What is gathered at one time: a module's parameters that belong to no unit within it, and the packed
    weights of its quantised layers."""

    module: nn.Module
    tensors: list[Tensor]
    stays: bool = False
    trained: nn.Parameter | None = None  # this process' part, as the optimizer sees it
    part_held: Tensor | None = None
    flat: Tensor | None = None
    whole: Tensor | None = None
    gradient: Tensor | None = None  # whole, of the micro-batches so far
    in_backward: bool = False
    missing: set[int] = field(default_factory=set)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [t for t in self.tensors if isinstance(t, nn.Parameter)]

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in self.tensors if t.is_floating_point()), torch.uint8)

    @property
    def trains(self) -> bool:
        return any(t.requires_grad for t in self.tensors)

    @property
    def numbers(self) -> int:
        """Numbers of the unit's format that its tensors take."""
        return sum(t.nbytes for t in self.tensors) // self.dtype.itemsize

    @property
    def trained_numbers(self) -> int:
        return sum(t.numel() for t in self.tensors if t.requires_grad)

    def part(self, ranks: int) -> int:
        return -(-self.numbers // ranks)


class ShardedModel:
    """The hooks of a model's units, for one step under `trace`. parts: what the optimizer holds."""

    def __init__(
        self, trace: Trace, model: nn.Module, layers: Iterable[nn.Module], sharding: Sharding
    ) -> None:
        self.trace, self.sharding = trace, sharding
        self._layers = list(layers)
        self.units = _units(model, self._layers, sharding)
        self._uncollected: list[Tensor] = []
        self._order: list[Unit] = []
        self._last_flat: Tensor | None = None
        self._sent: Tensor | None = None
        self._hold()
        for unit in self.units:
            self._hook(unit)

    @property
    def parts(self) -> list[nn.Parameter]:
        return [unit.trained for unit in self.units if unit.trained is not None]

    # -- what each process holds --------------------------------------------------------------------------

    def _hold(self) -> None:
        """Weights count by this process' part. Before the trace has seen the model."""
        for unit in self.units:
            self.trace.hold(unit.tensors, "communication")
        for record in self.trace.timeline.records:
            if record.category == "communication":
                record.num_bytes, record.category = 0, "weights"
        for unit in self.units:
            dtype = self.sharding.stored if unit.trains and self.sharding.stored else unit.dtype
            part = torch.empty(unit.part(self.sharding.ranks), dtype=dtype)
            self.trace.hold([part], "weights")
            unit.part_held = part
            if unit.trains:
                # FSDP1 may mix what is trained and what is not in one flat parameter.
                unit.trained = nn.Parameter(part[: -(-unit.trained_numbers // self.sharding.ranks)])
                if self.sharding.accumulates:
                    unit.gradient = self._made(unit)
                    self.trace.hold([unit.gradient], "gradients")

    # -- hooks --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The forward pass starts: the root is gathered, and stays."""
        self._gather(self._root, forward=True)

    def turn(self) -> None:
        """The backward pass starts: what the last layer needs is gathered while the loss goes back."""
        self._order.append(self._root)
        self._enter_backward(self._root)

    @property
    def _root(self) -> Unit:
        return self.units[-1]

    def _hook(self, unit: Unit) -> None:
        if unit is not self._root:
            unit.module.register_forward_pre_hook(self._before(unit), with_kwargs=True)
            unit.module.register_forward_hook(self._after(unit))
        self._await_gradients(unit)
        for number, parameter in enumerate(unit.parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient(unit, number))

    def _await_gradients(self, unit: Unit) -> None:
        unit.missing = {n for n, p in enumerate(unit.parameters) if p.requires_grad}

    def _before(self, unit: Unit) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            if unit.in_backward:
                return
            self._gather(unit, forward=True)
            inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
            if not unit.trains and inputs:
                register_multi_grad_hook(inputs, self._passed(unit, inputs))

        return hook

    def _passed(self, unit: Unit, inputs: list[Tensor]) -> Any:
        """A frozen unit is freed when its inputs' gradients are there. FSDP1's hook for it refers to itself
        by way of the recomputed layer's inputs: these and their gradients stay until garbage is collected.
        """

        def hook(grads: Sequence[Tensor | None]) -> None:
            unit.whole = None
            if self.sharding.kind == "fsdp1" and unit.module in self._layers:
                self._uncollected += [*inputs, *(grad for grad in grads if grad is not None)]

        return hook

    def _after(self, unit: Unit) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            if unit.in_backward:
                return
            if unit not in self._order:
                self._order.append(unit)
            if not unit.stays and self.trace.phase == "forward":
                unit.whole = None
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor) and first.requires_grad:
                first.register_hook(lambda _: self._enter_backward(unit))

        return hook

    def _enter_backward(self, unit: Unit) -> None:
        if unit.in_backward:
            return
        unit.in_backward = True
        self._last_flat = None
        self._gather(unit, forward=False)
        place = self._order.index(unit)
        if place:
            self._prefetch(self._order[place - 1])

    def _prefetch(self, unit: Unit) -> None:
        if unit.whole is not None or unit.in_backward:
            return
        if self.sharding.kind == "fsdp2":
            unit.flat = self._collective(unit)
        else:
            self._gather(unit, forward=False)

    def _gather(self, unit: Unit, *, forward: bool) -> None:
        if unit.whole is not None:
            return
        if self.sharding.kind != "fsdp2":
            own = self._cast(unit)
            unit.whole = self._made(unit)
            del own
            return
        flat = unit.flat
        if flat is None:
            own = self._cast(unit)
            flat = self._collective(unit)
            del own
        unit.flat, self._last_flat = None, None
        unit.whole = self._made(unit)
        # The collective's result lives on in the forward pass until the next unit's has been copied out.
        self._last_flat = flat if forward else None

    def _collective(self, unit: Unit) -> Tensor:
        result = self._made(unit)
        self._on_own_stream()
        return result

    def _on_own_stream(self) -> None:
        """Mark what was made last: its block belongs to a collective's stream, nobody else reuses it."""
        self.trace.timeline.records[-1].maker = COLLECTIVE

    def _cast(self, unit: Unit) -> Tensor | None:
        if unit.trained is None or unit.trained.dtype == unit.dtype:
            return None
        return torch.empty(unit.part(self.sharding.ranks), dtype=unit.dtype)

    def _made(self, unit: Unit, dtype: torch.dtype | None = None) -> Tensor:
        whole = torch.empty(unit.part(self.sharding.ranks) * self.sharding.ranks, dtype=dtype or unit.dtype)
        self.trace.hold([whole], "communication")
        return whole

    # -- gradients ----------------------------------------------------------------------------------------

    def _gradient(self, unit: Unit, number: int) -> Any:
        def hook(_: Any) -> None:
            unit.missing.discard(number)
            if not unit.missing:
                self._reduce(unit)

        return hook

    def _reduce(self, unit: Unit) -> None:
        """Every gradient of the unit is there: sum them over the processes, keep this one's part."""
        trained, sharding = unit.trained, self.sharding
        if trained is None:
            return
        if sharding.kind == "fsdp2":
            unit.whole = None
            self._sent = None
        sent = self._made(unit, sharding.reduced)
        for parameter in unit.parameters:
            parameter.grad = None
        unit.gradient = None
        received = torch.empty(unit.part(sharding.ranks), dtype=sent.dtype)
        self._on_own_stream()
        unit.whole = None
        if sharding.kind == "fsdp2":
            self._sent = sent
        del sent
        own = received if received.dtype == trained.dtype else received.to(trained.dtype)
        self.trace.hold([own], "gradients")
        trained.grad = own[: trained.numel()]

    def finish(self) -> None:
        """The backward pass is over: nothing stays gathered."""
        self._last_flat = self._sent = None
        self._uncollected.clear()
        for unit in self.units:
            unit.whole = unit.flat = None
            unit.in_backward = False
            self._await_gradients(unit)


def _units(model: nn.Module, layers: Sequence[nn.Module], sharding: Sharding) -> list[Unit]:
    """The units of `model`, the innermost first: each decoder layer and the rest, under FSDP1 also every
    trained linear layer of an adapter (PEFT's policy)."""
    found: list[Unit] = []
    taken: set[int] = set()
    for module in [*_adapters(model, sharding), *_embedding(model, sharding), *layers, model]:
        tensors = [t for t in _tensors(module) if id(t) not in taken]
        taken.update(id(t) for t in tensors)
        if tensors:
            found.append(Unit(module, tensors, stays=module is model))
    if sharding.keeps_last:
        next(unit for unit in found if unit.module is layers[-1]).stays = True
    return found


def _embedding(model: nn.Module, sharding: Sharding) -> list[nn.Module]:
    return [module for module in model.children() if isinstance(module, nn.Embedding) and sharding.apart]


def _tensors(module: nn.Module) -> list[Tensor]:
    packed = (getattr(each, "packed", None) for each in module.modules())
    return [*module.parameters(), *(tensor for tensor in packed if isinstance(tensor, Tensor))]


def _adapters(model: nn.Module, sharding: Sharding) -> list[nn.Module]:
    if sharding.kind != "fsdp1" or all(p.requires_grad for p in model.parameters()):
        return []
    return [
        module
        for module in model.modules()
        if not list(module.children()) and getattr(getattr(module, "weight", None), "requires_grad", False)
    ]


def reserved_bytes(timeline: Timeline, *, expandable: bool = False) -> int:
    """What torch's allocator keeps. Collectives have streams of their own, whose blocks stay theirs."""
    pools: tuple[list[Event], list[Event]] = [], []
    for event in timeline.events():
        pools[timeline.records[event[1]].maker == COLLECTIVE].append(event)
    return sum(simulate(pool, expandable_segments=expandable).reserved_bytes for pool in pools)

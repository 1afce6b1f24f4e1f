"""The engines of several processes as they are traced: one process of them, the others imagined.

torch's "fake" process group answers every message at once and sends none, so the real engines, sharding and
buckets included, run for any number of processes in this one. It is rank 0 that is planned: it has the
largest shards, and it alone gathers what a checkpoint holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from tunesmith.core.errors import UserError
from tunesmith.plan.host_memory import staging_blocks
from tunesmith.plan.timeline import Place
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.train.activations import MIN_OFFLOAD_BYTES
from tunesmith.train.deepspeed_engine import BUCKET_ELEMENTS
from tunesmith.train.engines import SHARDED, make_engine
from tunesmith.train.fsdp import FsdpEngine
from tunesmith.train.group import leave_group
from tunesmith.train.objective import Objective
from tunesmith.train.offload import OffloadedAdamW
from tunesmith.train.parallel import DdpEngine
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.plan_zero import (
    TracedZero,
    imagined_deepspeed,
    name_gathered,
    name_parts,
    saved,
)

Device = Literal["cpu", "cuda"]


@contextmanager
def imagined_group(recipe: Recipe, trace: Trace, device: Device, *, nodes: int = 1) -> Iterator[Ranks]:
    """Rank 0 of the resolved recipe's processes, on `nodes` machines; `trace` sees what they send each other
    and when shards are gathered.

    Raises UserError where this process is already one of several: it has one process group at a time.
    """
    here = recipe.hardware.processes
    assert here != "auto"
    ranks = Ranks(0, here * nodes, 0, here)
    if recipe.parallel.engine == "single":
        yield ranks
        return
    if dist.is_initialized():
        raise UserError(
            "the memory of several processes cannot be planned by one that has joined them",
            hint="plan before the processes meet",
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with _disable_current_modes():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks.size)
    in_host = device == "cuda" and recipe.parallel.offload == "parameters"
    bucket = BUCKET_ELEMENTS if recipe.parallel.engine == "deepspeed" else 0
    trace.listeners.append(Messages(trace, "pinned" if in_host else "device", bucket))
    zero = imagined_deepspeed() if recipe.parallel.engine == "deepspeed" else nullcontext()
    try:
        with following(trace), zero, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.distributed")  # of renamed and of viewed tensors
            yield ranks
    finally:
        leave_group()


class Messages:
    """Names what is sent, and what sharded weights are gathered into. grads_in: where the sums of gradients
    end; bucket: elements of the buffers in which DeepSpeed sends."""

    def __init__(self, trace: Trace, grads_in: Place, bucket: int) -> None:
        self.trace, self.grads_in, self.bucket = trace, grads_in, bucket

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func is torch.ops.aten.empty.memory_format:
            if out.numel() == self.bucket:
                self.trace.hold([out], "communication")
        elif func.namespace == "c10d":
            self.trace.hold(_tensors(args), "communication")
            if func.name() == "c10d::_reduce_scatter_base_" and not self.bucket:
                self.trace.hold([args[0]], "gradients", self.grads_in)
        elif func.name() == "fsdp::split_with_sizes_copy":
            self.trace.hold(kwargs["out"], "weights")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextmanager
def following(trace: Trace) -> Iterator[None]:
    """Tell `trace` of storages that are resized where they are: no operation does it, and FSDP2 frees a
    layer's gathered weights so."""
    kind: Any = torch.UntypedStorage
    resize = kind.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        found = resize(storage, size)
        trace.resized(storage)
        return found

    kind.resize_ = resize_
    try:
        yield
    finally:
        kind.resize_ = resize


def traced_engine(
    model: Any, objective: Objective, recipe: Recipe, ranks: Ranks, trace: Trace, device: Device
) -> Any:
    """The recipe's engine around `model`, of fake tensors; what it holds is named, and lies in its place."""
    offload = TracedOffload(model, trace) if recipe.train.activation_offload else None
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"activation_offload": False})}
    )
    if recipe.parallel.engine == "deepspeed":
        engine: Any = _traced_zero(model, objective, _on(recipe, device), ranks, trace)
    else:
        engine = _traced_engine(model, objective, recipe, ranks, trace, device)
    (engine.single if isinstance(engine, DdpEngine) else engine).offload = offload
    return engine


def _traced_engine(
    model: Any, objective: Objective, recipe: Recipe, ranks: Ranks, trace: Trace, device: Device
) -> Any:
    engine: Any = make_engine(model, objective, _on(recipe, "cpu"), ranks)
    if isinstance(engine, DdpEngine):
        engine.buckets.overlap = device == "cuda"
    in_host = recipe.parallel.offload == "parameters" and device == "cuda"
    trace.hold((_local(p) for p in model.parameters()), "weights", "pinned" if in_host else "device")
    place = updated_on(recipe, device)
    for values in optimizer_of(engine).state.values():
        trace.hold((v for v in values.values() if isinstance(v, Tensor)), "optimizer state", place)
    return engine


class TracedOffload:
    """As `train.activations.OffloadedActivations` on a GPU, whose copies are in pinned memory."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def context(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, bool]:
        if tensor.nbytes < MIN_OFFLOAD_BYTES or tensor.untyped_storage()._cdata in self.weights:
            return tensor, False
        with self.trace.on("pinned"):
            return tensor.new_empty(tensor.shape), True

    def _unpack(self, packed: tuple[Tensor, bool]) -> Tensor:
        tensor, is_away = packed
        return torch.empty_like(tensor) if is_away else tensor


def _on(recipe: Recipe, device: Device) -> Recipe:
    hardware = recipe.hardware.model_copy(update={"device": device})
    return recipe.model_copy(update={"hardware": hardware})


def _traced_zero(model: Any, objective: Objective, recipe: Recipe, ranks: Ranks, trace: Trace) -> Any:
    engine = TracedZero(model, objective, recipe, ranks)
    name_parts(engine, trace, recipe.parallel.offload if recipe.hardware.device == "cuda" else "none")
    name_gathered(engine, trace)
    return engine


def learns_an_order(recipe: Recipe) -> bool:
    """Whether a step takes other memory than the first. ZeRO-3 learns in the trial which weights come next,
    gathers ahead from then on, and after an update gathers small weights and keeps them whole."""
    return recipe.parallel.engine == "deepspeed" and recipe.parallel.zero_stage == 3


def leaves_gradients(recipe: Recipe) -> bool:
    """Whether one micro-batch of a step finds the gradients of another, and both are in this process alone:
    the first then never holds more than the second, which tells all."""
    return recipe.parallel.engine == "single" and recipe.train.grad_accumulation > 1


def passes_of(recipe: Recipe, processes: int) -> int:
    """Micro-batches to trace, after which a step's memory is no more than it was: two, where one process of
    several has so many of a step."""
    several = -(-recipe.train.grad_accumulation // processes)
    return 1 if recipe.parallel.engine == "single" else min(2, several)


def loaded_on(recipe: Recipe, device: Device) -> Place:
    """Where the model's weights are read: what will be sharded, in every process's host memory."""
    return "host" if recipe.parallel.engine in SHARDED and device == "cuda" else "device"


def updated_on(recipe: Recipe, device: Device) -> Place:
    """Where the optimizer computes."""
    return "host" if device == "cuda" and offloads_optimizer(recipe) else "device"


@contextmanager
def updating(engine: Any, recipe: Recipe, trace: Trace, device: Device) -> Iterator[None]:
    """What an update makes is made where the optimizer computes; what goes there and back is pinned."""
    optimizer = optimizer_of(engine)
    staged: list[Tensor] = []
    if device == "cuda" and isinstance(optimizer, OffloadedAdamW):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        sizes = [p.numel() * p.element_size() for p in trained]
        with trace.on("pinned"):
            staged = [torch.empty(size, dtype=torch.uint8) for size in staging_blocks(sizes, sizes)]
    with trace.on(updated_on(recipe, device)):
        yield
    del staged


def offloads_optimizer(recipe: Recipe) -> bool:
    return recipe.train.optimizer == "adamw-offload" or recipe.parallel.offload != "none"


def optimizer_of(engine: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = (
        engine.single.optimizer if isinstance(engine, DdpEngine) else engine.optimizer
    )
    return found


def _local(parameter: Tensor) -> Tensor:
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def trace_save(engine: Any, trace: Trace, device: Device) -> None:
    """What rank 0 gathers for a checkpoint, tensor after tensor, into host memory."""
    trace.at("save")
    copies = HostCopies(trace, "host" if device == "cuda" else "device")
    if isinstance(engine, FsdpEngine):
        kept = [copies.take(engine.shards.whole(name, value)) for name, value in _saved(engine)]
    elif isinstance(engine, TracedZero):
        kept = saved(engine, copies)
    elif device == "cuda":
        kept = _whole_copies(engine, copies)
    else:
        return
    del kept


def _whole_copies(engine: Any, copies: HostCopies) -> list[Tensor]:
    """What a process that holds the whole model copies from its GPU: the weights, and when they are written
    the averages, unless they are in host memory."""
    adapted = hasattr(engine.model, "peft_config")
    weights = [copies.take(p) for p in engine.model.parameters() if p.requires_grad or not adapted]
    optimizer = optimizer_of(engine)
    del weights
    if isinstance(optimizer, OffloadedAdamW):
        return []
    values = (value for state in optimizer.state.values() for value in state.values())
    return [copies.take(value) for value in values if isinstance(value, Tensor)]


class HostCopies:
    """Copies in host memory, as `train.gathered.HostCopies`."""

    def __init__(self, trace: Trace, place: Place) -> None:
        self.trace, self.place = trace, place

    def take(self, whole: Tensor) -> Tensor:
        with self.trace.on(self.place):
            return whole.detach().clone()


def _saved(engine: FsdpEngine) -> Iterator[tuple[str, Tensor]]:
    """As `train.gathered.gather` takes them: weights, then averages."""
    adapted = hasattr(engine.model, "peft_config")
    local = engine.shards.local
    yield from ((name, p.detach()) for name, p in local.items() if p.requires_grad or not adapted)
    for name, parameter in local.items():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if key != "master" and value.dim():
                yield name, value

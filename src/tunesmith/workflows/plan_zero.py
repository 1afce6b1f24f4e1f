"""DeepSpeed's engine as it is traced: the real one, on fake tensors and in an imagined process group.

Its package must be installed. It computes as on a CPU, whatever is pretended: its own switches for a GPU, the
second bucket beside one that is being sent among them, are in the configuration that it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from torch import Tensor, nn

from tunesmith.core.errors import MissingExtra
from tunesmith.core.optional import load
from tunesmith.model.attention import unwrapped
from tunesmith.model.shape import decoder_layers
from tunesmith.plan.timeline import Place
from tunesmith.plan.trace import Trace
from tunesmith.train.deepspeed_engine import MOMENTS, DeepSpeedEngine

# Modules of deepspeed that keep process groups and the like for the life of a process.
KEPT = ("deepspeed.comm.comm", "deepspeed.utils.groups", "deepspeed.accelerator.real_accelerator")
COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
OPTIMIZERS = ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2")


@contextmanager
def imagined_deepspeed() -> Iterator[None]:
    """Within it deepspeed uses the process group that is there now and asks no other rank whether it agrees;
    afterwards it is as it was. Raises MissingExtra."""
    try:
        kept = [load(name) for name in (*KEPT, COORDINATOR, *OPTIMIZERS)]
        cpu = load("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator()
    except ImportError:
        raise MissingExtra("deepspeed", "deepspeed") from None
    before = [dict(vars(module)) for module in kept]
    comm, _, accelerator, coordinator, *_ = kept
    comm.cdb, accelerator.ds_accelerator = None, cpu
    coordinator.assert_ints_same_as_other_ranks = _agreed
    try:
        with redirect_stdout(sys.stderr):  # it prints
            yield
    finally:
        for module, values in zip(kept, before, strict=True):
            vars(module).update(values)


def _agreed(ints: list[int]) -> None:
    """The other ranks are imagined, and of fake tensors none has a value to compare."""


class TracedZero(DeepSpeedEngine):
    """ZeRO on fake tensors."""

    def _initialize(self, module: Any, recipe: Any) -> Any:
        # A fake tensor cannot be moved in place, and there is no other device to move it to.
        module.to = lambda *_: module
        zero = super()._initialize(module, recipe)
        zero.optimizer.has_overflow = self._is_dropped
        for name in OPTIMIZERS:  # `imagined_deepspeed` puts back what was there
            load(name).is_invalid_grad_norm = self._is_dropped
        return zero

    def _is_dropped(self, *_: Any, **__: Any) -> bool:
        """Gradients of fake tensors have no values, and a norm that is found invalid would end every update
        before it begins. Only those of a pass without `begin` are to be dropped."""
        return not self._begun


def name_parts(engine: TracedZero, trace: Trace, offload: str) -> None:
    """Give what DeepSpeed holds between steps its category, and its place. offload: as in the recipe, "none"
    too where it computes on a CPU."""
    zero = engine.zero.optimizer
    in_host, all_in_host = offload != "none", offload == "parameters"
    weights: Place = "pinned" if all_in_host else "device"
    trace.hold((getattr(p, "ds_tensor", p) for p in engine.model.parameters()), "weights", weights)
    trace.hold(_lists(zero, "param_groups_fp16_flat_cpu_memory"), "weights", weights)
    states: Place = "pinned" if in_host else "device"
    trace.hold(engine._flat(), "optimizer state", states)
    trace.hold(_lists(zero, "param_buffer_of_bit16_for_cpu_offload_groups"), "optimizer state", states)
    trace.hold([getattr(zero, "temp_grad_buffer_for_cpu_offload", None)], "gradients", states)
    trace.hold([flat.grad for flat in engine._flat()], "gradients", states)
    trace.hold([getattr(zero, "grad_partitions_flat_buffer", None)], "gradients", states)
    averages: Place = "host" if in_host else "device"
    trace.hold(
        (engine.optimizer.state[flat][name] for flat in engine._flat() for name in MOMENTS),
        "optimizer state",
        averages,
    )
    for bucket in zero.ipg_buckets.values():
        buffers = bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
        trace.hold(buffers, "communication")


def _lists(owner: Any, name: str) -> list[Tensor]:
    found: list[Tensor] = getattr(owner, name, [])
    return found


def name_gathered(engine: TracedZero, trace: Trace) -> None:
    """Name the weights that are gathered for a decoder layer's forward pass."""

    def named(layer: nn.Module, _: Any) -> None:
        trace.hold((p for p in layer.parameters() if p.dim()), "weights")

    # Of the layers alone: hooks inside of a layer would keep it from being fused.
    for layer in decoder_layers(unwrapped(engine.model)):
        layer.register_forward_pre_hook(named)


def saved(engine: TracedZero, copies: Any) -> list[Any]:
    """What `DeepSpeedEngine.write` takes into host memory, by `copies.take`."""
    adapted = hasattr(engine.model, "peft_config")
    kept = [p for p in engine.model.parameters() if p.requires_grad or not adapted]
    weights = [engine._weight(p, copies) for p in kept]
    averages = [copies.take(engine._moment(p, key)) for p in kept if p.requires_grad for key in MOMENTS]
    return [*weights, *averages]

"""Peak memory of a recipe's training, from the model's configuration and its largest batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunesmith.model.batch import IGNORE, Batch
from tunesmith.model.shape import has_equal_layers
from tunesmith.plan.allocator import round_block, simulate
from tunesmith.plan.memory import FRAGMENTATION, MemoryPlan, Peaks, Step, trace_step
from tunesmith.plan.sharding import few_layers
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.plan_step import RecipeStep, Work, layer_elements

MIB = 1 << 20
# CUDA's context with torch's kernels on an Ampere card or later; smaller on older ones.
CONTEXT_BYTES = 450 * MIB


def plan_memory(
    recipe: Recipe,
    config: Any,
    work: Work,
    *,
    device: Literal["cpu", "cuda"],
    exact: bool = True,
    context_bytes: int = CONTEXT_BYTES,
    listen: Callable[[Trace], None] | None = None,
) -> MemoryPlan:
    """What one process of the resolved recipe takes. config: of the model, as transformers has it.

    exact: every layer is traced, else a few, carried on to all where they are equal. context_bytes: of CUDA
    on the card. listen: is given every trace before its step runs. Raises UserError for what the recipe asks
    of the model and it has not.
    """
    peaks = trace_recipe(recipe, config, work, device=device, exact=exact, listen=listen)
    allocated, reserved = _of_allocator(peaks) if device == "cuda" else (peaks.bytes_in("device"),) * 2
    return MemoryPlan(
        device=device,
        moments=peaks.by_phase,
        live_bytes=peaks.timeline.peak().num_bytes if peaks.exact else peaks.bytes_in("device"),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        context_bytes=context_bytes if device == "cuda" else 0,
        margin_bytes=int(reserved * FRAGMENTATION) if device == "cuda" else 0,
        host_bytes=peaks.bytes_in("host"),
        pinned_bytes=peaks.bytes_in("pinned"),
        host_by_phase=peaks.host_by_phase,
        exact=peaks.exact,
    )


def _of_allocator(peaks: Peaks) -> tuple[int, int]:
    """(allocated, reserved) as torch's allocator on a card counts them; where only a few layers were traced,
    in the proportions in which they stand there."""
    use, traced = simulate(peaks.timeline.events()), peaks.timeline.peak(round_block).num_bytes
    share = peaks.bytes_in("device") / traced
    return round(use.allocated_bytes * share), round(use.reserved_bytes * share)


@dataclass(frozen=True)
class Heard:
    """A step whose trace is given to `listen` first."""

    step: RecipeStep
    listen: Callable[[Trace], None]

    def run(self, trace: Trace) -> None:
        self.listen(trace)
        self.step.run(trace)


def trace_recipe(
    recipe: Recipe,
    config: Any,
    work: Work,
    *,
    device: Literal["cpu", "cuda"],
    exact: bool,
    listen: Callable[[Trace], None] | None = None,
) -> Peaks:
    layers = config.get_text_config().num_hidden_layers
    exact = exact or not has_equal_layers(config, trust_remote_code=recipe.model.trust_remote_code)

    def make(number: int) -> Step:
        step = RecipeStep(recipe, config, work, layers=number, device=device)
        return step if listen is None else Heard(step, listen)

    sharded = recipe.parallel.engine == "deepspeed"  # elsewhere their size says nothing
    few = few_layers(recipe, layer_elements(recipe, config) if sharded else 0)
    return trace_step(make, layers, exact=exact, device=device, few=few)


def worst_batch(recipe: Recipe, *, supervised: float = 1.0) -> Batch:
    """The largest micro-batch that a resolved recipe allows: documents of max_length tokens.

    supervised: share of the tokens that have a label.
    """
    length, documents = recipe.data.max_length, recipe.train.micro_batch_size
    assert length != "auto" and documents != "auto"
    return full_batch(length, documents, supervised=supervised)


def full_batch(length: int, documents: int, *, supervised: float = 1.0) -> Batch:
    """A micro-batch of so many documents of `length` tokens, no two with a common beginning."""
    ids = np.arange(length * documents, dtype=np.int64)
    labels = ids.reshape(documents, length).copy()
    labels[:, : max(1, length - round(length * supervised))] = IGNORE
    starts = np.arange(documents + 1, dtype=np.int64) * length
    return Batch(ids, labels.ravel(), starts, tuple(range(documents)))

"""The probe: the recipe's own step with three decoder layers in place of all, timed on this machine.

Nothing is read of the model but its configuration: weights are random. Each layer's share is timed by itself,
and all layers but the first take as long as those behind it.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.model import attention
from tunesmith.model.batch import Batch, join
from tunesmith.model.quant import four_bit_tensors
from tunesmith.model.shape import decoder_layers, has_equal_layers, make_fake
from tunesmith.plan.duration import Arithmetic, Load
from tunesmith.recipe.schema import Recipe
from tunesmith.train.engine import SingleEngine
from tunesmith.train.speed import make_fast
from tunesmith.workflows.plan_step import Work, shape_of

Device = Literal["cpu", "cuda"]
Key = tuple[str, int | None]

# The first layer, whose input may need no gradient, and two like all others.
LAYERS = 3
# Steps after the one that warms up: as many as the given seconds allow, of these.
LEAST, MOST = 1, 5
# Steps of more arithmetic are cut: so much takes a second or two on a few cores, and on a card.
MOST_FLOPS: Mapping[Device, float] = {"cpu": 2.5e11, "cuda": 2.5e13}
LEAST_TOKENS = 128
BLOCK = 1 << 20
PARTS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Seconds on this machine with all layers: of a micro-batch of `load`, forward and in all, and of the
    optimizer's update."""

    load: Load
    forward_s: float
    pass_s: float
    update_s: float


def load_of(batch: Batch) -> Load:
    """What a micro-batch is to the model."""
    lengths = np.diff(batch.starts).astype(np.int64)
    return Load(tokens=batch.num_tokens, squares=int((lengths * lengths).sum()), labels=batch.num_supervised)


def probe(
    recipe: Recipe, config: Any, work: Work, arithmetic: Arithmetic, *, device: Device, budget_s: float
) -> Probed:
    """Time steps of the resolved recipe on `work`, for about `budget_s` seconds and at least two steps.

    config: of the model, as transformers has it; arithmetic: of all its layers. Weights, states and random
    numbers of this process are left as they are. Raises whatever the step raises.
    """
    total = config.get_text_config().num_hidden_layers
    equal = has_equal_layers(config, trust_remote_code=recipe.model.trust_remote_code)
    layers = min(LAYERS, total) if equal else total
    share, most = layers / total, MOST_FLOPS[device]
    # The second of two adds its gradients to those of the first.
    passes = min(2, recipe.train.grad_accumulation) if _flops(work.batch, arithmetic, share) < most / 2 else 1
    batch = within(work.batch, arithmetic, share, most)
    with apart(device):
        step = _Short(recipe, config, replace(work, batch=batch), layers=layers, device=device)
        found = _timed(step, passes, budget_s)
        return _carried(found, step, load_of(batch), passes, total)


def within(batch: Batch, arithmetic: Arithmetic, share: float, most_flops: float) -> Batch:
    """The batch, or of one that is too much a part of its tokens. share: of the layers that are there.
    Answers that share a prompt are not cut."""
    load, flops = load_of(batch), _flops(batch, arithmetic, share)
    tokens = max(LEAST_TOKENS, int(load.tokens * most_flops / flops)) if flops else load.tokens
    if batch.branches is not None or tokens >= load.tokens:
        return batch
    # Spread over all documents, so that as large a part of them has labels.
    lengths = np.diff(batch.starts)
    kept = [
        begin
        + np.linspace(0, length, num=max(2, length * tokens // batch.num_tokens), endpoint=False, dtype=int)
        for begin, length in zip(batch.starts, lengths, strict=False)
    ]
    return join([(batch.input_ids[at], batch.labels[at]) for at in kept], batch.rows)


def _flops(batch: Batch, arithmetic: Arithmetic, share: float) -> float:
    load = load_of(batch)
    layers = arithmetic.per_token * load.tokens + arithmetic.per_square * load.squares
    return arithmetic.per_label * load.labels + share * layers


@contextmanager
def apart(device: Device) -> Iterator[None]:
    """What is done within leaves no random number drawn and no memory taken."""
    cards = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cards):
            yield
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


# -- the step ------------------------------------------------------------------------------------------------


class _Short:
    """A step with a few layers, all of it real."""

    def __init__(self, recipe: Recipe, config: Any, work: Work, *, layers: int, device: Device) -> None:
        self.recipe, self.batch, self.clock = recipe, work.batch, Clock(device)
        model = shape_of(recipe, config, layers=layers, new_token_ids=work.new_token_ids)
        make_fake(model, device)
        fill(model)
        self.layers = decoder_layers(attention.unwrapped(model))
        for number, layer in enumerate(self.layers):
            self.clock.watch(layer, number)
        make_fast(model, recipe.train.model_copy(update={"compile": False}))
        model.train()
        self.model = model
        self.engine = SingleEngine(model, work.objective(model), recipe)

    def take(self, passes: int) -> dict[Key, float]:
        """Seconds of a step by phase and layer; None: what is of no layer."""
        engine, clock = self.engine, self.clock
        clock.at("update")
        engine.begin(0.0, 0)
        for number in range(passes):
            clock.at("forward")
            loss = engine.forward(self.batch)
            clock.at("backward")
            engine.backward(loss / max(1, passes * self.batch.num_supervised), last=number == passes - 1)
            float(loss.detach())
        clock.at("update")
        engine.update(divide_by=1.0, max_norm=self.recipe.train.max_grad_norm)
        engine.drop_gradients()
        return clock.stop()

    def growth(self, total: int) -> float:
        """Trained weights with `total` layers over those that are there."""
        here, of_layer = _trained([self.model]), _trained(self.layers[-1:])
        return (here + (total - len(self.layers)) * of_layer) / here


def _trained(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def fill(model: nn.Module) -> None:
    """Small random numbers in all weights and tables: memory that was never written to is not there yet, and
    what lies in it may be no number."""
    block = torch.randn(BLOCK) * 0.02
    for tensor in (*model.parameters(), *model.buffers(), *_tables(model)):
        flat = tensor.detach().view(-1)
        if not tensor.is_floating_point():
            flat.zero_()
            continue
        for at in range(0, flat.numel(), BLOCK):
            part = flat[at : at + BLOCK]
            part.copy_(block[: len(part)])


def _tables(model: nn.Module) -> Iterator[Tensor]:
    """Of four-bit weights, and of rotary embeddings."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
        yield from four_bit_tensors(module)[1:]


def _timed(step: _Short, passes: int, budget_s: float) -> dict[Key, float]:
    """The medians of some steps."""
    began = time.perf_counter()
    step.take(passes)
    once = time.perf_counter() - began
    count = min(MOST, max(LEAST, int(budget_s / once) - 1))
    found = [step.take(passes) for _ in range(count)]
    return {key: median(one.get(key, 0.0) for one in found) for key in found[0]}


def _carried(found: Mapping[Key, float], step: _Short, load: Load, passes: int, total: int) -> Probed:
    """Of all layers: those that are not there take as long as the ones behind the first."""
    behind = range(1, len(step.layers))

    def phase(name: str) -> float:
        here = phase_sum(found, name)
        each = fmean(found.get((name, number), 0.0) for number in behind) if behind else 0.0
        return here + (total - len(step.layers)) * each

    forward, backward = (phase(name) / passes for name in PARTS)
    update = step.growth(total) * phase_sum(found, "update")
    return Probed(load=load, forward_s=forward, pass_s=forward + backward, update_s=update)


def phase_sum(found: Mapping[Key, float], name: str) -> float:
    return sum(seconds for (wanted, _), seconds in found.items() if wanted == name)


# -- time ----------------------------------------------------------------------------------------------------


class Clock:
    """Where the time between marks goes; a card's by its own clock, without waiting for it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.phase = ""
        self._marks: list[tuple[Key, Any]] = []

    def at(self, phase: str, layer: int | None = None) -> None:
        """From now on the step is in this phase and layer."""
        self.phase = phase
        self._marks.append(((phase, layer), self._now()))

    def stop(self) -> dict[Key, float]:
        """Seconds of every phase and layer since the first mark, which are forgotten."""
        self.at("")
        if self.device == "cuda":
            torch.cuda.synchronize()
        found: dict[Key, float] = defaultdict(float)
        for (key, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            found[key] += self._between(began, ended)
        self._marks.clear()
        return dict(found)

    def watch(self, layer: nn.Module, number: int) -> None:
        """Mark the layer's beginning and end, forward and backward. The gradient of a layer's output is the
        one that its backward pass begins with; the first layer's ends with that of its input."""

        def before(_: Any, args: Any, kwargs: Any) -> None:
            if number == 0:
                self._when_back(args[0] if args else kwargs.get("hidden_states"), None)
            if self.phase == "forward":
                self.at("forward", number)

        def after(_: Any, args: Any, out: Any) -> None:
            self._when_back(out[0] if isinstance(out, tuple) else out, number)
            if self.phase == "forward":
                self.at("forward")

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after)

    def _when_back(self, tensor: Any, layer: int | None) -> None:
        # A layer that is computed again runs its forward hooks in the backward pass.
        if isinstance(tensor, Tensor) and tensor.requires_grad and self.phase == "forward":
            tensor.register_hook(lambda _: self.at("backward", layer))

    def _now(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, began: Any, ended: Any) -> float:
        return float(ended - began) if self.device == "cpu" else float(began.elapsed_time(ended)) / 1000

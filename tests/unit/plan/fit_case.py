"""A recipe, and a rule of thumb for what it needs, for tests of what is done with needs."""

from __future__ import annotations

from typing import Any

from tunesmith.core.units import GIB
from tunesmith.plan.fit import Target
from tunesmith.recipe.load import check
from tunesmith.recipe.resolve import Facts, resolve
from tunesmith.recipe.schema import Recipe

KEPT = {"none": 34, "selective": 20, "full": 2}  # bytes a layer keeps of a token's every number


def recipe(**sections: Any) -> Recipe:
    data = {"sources": [{"path": "a", "format": "text"}]} | sections.pop("data", {})
    return check({"model": {"path": "x"}, "data": data} | sections, "r")


class Thumb:
    """16 bytes a trained weight and what `KEPT` says of activations. asked: the recipes, in order."""

    def __init__(self, weights: float = 0.5e9, layers: int = 24, hidden: int = 1024) -> None:
        self.weights, self.layers, self.hidden = weights, layers, hidden
        self.asked: list[Recipe] = []

    def __call__(self, resolved: Recipe) -> int:
        self.asked.append(resolved)
        train, length = resolved.train, resolved.data.max_length
        assert length != "auto" and train.micro_batch_size != "auto"
        numbers = length * train.micro_batch_size * self.hidden
        assert not isinstance(train.gradient_checkpointing, bool)
        kept = (
            KEPT[train.gradient_checkpointing]
            * numbers
            * self.layers
            * (0.1 if train.activation_offload else 1)
        )
        return int(self._states(resolved) + kept + 34 * numbers)

    def _states(self, resolved: Recipe) -> float:
        train, kind = resolved.train, resolved.method.type
        if kind != "full":
            return self.weights * (2 if kind == "lora" else 0.6) + self.weights * 0.01 * 16
        each = 2 if train.precision == "bf16-pure" else 4
        averages = {"adamw": 2 * each, "adamw-8bit": 2, "adamw-offload": 0}[train.optimizer]
        gradients = 0.2 * each if train.optimizer_in_backward else each
        shards = 2 if resolved.parallel.engine == "fsdp" else 1
        return self.weights * (each + gradients + averages) / shards


def facts(device: Any = "cuda", precision: Any = "bf16", processes: int = 1) -> Facts:
    return Facts(
        context_length=32768,
        device=device,
        threads=2,
        precision=precision,
        serve_precision="bf16",
        processes=processes,
    )


def target(gib: float, need: Thumb, found: Facts | None = None, **more: Any) -> Target:
    known = found or facts()
    return Target(
        capacity_bytes=int(gib * GIB), resolve=lambda given: resolve(given, known), need=need, **more
    )

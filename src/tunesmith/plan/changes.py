"""What can be changed in a recipe so that it needs less memory, and what each change costs.

An axis is a list of options in order of what they save, the first of which keeps the recipe as it is. An
option's time factor and its `touched` are judgements for ordering, not predictions: `touched` is 0 for the
same mathematics, and larger the further what is learned departs from what the recipe asks for, so that every
combination of one method comes before the next method, and every method before shorter rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.recipe.schema import Recipe

SHARDED = ("fsdp", "deepspeed")
SHORTEST = 128
SHORTER = (0.75, 0.5, 0.375, 0.25, 0.125)


@dataclass(frozen=True)
class Option:
    """One choice on an axis. settings: {key: value} of the recipe; slower: time over that of keeping;
    touched: how far the mathematics departs; note: what a person should know of it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    slower: float = 1.0
    touched: float = 0.0
    note: str = ""

    @property
    def cost(self) -> float:
        return math.log(self.slower) + self.touched


KEEP = Option()


def applied(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with each `section.key` set; what was not given stays not given."""
    values = recipe.model_dump(exclude_unset=True)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def value_of(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


# -- what changes the work: one family of candidates for each combination ---------------------------------


def methods(recipe: Recipe, resolved: Recipe) -> list[Option]:
    """Adapters in place of all weights, and a base in 4 bits under them."""
    kind = resolved.method.type
    lora: dict[str, Any] = {"method.type": "lora"}
    if kind == "full":
        lora |= {"train.lr": "auto"} if recipe.train.lr != "auto" else {}
        lora |= {"method.freeze": []} if recipe.method.freeze else {}
    found = [KEEP]
    if kind == "full":
        found.append(Option(lora, 0.75, 1.6, "adapters are trained in place of all weights"))
    if kind in ("full", "lora"):
        note = "the base is rounded to 4 bits; adapters are trained over it"
        found.append(Option(lora | {"method.type": "qlora"}, 1.0 if kind == "full" else 1.3, 2.4, note))
    return found


def layouts(resolved: Recipe, gpus: int) -> list[Option]:
    """Weights sharded over processes. gpus: how many there are."""
    engine, processes = resolved.parallel.engine, resolved.hardware.processes
    assert processes != "auto"
    if resolved.hardware.device == "cpu" or engine in SHARDED or gpus < 2:
        return [KEEP]
    settings: dict[str, Any] = {"parallel.engine": "fsdp"}
    if processes < gpus:
        settings["hardware.processes"] = gpus
    note = f"weights, gradients and averages are sharded over {gpus} GPUs"
    # After what the same GPUs do without: more of them are more than a change of the recipe.
    return [KEEP, Option(settings, 1.1, 0.0 if processes == gpus else 1.3, note)]


# -- what changes the memory: the axes of a family ----------------------------------------------------------


def axes(recipe: Recipe, resolved: Recipe) -> list[list[Option]]:
    """Every axis of a recipe; each option saves at least as much as those before it."""
    return [
        checkpointing(resolved),
        micro_batches(resolved),
        states(recipe, resolved),
        activation_offload(resolved),
        lengths(resolved),
    ]


def checkpointing(resolved: Recipe) -> list[Option]:
    """Activations computed again: what is cheap of a layer, or all of it (Chen et al. 2016,
    arXiv:1604.06174: one more forward pass, a third of the time)."""
    key, now = "train.gradient_checkpointing", resolved.train.gradient_checkpointing
    found = [KEEP]
    if now == "none":
        found.append(Option({key: "selective"}, 1.07))
    if now in ("none", "selective"):
        found.append(Option({key: "full"}, 1.33 if now == "none" else 1.25))
    return found


def micro_batches(resolved: Recipe) -> list[Option]:
    """Fewer rows at a time, more times: the same step."""
    size, count = resolved.train.micro_batch_size, resolved.train.grad_accumulation
    assert size != "auto"
    smaller = [number for number in range(size - 1, 0, -1) if size % number == 0]
    return [KEEP] + [
        Option(
            {"train.micro_batch_size": number, "train.grad_accumulation": count * size // number},
            1.0 + 0.02 * math.log2(size / number),
        )
        for number in smaller
    ]


def states(recipe: Recipe, resolved: Recipe) -> list[Option]:
    """Number formats and places of weights, gradients and averages."""
    train = resolved.train
    half = [Option({"train.precision": "auto"}, 1.0, 0.1)] if train.precision == "fp32" else []
    if resolved.parallel.engine in SHARDED:
        return [KEEP, *half, *_sharded_states(resolved)]
    if resolved.method.type != "full":
        return [KEEP, *half]
    return [KEEP, *half, *_full_states(recipe, resolved)]


def _full_states(recipe: Recipe, resolved: Recipe) -> list[Option]:
    """From 16 bytes a weight (fp32 weights and averages) down to 4."""
    train = resolved.train
    rounding = "bf16 weights, rounded by chance"
    eight = {"train.optimizer": "adamw-8bit"}
    pure = {"train.precision": "bf16-pure", "train.stochastic_rounding": True}
    small = train.precision in ("bf16", "bf16-pure")
    found = []
    if train.optimizer == "adamw":
        found.append(Option(eight, 1.03, 0.3, "the optimizer's averages are kept to about 1%"))
    if train.precision == "bf16":
        found.append(Option(pure, 1.03, 0.4, rounding))
    if small and train.optimizer == "adamw":
        found.append(Option(pure | eight, 1.05, 0.5, f"{rounding}; averages of 8 bits"))
    if resolved.hardware.device == "cuda" and train.optimizer != "adamw-offload":
        offload = {"train.optimizer": "adamw-offload", "train.stochastic_rounding": False}
        offload |= {"train.precision": "bf16-pure"} if small else {}
        note = "fp32 weights and averages in host memory: 12 bytes a weight there"
        found.append(Option(offload, 1.5, 0.2, note))
    if small and resolved.parallel.engine == "single" and train.optimizer_in_backward is not True:
        smallest = pure | eight | {"train.optimizer_in_backward": True}
        smallest |= {"train.max_grad_norm": None} if recipe.train.max_grad_norm is not None else {}
        note = f"{rounding}; averages of 8 bits; weights updated in the backward pass, without clipping"
        found.append(Option(smallest, 1.05, 0.8, note))
    return found


def _sharded_states(resolved: Recipe) -> list[Option]:
    offload, found = resolved.parallel.offload, []
    whole: dict[str, Any] = {"parallel.zero_stage": 3} if resolved.parallel.zero_stage == 2 else {}
    if whole:
        found.append(Option(whole, 1.2))
    if offload == "none":
        found.append(Option(whole | {"parallel.offload": "optimizer"}, 1.5, 0.0, "averages in host memory"))
    if offload in ("none", "optimizer"):
        note = "weights and averages in host memory"
        found.append(Option(whole | {"parallel.offload": "parameters"}, 2.5, 0.0, note))
    return found


def activation_offload(resolved: Recipe) -> list[Option]:
    """What the backward pass needs, in host memory: copies over the bus, there and back."""
    if resolved.hardware.device == "cpu" or resolved.train.activation_offload:
        return [KEEP]
    return [KEEP, Option({"train.activation_offload": True}, 1.4, 0.0, "activations in host memory")]


def lengths(resolved: Recipe) -> list[Option]:
    """Shorter rows, which lose data: the last resort."""
    length = resolved.data.max_length
    assert length != "auto"
    shorter = sorted({int(length * share) // 64 * 64 for share in SHORTER} - {0}, reverse=True)
    note = "rows that are longer are lost or cut (data.too_long)"
    return [KEEP] + [
        Option({"data.max_length": number}, 1.0, 4.0 + step, note)
        for step, number in enumerate(shorter)
        if SHORTEST <= number < length
    ]

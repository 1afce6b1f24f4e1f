"""Settings of `method` that cannot work together: each named before anything is loaded."""

from __future__ import annotations

from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.recipe.schema import Recipe


def check_method(recipe: Recipe) -> None:
    """Raise UserError, RecipeErrors for several, for settings that would have no effect or cannot work."""
    faults = _only_for_adapters(recipe) if recipe.method.type == "full" else _only_for_full(recipe)
    faults += _whole_4_bits(recipe) if recipe.method.type == "qlora" else []
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise RecipeErrors(list(faults))


def _only_for_adapters(recipe: Recipe) -> list[UserError]:
    given = recipe.method
    used = {
        "rslora": given.rslora,
        "dora": given.dora,
        "lora_plus_ratio": given.lora_plus_ratio is not None,
        "modules_to_save": bool(given.modules_to_save),
    }
    return [
        UserError(
            f"method.{name}: is of adapters, but method.type is full",
            hint=f"take method.type: lora, or leave method.{name} out",
        )
        for name, wanted in used.items()
        if wanted
    ]


def _only_for_full(recipe: Recipe) -> list[UserError]:
    method = recipe.method
    if not method.freeze:
        return []
    return [
        UserError(
            f"method.freeze: {method.type} freezes all of the base model already",
            hint="leave method.freeze out; which layers get an adapter is method.targets",
        )
    ]


def _whole_4_bits(recipe: Recipe) -> list[UserError]:
    parallel = recipe.parallel
    shards = parallel.engine == "fsdp" or (parallel.engine == "deepspeed" and parallel.zero_stage == 3)
    if not shards:
        return []
    stage = " with zero_stage 3" if parallel.engine == "deepspeed" else ""
    return [
        UserError(
            f"parallel.engine: {parallel.engine}{stage} shards weights, and those of qlora's base are stored "
            "in 4 bits, which cannot be sharded",
            hint="take parallel.engine: ddp (4 bits a weight fit on every GPU), or method.type: lora",
        )
    ]

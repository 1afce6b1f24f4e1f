"""What of an engine's sharding a plan must know beforehand: how few layers behave as many do."""

from __future__ import annotations

import math

from tunesmith.plan.memory import FEW
from tunesmith.recipe.schema import Recipe

# DeepSpeed's default of `stage3_max_reuse_distance`, in elements: weights that are needed again within so
# many are not given back. Our configuration leaves it as it is.
REUSE_ELEMENTS = 1_000_000_000


def few_layers(recipe: Recipe, layer_elements: int) -> tuple[int, int]:
    """Two numbers of decoder layers between which memory grows as it does from there on.

    Two layers at both ends do, but for ZeRO-3, which gives no layer back before their elements reach its
    reuse distance. layer_elements: of one decoder layer.
    """
    if recipe.parallel.engine != "deepspeed" or recipe.parallel.zero_stage != 3 or not layer_elements:
        return FEW
    least = max(FEW[0], math.ceil(REUSE_ELEMENTS / layer_elements) + 1)
    return least, least + 1

"""Which engine a recipe asks for, and what each of them cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.recipe.schema import Recipe
from tunesmith.train.deepspeed_engine import DeepSpeedEngine
from tunesmith.train.engine import Engine, SingleEngine
from tunesmith.train.fsdp import FsdpEngine
from tunesmith.train.objective import Objective
from tunesmith.train.parallel import DdpEngine
from tunesmith.train.ranks import Ranks

# Engines that keep no process's model whole.
SHARDED = ("fsdp", "deepspeed")


def make_engine(model: Any, objective: Objective, recipe: Recipe, ranks: Ranks) -> Engine:
    """The recipe's engine around `model`, which holds its weights in whole until then.

    recipe: resolved and seen by `check_engine`; ranks: in a process group, except with `single`.
    """
    kind = recipe.parallel.engine
    if kind == "single":
        return SingleEngine(model, objective, recipe)
    makers: dict[str, Callable[[Any, Objective, Recipe, Ranks], Engine]] = {
        "ddp": DdpEngine,
        "fsdp": FsdpEngine,
        "deepspeed": DeepSpeedEngine,
    }
    return makers[kind](model, objective, recipe, ranks)


def check_engine(recipe: Recipe, ranks: Ranks) -> None:
    """Raise UserError for a combination of settings that the recipe's engine cannot do."""
    engine, train, method = recipe.parallel.engine, recipe.train, recipe.method
    if engine == "single" and ranks.size > 1:
        raise UserError(
            f"parallel.engine: 'single' with {ranks.size} processes",
            hint="take ddp, fsdp or deepspeed, or hardware.processes: 1",
        )
    sharded = engine in SHARDED
    if recipe.parallel.offload != "none" and not sharded:
        raise UserError(
            f"parallel.offload: '{recipe.parallel.offload}' with parallel.engine: {engine}",
            hint="take parallel.engine: fsdp or deepspeed, or train.optimizer: adamw-offload",
        )
    if train.optimizer_in_backward is True and engine != "single":
        raise UserError(
            f"train.optimizer_in_backward: true with parallel.engine: {engine}: gradients must be summed "
            "over the processes before the update",
            hint="set it to false, or train.memory: low",
        )
    if sharded and method.type == "qlora":
        raise UserError(
            f"method.type: 'qlora' with parallel.engine: {engine}: weights of 4 bits are not sharded",
            hint="take parallel.engine: ddp, or method.type: lora",
        )
    if engine == "deepspeed" and train.precision in ("fp16", "bf16-pure"):
        raise UserError(
            f"train.precision: '{train.precision}' with parallel.engine: deepspeed, which keeps fp32 weights "
            "and does not scale losses",
            hint="take bf16 or fp32, or parallel.engine: fsdp",
        )
    if recipe.parallel.offload == "optimizer" and engine == "fsdp" and train.precision == "bf16-pure":
        raise UserError(
            "train.precision: 'bf16-pure' with parallel.offload: optimizer, which keeps fp32 weights",
            hint="take precision bf16, or parallel.offload: parameters",
        )
    if sharded and train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: '{train.optimizer}' with parallel.engine: {engine}",
            hint="take adamw, which it shards over the processes, and parallel.offload where memory is short",
        )

"""What `train.memory` stands for, and settings of memory that cannot work together."""

from __future__ import annotations

from typing import Any, Literal

from tunesmith.core.errors import RecipeErrors, UserError
from tunesmith.recipe.schema import Precision, Recipe

# Of the optimizer's averages in 8 bits: weights that share a scale; tensors of fewer than so many weights
# (norms, biases) keep fp32 averages, which cost nothing and are touchy.
BLOCK_8BIT = 256
MIN_8BIT = 4096


def memory_settings(
    recipe: Recipe, *, precision: Precision, engine: Literal["single", "ddp", "fsdp", "deepspeed"]
) -> dict[str, Any]:
    """Values for the fields of `train` that are "auto".

    precision: what the hardware computes best; it is kept for adapters, which are small: with them only
    activations count. engine: as resolved; those that shard have an optimizer of their own.
    """
    train = recipe.train
    low = train.memory != "normal"
    small_states = low and recipe.method.type == "full" and engine in ("single", "ddp")
    offloads = train.optimizer == "adamw-offload"
    wanted = train.precision
    if wanted == "auto":
        pure = small_states or (offloads and precision == "bf16")
        wanted = "bf16-pure" if pure and precision != "fp16" else precision
    return {
        "precision": wanted,
        "optimizer": "adamw-8bit" if small_states else "adamw",
        "stochastic_rounding": small_states and wanted == "bf16-pure" and not offloads,
        "optimizer_in_backward": (
            small_states and train.memory == "smallest" and engine == "single" and wanted != "fp16"
        ),
        "gradient_checkpointing": "full" if low else "none",
    }


def check_memory(recipe: Recipe) -> None:
    """Raise UserError, RecipeErrors for several, for settings of a resolved recipe that cannot work."""
    faults = _rounding(recipe) + _in_backward(recipe) + _offload(recipe)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise RecipeErrors(list(faults))


def _rounding(recipe: Recipe) -> list[UserError]:
    train = recipe.train
    if train.stochastic_rounding is not True:
        return []
    if train.optimizer == "adamw-offload":
        return [
            UserError(
                "train.stochastic_rounding: true with train.optimizer: adamw-offload, which updates weights "
                "in fp32: no small update is lost",
                hint="leave stochastic_rounding out",
            )
        ]
    if train.precision != "bf16-pure":
        return [
            UserError(
                f"train.stochastic_rounding: true with train.precision: {train.precision}, whose trained "
                "weights are fp32: nothing is rounded",
                hint="take precision: bf16-pure, or leave stochastic_rounding out",
            )
        ]
    return []


def _in_backward(recipe: Recipe) -> list[UserError]:
    train = recipe.train
    if train.optimizer_in_backward is not True:
        return []
    by = " (from train.memory: smallest)" if train.memory == "smallest" else ""
    head = f"train.optimizer_in_backward: true{by}: every gradient is used up before the next one is there"
    faults = []
    if train.max_grad_norm is not None:
        faults.append(
            UserError(
                f"{head}, so that train.max_grad_norm: {train.max_grad_norm:g} cannot be kept",
                hint="set max_grad_norm: null, or take memory: low",
            )
        )
    if train.grad_accumulation > 1:
        faults.append(
            UserError(
                f"{head}, so that those of train.grad_accumulation: {train.grad_accumulation} passes cannot "
                "be added up",
                hint="set grad_accumulation: 1 (a larger micro_batch_size makes the same step), or take "
                "memory: low",
            )
        )
    if train.precision == "fp16":
        faults.append(
            UserError(
                f"{head}, so that fp16 could not pass over a step with an overflow",
                hint="take precision: bf16 or fp32, or optimizer_in_backward: false",
            )
        )
    return faults


def _offload(recipe: Recipe) -> list[UserError]:
    if recipe.train.activation_offload and recipe.hardware.device == "cpu":
        return [
            UserError(
                "train.activation_offload: true with hardware.device: cpu, whose memory is the host's",
                hint="take gradient_checkpointing: full to save memory on a CPU",
            )
        ]
    return []

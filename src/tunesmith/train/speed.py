"""What makes a training fast, chosen once at its start: fused layers, compiled or not, kernels, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.core.errors import MissingExtra, UserError
from tunesmith.core.progress import say
from tunesmith.model.attention import unwrapped
from tunesmith.model.compiled_math import compiled_math, has_compiler
from tunesmith.model.fast_layers import use_fast_layers
from tunesmith.model.fast_math import IN_BLOCKS
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.recipe.schema import Train
from tunesmith.train import fast_lora


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run computes with. fused_layers: decoder layers in our own fused form; compiled: what in them is
    no matrix product is compiled by torch; lora_layers: adapters whose product is fused; keeps_freed_memory:
    freed blocks are used again instead of given back to the system."""

    device: str
    threads: int
    kernels: Literal["torch", "liger"]
    fused_layers: int
    compiled: bool
    lora_layers: int
    keeps_freed_memory: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        parts = [f"{self.threads} threads" if self.device == "cpu" else self.device]
        fused = f"{self.fused_layers} fused{' and compiled' if self.compiled else ''} layers"
        parts += [fused] if self.fused_layers else []
        parts += ["Liger's kernels"] if self.kernels == "liger" else []
        parts += ["freed memory is kept"] if self.keeps_freed_memory else []
        return ", ".join(parts)


def speed_up(model: nn.Module, train: Train) -> Speed:
    """`make_fast`, and tell the person at the terminal."""
    speed = make_fast(model, train)
    say(f"computing with {speed.text()}")
    return speed


def make_fast(model: nn.Module, train: Train) -> Speed:
    """Give `model` its fastest exact form under a resolved recipe's settings.

    Raises UserError and MissingExtra for kernels or a compiler that are not there.
    """
    device = next(model.parameters()).device
    kernels: Literal["torch", "liger"] = "liger" if train.kernels == "liger" else "torch"
    if kernels == "liger":
        use_liger(model, device)
    compiled = train.compile is True
    if compiled:
        check_compiler(device)
    fused = 0 if kernels == "liger" else use_fast_layers(model, compiled_math() if compiled else IN_BLOCKS)
    if compiled and not fused:
        raise not_compiled(model, kernels)
    return Speed(
        device=device.type,
        threads=torch.get_num_threads(),
        kernels=kernels,
        fused_layers=fused,
        compiled=compiled,
        lora_layers=fast_lora.speed_up(model),
        keeps_freed_memory=device.type == "cpu" and train.memory == "normal" and keep_freed_memory(),
    )


def check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not has_compiler():
        raise UserError(
            "train.compile: true: torch needs a C++ compiler for the CPU, and finds none",
            hint="install g++ (or set $CXX), or take train.compile: false",
        )


def not_compiled(model: nn.Module, kernels: str) -> UserError:
    why = "Liger's kernels" if kernels == "liger" else f"the layers of {type(unwrapped(model)).__name__}"
    return UserError(
        f"train.compile: true: it is the fused layers that are compiled, and this run has {why} instead",
        hint="take train.compile: false" + (", or train.kernels: torch" if kernels == "liger" else ""),
    )


def use_liger(model: Any, device: torch.device) -> None:
    """Liger's RMSNorm, SwiGLU and rotary embedding (Hsu et al. 2024, arXiv:2410.10989) in place of
    transformers'; the loss stays our own, which computes no logit that has no label."""
    if device.type != "cuda":
        raise UserError(
            f"train.kernels: 'liger': its kernels run on a GPU, and this run is on {device.type}",
            hint="take train.kernels: torch, or auto",
        )
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found,unused-ignore]
            _apply_liger_kernel_to_instance,
        )
    except ImportError:
        raise MissingExtra("liger_kernel", "kernels") from None
    inner = unwrapped(model)
    settings = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=inner, **settings)

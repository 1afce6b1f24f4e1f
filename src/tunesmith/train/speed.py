"""What makes a training fast, chosen once at its start: fused layers, compiled layers, kernels, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.core.errors import MissingExtra, UserError
from tunesmith.core.progress import say
from tunesmith.model.attention import unwrapped
from tunesmith.model.fast_layers import use_fast_layers
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.recipe.schema import Train
from tunesmith.train import fast_lora
from tunesmith.train.compile import compile_layers


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run computes with. fused_layers: decoder layers in our own fused form; compiled_layers: by
    torch.compile; lora_layers: adapters whose product is fused; keeps_freed_memory: freed blocks are used
    again instead of given back to the system."""

    device: str
    threads: int
    kernels: Literal["torch", "liger"]
    fused_layers: int
    compiled_layers: int
    lora_layers: int
    keeps_freed_memory: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        parts = [f"{self.threads} threads" if self.device == "cpu" else self.device]
        parts += [f"{self.fused_layers} fused layers"] if self.fused_layers else []
        parts += [f"{self.compiled_layers} compiled layers"] if self.compiled_layers else []
        parts += ["Liger's kernels"] if self.kernels == "liger" else []
        parts += ["freed memory is kept"] if self.keeps_freed_memory else []
        return ", ".join(parts)


def speed_up(model: nn.Module, train: Train) -> Speed:
    """Give `model` its fastest exact form under a resolved recipe's settings, and tell it.

    Raises UserError and MissingExtra for kernels or a compiler that are not there.
    """
    device = next(model.parameters()).device
    kernels: Literal["torch", "liger"] = "liger" if train.kernels == "liger" else "torch"
    if kernels == "liger":
        use_liger(model, device)
    compiled = compile_layers(model, device) if train.compile is True else 0
    fused = 0 if compiled or kernels == "liger" else use_fast_layers(model)
    speed = Speed(
        device=device.type,
        threads=torch.get_num_threads(),
        kernels=kernels,
        fused_layers=fused,
        compiled_layers=compiled,
        lora_layers=0 if compiled else fast_lora.speed_up(model),
        keeps_freed_memory=device.type == "cpu" and train.memory == "normal" and keep_freed_memory(),
    )
    say(f"computing with {speed.text()}")
    return speed


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

"""Compiling decoder layers with torch.compile, in place of the fused layers."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn

from tunesmith.core.errors import UserError
from tunesmith.model.attention import PackedLayout, unwrapped


def compile_layers(model: nn.Module, device: torch.device) -> int:
    """Have every decoder layer compiled at its first call, for batches of any length; returns how many.

    Attention is left out: it loops over documents, whose number and lengths are new in each batch. Raises
    UserError when torch has no compiler to use.
    """
    if device.type == "cpu" and not has_compiler():
        raise UserError(
            "train.compile: true: torch needs a C++ compiler for the CPU, and finds none",
            hint="install g++ (or set $CXX), or take train.compile: false",
        )
    # Without this each batch's document lengths would be a reason to compile again.
    PackedLayout.attend = torch.compiler.disable(PackedLayout.attend)  # type: ignore[method-assign]
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def has_compiler() -> bool:
    """True when torch's CPU backend can find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The repeated layers of a model, plain or PeftModel."""
    inner = unwrapped(model)
    return list(inner.get_decoder().layers)

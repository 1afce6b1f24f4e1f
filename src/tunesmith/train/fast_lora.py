"""LoRA layers with fewer passes over the activations; peft's modules, names and files stay as they are.

peft computes y = W x, then B (A x), then scales that and adds it: three tensors of the output's size, and as
many again in the backward pass. Here the adapter's product is added into W x by the matrix product itself.

Shapes: T tokens, I and O features in and out, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.model.fast_products import is_plain_lora
from tunesmith.model.hardware import compute_dtype


def speed_up(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PeftModel the faster forward pass; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    return is_plain_lora(layer) and not any(p.requires_grad for p in layer.base_layer.parameters())


def _forward(layer: Any, peft_forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    device = x.device.type
    dtype = compute_dtype(x)
    drops = layer.training and not isinstance(layer.lora_dropout["default"], nn.Identity)
    same = torch.is_autocast_enabled(device) or (x.dtype == a.dtype == layer.base_layer.weight.dtype)
    if drops or layer.disable_adapters or layer.merged or not same or args or kwargs:
        return peft_forward(x, *args, **kwargs)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    with torch.autocast(device, enabled=False):
        y: Tensor = _LoraProduct.apply(
            x.to(dtype).reshape(-1, x.shape[-1]),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            a.to(dtype),
            b.to(dtype),
            layer.scaling["default"],
        )
    return y.view(*x.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, scale: float
    ) -> Tensor:
        z_Tr = x_TI @ a_rI.T
        ctx.save_for_backward(x_TI, w_OI, a_rI, b_Or, z_Tr)
        ctx.scale = scale
        return F.linear(x_TI, w_OI, bias_O).addmm_(z_Tr, b_Or.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TI, w_OI, a_rI, b_Or, z_Tr = ctx.saved_tensors
        dy_TO = grads[0]
        dz_Tr = (dy_TO @ b_Or).mul_(ctx.scale)
        dx_TI = (dy_TO @ w_OI).addmm_(dz_Tr, a_rI) if ctx.needs_input_grad[0] else None
        da_rI = dz_Tr.T @ x_TI
        db_Or = (z_Tr.T @ dy_TO).mul_(ctx.scale).T.contiguous()
        return dx_TI, None, None, da_rI, db_Or, None

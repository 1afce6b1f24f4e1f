"""Several linear layers over the same input as one piece of work, with or without LoRA adapters.

Each layer is y = W x + b + scale · B (A x). The A of all layers are one product, every adapter's B is added
into W x by the product itself, and the gradients of x are summed by the products that make them.

Shapes: T tokens, I features in, O features out of a layer, R the ranks of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

NUM_TENSORS = 4


class Product(NamedTuple):
    """One layer's tensors: weight_OI, bias_O, and with an adapter a_rI, b_Or and its scale."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b


def product_of(layer: Any) -> Product | None:
    """What `layer` computes now; None where it is more than a product, or something is hooked to it."""
    if _is_hooked(layer):
        return None
    if type(layer) is nn.Linear:
        return Product(layer.weight, layer.bias)
    if type(layer) is not LoraLinear or not is_plain_lora(layer) or _is_hooked(layer.base_layer):
        return None
    base = layer.base_layer
    if layer.merged or layer.disable_adapters:
        return None if layer.merged else Product(base.weight, base.bias)
    drops = layer.training and not isinstance(layer.lora_dropout["default"], nn.Identity)
    if drops or any(_is_hooked(part["default"]) for part in (layer.lora_A, layer.lora_B)):
        return None
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Product(base.weight, base.bias, a, b, layer.scaling["default"])


def is_plain_lora(layer: Any) -> bool:
    """True for a LoRA layer over a plain matrix, without DoRA or another variant."""
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == ["default"]
        and layer.active_adapters == ["default"]
        and not layer.lora_variant
        and not layer.lora_bias["default"]
        and not layer.fan_in_fan_out
    )


def _is_hooked(part: Any) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks)


def cast(products: Sequence[Product], dtype: torch.dtype) -> list[Product]:
    """The products with all tensors as `dtype`; those that are so already are not copied."""

    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return [Product(p.weight.to(dtype), to(p.bias), to(p.a), to(p.b), p.scale) for p in products]


def multiply(x_TI: Tensor, products: Sequence[Product]) -> tuple[list[Tensor], Tensor | None]:
    """(every layer's output [T, O], the adapters' middle x Aᵀ [T, R] or None). All of one dtype."""
    z_TR, outputs, at = _down(x_TI, products), [], 0
    for product in products:
        y = F.linear(x_TI, product.weight, product.bias)
        if z_TR is not None and product.b is not None:
            y.addmm_(z_TR[:, at : at + product.rank], product.b.T, alpha=product.scale)
        outputs.append(y)
        at += product.rank
    return outputs, z_TR


def multiply_onto(x_TI: Tensor, product: Product, onto_TO: Tensor) -> tuple[Tensor, Tensor | None]:
    """(onto + the layer's output, as a new tensor of onto's dtype; the adapter's middle)."""
    z_Tr = _down(x_TI, [product])
    if onto_TO.dtype == x_TI.dtype:
        y = torch.addmm(onto_TO, x_TI, product.weight.T)
    else:
        y = onto_TO + x_TI @ product.weight.T
    if z_Tr is not None and product.b is not None:
        if y.dtype == z_Tr.dtype:
            y.addmm_(z_Tr, product.b.T, alpha=product.scale)
        else:
            y.add_(z_Tr @ product.b.T, alpha=product.scale)
    if product.bias is not None:
        y += product.bias
    return y, z_Tr


def _down(x_TI: Tensor, products: Sequence[Product]) -> Tensor | None:
    a_RI = _stacked(products)
    return None if a_RI is None else x_TI @ a_RI.T


def _stacked(products: Sequence[Product]) -> Tensor | None:
    found = [p.a for p in products if p.a is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)


def input_gradient(
    d_outputs: Sequence[Tensor], products: Sequence[Product], z_TR: Tensor | None, *, wanted: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x [T, I], None if not wanted; gradient of the adapters' middle [T, R], None without)."""
    dz_TR = _middle_gradient(d_outputs, products, z_TR)
    if not wanted:
        return None, dz_TR
    dx = d_outputs[0] @ products[0].weight
    for dy, product in zip(d_outputs[1:], products[1:], strict=True):
        dx.addmm_(dy, product.weight)
    a_RI = _stacked(products)
    if dz_TR is not None and a_RI is not None:
        dx.addmm_(dz_TR, a_RI)
    return dx, dz_TR


def _middle_gradient(
    d_outputs: Sequence[Tensor], products: Sequence[Product], z_TR: Tensor | None
) -> Tensor | None:
    if z_TR is None:
        return None
    parts = [dy @ (p.b * p.scale) for dy, p in zip(d_outputs, products, strict=True) if p.b is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def weight_gradients(
    x_TI: Tensor,
    d_outputs: Sequence[Tensor],
    products: Sequence[Product],
    z_TR: Tensor | None,
    dz_TR: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (weight, bias, a, b) of every layer, one after the other; None where not wanted."""
    da_RI = None if dz_TR is None else dz_TR.T @ x_TI
    found: list[Tensor | None] = []
    at = 0
    for number, (dy, product) in enumerate(zip(d_outputs, products, strict=True)):
        weight, bias, a, b = wanted[number * NUM_TENSORS : (number + 1) * NUM_TENSORS]
        ranks = slice(at, at + product.rank)
        at += product.rank
        found.append(dy.T @ x_TI if weight else None)
        found.append(dy.sum(0) if bias else None)
        found.append(da_RI[ranks] if a and da_RI is not None else None)
        db = (z_TR[:, ranks].T @ dy).mul_(product.scale) if b and z_TR is not None else None
        found.append(None if db is None else db.T.contiguous())
    return found

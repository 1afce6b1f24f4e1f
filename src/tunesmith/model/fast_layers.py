"""Decoder layers in three autograd functions beside attention: fewer passes, fewer saved tensors.

    norm -> q, k, v -> rotation | attention | o + residual | norm -> gate, up -> SwiGLU -> down + residual

Saved are the residual stream, q, k and v, attention's output, and the products gate and up; the norms'
outputs and SwiGLU are worked out again in the backward pass. A layer takes this way while its parts are
plain products (`fast_products.product_of`) and it is called with a layout; else it computes as before.

Shapes: T tokens, D hidden size, H and Hkv heads, Dh head size, I intermediate size, R ranks of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tunesmith.model.fast_math import IN_BLOCKS, Math
from tunesmith.model.fast_products import (
    NUM_TENSORS,
    Product,
    cast,
    input_gradient,
    multiply,
    multiply_onto,
    product_of,
    weight_gradients,
)
from tunesmith.model.hardware import compute_dtype

# Their layers are the same but for biases and the norms of q and k; each has a reference test.
LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def use_fast_layers(model: nn.Module, math: Math = IN_BLOCKS) -> int:
    """Give every decoder layer of a known kind the faster forward pass; returns how many there are."""
    layers = [part for part in model.modules() if _kind(part) in LAYERS and _is_silu(part)]
    for layer in layers:
        layer.forward = partial(_layer, layer, math, layer.forward)
    return len(layers)


def _kind(part: nn.Module) -> type:
    """The module's class; a sharded one has a class of FSDP's with that as its last base."""
    kind = type(part)
    return kind.__bases__[-1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


def _is_silu(layer: Any) -> bool:
    return bool(layer.self_attn.config.hidden_act in ("silu", "swish"))


def _layer(
    layer: Any, math: Math, slow: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    layout, positions = kwargs.get("layout"), kwargs.get("position_embeddings")
    dtype = compute_dtype(hidden_states)
    parts = None if layout is None or args or positions is None else _parts(layer, dtype)
    if parts is None or kwargs.get("past_key_values") is not None:
        return slow(hidden_states, *args, **kwargs)

    def fast(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _fast(layer, math, parts, hidden, positions, layout, dtype)

    if layer.training and layer.gradient_checkpointing and not _is_selective(layer):
        y: Tensor = layer._gradient_checkpointing_func(fast, hidden_states)
        return y
    return fast(hidden_states)


def _is_selective(layer: Any) -> bool:
    """What selective checkpointing keeps and computes again is what these functions do anyway."""
    return "context_fn" in layer._gradient_checkpointing_func.keywords


def _parts(layer: Any, dtype: torch.dtype) -> dict[str, Product] | None:
    """The layer's seven products; None when one of them is more than that, or needs another format."""
    if any(part._forward_hooks or part._forward_pre_hooks for part in (layer.self_attn, layer.mlp)):
        return None
    found = {name: product_of(getattr(layer.self_attn, name)) for name in ATTENTION}
    found |= {name: product_of(getattr(layer.mlp, name)) for name in MLP}
    parts = {name: product for name, product in found.items() if product is not None}
    tensors = [t for product in parts.values() for t in product.tensors if t is not None]
    autocast = bool(tensors) and torch.is_autocast_enabled(tensors[0].device.type)
    same = autocast or all(t.dtype == dtype for t in tensors)
    return parts if same and len(parts) == len(found) else None


def _fast(
    layer: Any,
    math: Math,
    parts: dict[str, Product],
    hidden: Tensor,
    positions: Any,
    layout: Any,
    dtype: torch.dtype,
) -> Tensor:
    attention = layer.self_attn
    x = hidden.reshape(-1, hidden.shape[-1])
    norm, qkv = layer.input_layernorm, [parts[name] for name in ATTENTION[:3]]
    how = _How(math, norm.variance_epsilon, dtype, _scales(qkv))
    flat = _NormMultiply.apply(x, norm.weight, how, *_tensors(qkv))
    q, k, v = (y.view(len(x), -1, attention.head_dim) for y in flat)
    if hasattr(attention, "q_norm"):
        q, k = fast_norm(attention.q_norm, q, math), fast_norm(attention.k_norm, k, math)
    cos, sin = (table.reshape(-1, table.shape[-1]) for table in positions)
    q, k = _Rotation.apply(q, cos, sin, math), _Rotation.apply(k, cos, sin, math)
    heads = (y.to(dtype).transpose(0, 1)[None] for y in (q, k, v))
    dropout = attention.attention_dropout if layer.training else 0.0
    extra = {"dropout": dropout} if dropout else {}
    seen = layout.attend(attention.layer_idx, *heads, attention.scaling, **extra).reshape(len(x), -1)
    out = parts["o_proj"]
    x = _OntoResidual.apply(x, seen, out.scale, *out.tensors)
    norm, mlp = layer.post_attention_layernorm, [parts[name] for name in MLP]
    how = _How(math, norm.variance_epsilon, dtype, _scales(mlp))
    y: Tensor = _NormMlp.apply(x, norm.weight, how, *_tensors(mlp))
    return y.view(hidden.shape)


class _How(NamedTuple):
    """What the functions below are given beside tensors; dtype: of the products."""

    math: Math
    eps: float
    dtype: torch.dtype
    scales: tuple[float, ...] = ()

    def products(self, tensors: Sequence[Any]) -> list[Product]:
        return _products(tensors, self.scales, self.dtype)


def _scales(products: Sequence[Product]) -> tuple[float, ...]:
    return tuple(product.scale for product in products)


def _tensors(products: Sequence[Product]) -> list[Tensor | None]:
    return [tensor for product in products for tensor in product.tensors]


def _products(tensors: Sequence[Any], scales: Sequence[float], dtype: torch.dtype) -> list[Product]:
    groups = [tensors[at : at + NUM_TENSORS] for at in range(0, len(tensors), NUM_TENSORS)]
    return cast([Product(w, c, a, b, s) for (w, c, a, b), s in zip(groups, scales, strict=True)], dtype)


def fast_norm(norm: Any, x: Tensor, math: Math = IN_BLOCKS) -> Tensor:
    """What the RMSNorm module `norm` makes of x [..., N]."""
    dtype = torch.promote_types(x.dtype, norm.weight.dtype)
    how = _How(math, norm.variance_epsilon, dtype)
    y: Tensor = _Norm.apply(x.reshape(-1, x.shape[-1]), norm.weight, how)
    return y.view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, how: _How) -> Tensor:
        out, inverse = how.math.rms_norm(x_TD, weight_D, how.eps, how.dtype)
        ctx.save_for_backward(x_TD, weight_D, inverse)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        train = ctx.needs_input_grad[1]
        dx, d_weight = ctx.how.math.rms_norm_backward(grads[0], x, inverse, weight, None, train)
        return dx, d_weight, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THDh: Tensor, cos_TDh: Tensor, sin_TDh: Tensor, math: Math) -> Tensor:
        ctx.save_for_backward(cos_TDh, sin_TDh)
        ctx.math = math
        return math.rotate(x_THDh, cos_TDh, sin_TDh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.math.rotate(grads[0], *ctx.saved_tensors, back=True), None, None, None


class _NormMultiply(torch.autograd.Function):
    """Products of the normalised x: one tensor [T, O] for each."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm_D: Tensor, how: _How, *tensors: Any) -> tuple[Tensor, ...]:
        normed, inverse = how.math.rms_norm(x_TD, norm_D, how.eps, how.dtype)
        outputs, z_TR = multiply(normed, how.products(tensors))
        ctx.save_for_backward(x_TD, norm_D, inverse, z_TR, *tensors)
        ctx.how = how
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, inverse, z_TR, *tensors = ctx.saved_tensors
        how, wanted = ctx.how, ctx.needs_input_grad
        products = how.products(tensors)
        d_outputs = [grad.contiguous() for grad in grads]
        d_normed, dz_TR = input_gradient(d_outputs, products, z_TR, wanted=wanted[0] or wanted[1])
        normed = _if_needed(x, inverse, norm, how, wanted[3:])
        found = weight_gradients(normed, d_outputs, products, z_TR, dz_TR, wanted[3:])
        dx, d_norm = _through_norm(d_normed, x, inverse, norm, None, ctx)
        return dx, d_norm, None, *found


def _if_needed(x: Tensor, inverse: Tensor, norm: Tensor, how: _How, wanted: Sequence[bool]) -> Tensor:
    """The norm's output again; x itself, which is then not looked at, when no weight is trained."""
    return how.math.normalised(x, inverse, norm, how.dtype) if any(wanted) else x


def _through_norm(
    d_normed: Tensor | None, x: Tensor, inverse: Tensor, norm: Tensor, around: Tensor | None, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    if d_normed is None:
        return None, None
    train = ctx.needs_input_grad[1]
    dx, d_norm = ctx.how.math.rms_norm_backward(d_normed, x, inverse, norm, around, train)
    return dx, d_norm


class _OntoResidual(torch.autograd.Function):
    """residual + W a, of the residual's format."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, a_TI: Tensor, scale: float, *tensors: Any) -> Tensor:
        (product,) = _products(tensors, [scale], a_TI.dtype)
        y, z_Tr = multiply_onto(a_TI, product, x_TD)
        ctx.save_for_backward(a_TI, z_Tr, *tensors)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a_TI, z_Tr, *tensors = ctx.saved_tensors
        (dy,) = grads
        product, wanted = _products(tensors, [ctx.scale], a_TI.dtype), ctx.needs_input_grad
        d_out = [dy.to(a_TI.dtype).contiguous()]
        da, dz_Tr = input_gradient(d_out, product, z_Tr, wanted=wanted[1])
        found = weight_gradients(a_TI, d_out, product, z_Tr, dz_Tr, wanted[3:])
        return dy if wanted[0] else None, da, None, *found


class _NormMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x)))."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, norm_D: Tensor, how: _How, *tensors: Any) -> Tensor:
        *gate_up, down = how.products(tensors)
        normed, inverse = how.math.rms_norm(x_TD, norm_D, how.eps, how.dtype)
        (gate, up), z_TR = multiply(normed, gate_up)
        y, z_Tr = multiply_onto(how.math.swiglu(gate, up), down, x_TD)
        ctx.save_for_backward(x_TD, norm_D, inverse, gate, up, z_TR, z_Tr, *tensors)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, inverse, gate, up, z_TR, z_Tr, *tensors = ctx.saved_tensors
        (dy,), how, wanted = grads, ctx.how, ctx.needs_input_grad
        *gate_up, down = how.products(tensors)
        d_out = [dy.to(how.dtype).contiguous()]
        d_inner, dz_Tr = input_gradient(d_out, [down], z_Tr)
        d_gate, d_up, inner = how.math.swiglu_backward(d_inner, gate, up)
        last = 3 + 2 * NUM_TENSORS
        of_down = weight_gradients(inner, d_out, [down], z_Tr, dz_Tr, wanted[last:])
        del inner, d_inner
        pair = [d_gate, d_up]
        d_normed, dz_TR = input_gradient(pair, gate_up, z_TR, wanted=wanted[0] or wanted[1])
        normed = _if_needed(x, inverse, norm, how, wanted[3:last])
        found = weight_gradients(normed, pair, gate_up, z_TR, dz_TR, wanted[3:last])
        del normed, pair, d_gate, d_up
        dx, d_norm = _through_norm(d_normed, x, inverse, norm, dy, ctx)
        return dx, d_norm, None, *found, *of_down

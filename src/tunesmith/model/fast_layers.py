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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from tunesmith.model import fast_math
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


def use_fast_layers(model: nn.Module) -> int:
    """Give every decoder layer of a known kind the faster forward pass; returns how many there are."""
    layers = [part for part in model.modules() if type(part) in LAYERS and _is_silu(part)]
    for layer in layers:
        layer.forward = partial(_layer, layer, layer.forward)
    return len(layers)


def _is_silu(layer: Any) -> bool:
    return bool(layer.self_attn.config.hidden_act in ("silu", "swish"))


def _layer(
    layer: Any, slow: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    layout, positions = kwargs.get("layout"), kwargs.get("position_embeddings")
    dtype = compute_dtype(hidden_states)
    parts = None if layout is None or args or positions is None else _parts(layer, dtype)
    if parts is None or kwargs.get("past_key_values") is not None:
        return slow(hidden_states, *args, **kwargs)

    def fast(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return _fast(layer, parts, hidden, positions, layout, dtype)

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
    layer: Any, parts: dict[str, Product], hidden: Tensor, positions: Any, layout: Any, dtype: torch.dtype
) -> Tensor:
    attention = layer.self_attn
    x = hidden.reshape(-1, hidden.shape[-1])
    norm, qkv = layer.input_layernorm, [parts[name] for name in ATTENTION[:3]]
    flat = _NormMultiply.apply(x, norm.weight, norm.variance_epsilon, _scales(qkv), dtype, *_tensors(qkv))
    q, k, v = (y.view(len(x), -1, attention.head_dim) for y in flat)
    if hasattr(attention, "q_norm"):
        q, k = fast_norm(attention.q_norm, q), fast_norm(attention.k_norm, k)
    cos, sin = (table.reshape(-1, table.shape[-1]) for table in positions)
    q, k = _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)
    heads = (y.to(dtype).transpose(0, 1)[None] for y in (q, k, v))
    dropout = attention.attention_dropout if layer.training else 0.0
    extra = {"dropout": dropout} if dropout else {}
    seen = layout.attend(attention.layer_idx, *heads, attention.scaling, **extra).reshape(len(x), -1)
    out = parts["o_proj"]
    x = _OntoResidual.apply(x, seen, out.scale, *out.tensors)
    norm, mlp = layer.post_attention_layernorm, [parts[name] for name in MLP]
    y: Tensor = _NormMlp.apply(x, norm.weight, norm.variance_epsilon, _scales(mlp), dtype, *_tensors(mlp))
    return y.view(hidden.shape)


def _scales(products: Sequence[Product]) -> tuple[float, ...]:
    return tuple(product.scale for product in products)


def _tensors(products: Sequence[Product]) -> list[Tensor | None]:
    return [tensor for product in products for tensor in product.tensors]


def _products(tensors: Sequence[Any], scales: Sequence[float], dtype: torch.dtype) -> list[Product]:
    groups = [tensors[at : at + NUM_TENSORS] for at in range(0, len(tensors), NUM_TENSORS)]
    return cast([Product(w, c, a, b, s) for (w, c, a, b), s in zip(groups, scales, strict=True)], dtype)


def fast_norm(norm: Any, x: Tensor) -> Tensor:
    """What the RMSNorm module `norm` makes of x [..., N]."""
    dtype = torch.promote_types(x.dtype, norm.weight.dtype)
    y: Tensor = _Norm.apply(x.reshape(-1, x.shape[-1]), norm.weight, norm.variance_epsilon, dtype)
    return y.view(x.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, inverse = fast_math.rms_norm(x_TD, weight_D, eps, dtype)
        ctx.save_for_backward(x_TD, weight_D, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        train = ctx.needs_input_grad[1]
        dx, d_weight = fast_math.rms_norm_backward(grads[0], x, inverse, weight, None, train)
        return dx, d_weight, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THDh: Tensor, cos_TDh: Tensor, sin_TDh: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TDh, sin_TDh)
        return fast_math.rotate(x_THDh, cos_TDh, sin_TDh)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return fast_math.rotate(grads[0], *ctx.saved_tensors, back=True), None, None


class _NormMultiply(torch.autograd.Function):
    """Products of the normalised x: one tensor [T, O] for each."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_D: Tensor,
        eps: float,
        scales: Sequence[float],
        dtype: torch.dtype,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        normed, inverse = fast_math.rms_norm(x_TD, norm_D, eps, dtype)
        outputs, z_TR = multiply(normed, _products(tensors, scales, dtype))
        ctx.save_for_backward(x_TD, norm_D, inverse, z_TR, *tensors)
        ctx.scales, ctx.dtype = scales, dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, inverse, z_TR, *tensors = ctx.saved_tensors
        products, wanted = _products(tensors, ctx.scales, ctx.dtype), ctx.needs_input_grad
        d_outputs = [grad.contiguous() for grad in grads]
        d_normed, dz_TR = input_gradient(d_outputs, products, z_TR, wanted=wanted[0] or wanted[1])
        normed = _if_needed(x, inverse, norm, ctx.dtype, wanted[5:])
        found = weight_gradients(normed, d_outputs, products, z_TR, dz_TR, wanted[5:])
        dx, d_norm = _through_norm(d_normed, x, inverse, norm, None, wanted)
        return dx, d_norm, None, None, None, *found


def _if_needed(
    x: Tensor, inverse: Tensor, norm: Tensor, dtype: torch.dtype, wanted: Sequence[bool]
) -> Tensor:
    """The norm's output again; x itself, which is then not looked at, when no weight is trained."""
    return fast_math.normalised(x, inverse, norm, dtype) if any(wanted) else x


def _through_norm(
    d_normed: Tensor | None, x: Tensor, inverse: Tensor, norm: Tensor, around: Tensor | None, wanted: Any
) -> tuple[Tensor | None, Tensor | None]:
    if d_normed is None:
        return None, None
    return fast_math.rms_norm_backward(d_normed, x, inverse, norm, around, wanted[1])


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
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_D: Tensor,
        eps: float,
        scales: Sequence[float],
        dtype: torch.dtype,
        *tensors: Any,
    ) -> Tensor:
        *gate_up, down = _products(tensors, scales, dtype)
        normed, inverse = fast_math.rms_norm(x_TD, norm_D, eps, dtype)
        (gate, up), z_TR = multiply(normed, gate_up)
        y, z_Tr = multiply_onto(fast_math.swiglu(gate, up), down, x_TD)
        ctx.save_for_backward(x_TD, norm_D, inverse, gate, up, z_TR, z_Tr, *tensors)
        ctx.scales, ctx.dtype = scales, dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, inverse, gate, up, z_TR, z_Tr, *tensors = ctx.saved_tensors
        (dy,), wanted = grads, ctx.needs_input_grad
        *gate_up, down = _products(tensors, ctx.scales, ctx.dtype)
        d_out = [dy.to(ctx.dtype).contiguous()]
        d_inner, dz_Tr = input_gradient(d_out, [down], z_Tr)
        assert d_inner is not None
        d_gate, d_up, inner = fast_math.swiglu_backward(d_inner, gate, up)
        last = 5 + 2 * NUM_TENSORS
        of_down = weight_gradients(inner, d_out, [down], z_Tr, dz_Tr, wanted[last:])
        del inner, d_inner
        pair = [d_gate, d_up]
        d_normed, dz_TR = input_gradient(pair, gate_up, z_TR, wanted=wanted[0] or wanted[1])
        normed = _if_needed(x, inverse, norm, ctx.dtype, wanted[5:last])
        found = weight_gradients(normed, pair, gate_up, z_TR, dz_TR, wanted[5:last])
        del normed, pair, d_gate, d_up
        dx, d_norm = _through_norm(d_normed, x, inverse, norm, dy, wanted)
        return dx, d_norm, None, None, None, *found, *of_down

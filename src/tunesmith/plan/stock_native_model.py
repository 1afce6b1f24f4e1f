"""Decoders of the native PyTorch trainers, by what they allocate: torchtune, LitGPT, torchtitan.

The same transformer, written three ways: what each saves for its backward pass differs by half. The numbers
mean nothing; shapes, formats and lifetimes are those of the frameworks' modules.

Shapes: B batch, L length, D hidden, H heads of size E, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tunesmith.plan.decoder import Shape
from tunesmith.plan.stock_native_kernels import CompiledGate, CompiledNorm, CompiledRotation, Nf4Product
from tunesmith.plan.stock_ops import FlashAttention

Framework = Literal["torchtune", "litgpt", "torchtitan"]
ATEN = torch.ops.aten
NF4_BLOCK, NESTED_BLOCK = 64, 256


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a framework writes its decoder.

    compiled: point-wise chains are one kernel each, which saves what it reads and no more. recompute: of
    each layer nothing is kept but its input ("full"), every second product ("products"), all ("none").
    offload: what is kept of a layer lies in host memory. base: how frozen linear layers lie.
    """

    framework: Framework
    compiled: bool
    recompute: Literal["none", "full", "products"]
    offload: bool
    base: Literal["plain", "nf4"]
    double_quant: bool
    rank: int
    targets: frozenset[str]
    dropout: float

    @property
    def trains_all(self) -> bool:
        return self.rank == 0


class Nf4Linear(nn.Module):
    """A frozen linear layer of four bits, without bias of its own format: packed weight and its scales."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, style: Style) -> None:
        super().__init__()
        count, self.out_features = inputs * outputs, outputs
        self.saves_input = style.framework == "litgpt"
        blocks = -(-count // NF4_BLOCK)
        self.weight = nn.Parameter(torch.empty(count // 2, dtype=torch.uint8), requires_grad=False)
        scales = torch.uint8 if style.double_quant else torch.float32
        self.register_buffer("scales", torch.empty(blocks, dtype=scales))
        if style.double_quant:
            self.register_buffer("nested", torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Nf4Product.apply(x, self.weight, self.out_features, self.saves_input)
        return out if self.bias is None else out + self.bias


class Lora(nn.Module):
    """A linear layer with an adapter of the same format, as torchtune and LitGPT write it."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, style: Style) -> None:
        super().__init__()
        self.base, self.dropout = base, style.dropout
        self.a = nn.Linear(inputs, style.rank, bias=False)
        self.b = nn.Linear(style.rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + 2.0 * self.b(self.a(_dropped(x, self.dropout)))


class FusedLora(nn.Module):
    """LitGPT's fused attention input with adapters on some of query, key and value: zeros for the others."""

    def __init__(self, base: nn.Module, inputs: int, sizes: Sequence[int], style: Style) -> None:
        super().__init__()
        self.base, self.dropout, self.sizes = base, style.dropout, tuple(sizes)
        wanted = [name in style.targets for name in ("q_proj", "k_proj", "v_proj")]
        self.kept = tuple(size for size, want in zip(sizes, wanted, strict=True) if want)
        self.a = nn.Linear(inputs, style.rank * len(self.kept), bias=False)
        self.b = nn.Parameter(torch.empty(sum(self.kept), style.rank))
        self.rank = style.rank

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        low = self.a(_dropped(x, self.dropout))
        parts = zip(low.split(self.rank, -1), self.b.split(self.kept), strict=True)
        high = torch.cat([part.matmul(b.t()) for part, b in parts], -1)
        if len(self.kept) < len(self.sizes):
            places = torch.empty(sum(self.kept), dtype=torch.int64)
            zeros = high.new_empty(high.shape[0] * high.shape[1], sum(self.sizes))
            high = zeros.index_copy(1, places, high.reshape(-1, sum(self.kept))).view(*high.shape[:2], -1)
        return out + high * 2.0


def _dropped(x: Tensor, rate: float) -> Tensor:
    return functional.dropout(x, rate) if rate else x


class Norm(nn.Module):
    """RMS or layer norm over the last dimension, with the copies that its framework makes."""

    def __init__(self, size: int, shape: Shape, style: Style) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if shape.norm == "layer" else None
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        if self.style.compiled:
            out: Tensor = CompiledNorm.apply(x, self.weight)
            return out
        if self.bias is not None:
            return functional.layer_norm(x, self.weight.shape, self.weight, self.bias)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.style.framework == "torchtune":
            return normed.type_as(x) * self.weight
        return (self.weight * normed).type_as(x)


def _turned(x: Tensor, angles: Tensor, framework: Framework) -> Tensor:
    """Rotary position embedding of [B, L, H, E] (LitGPT: [B, H, L, E])."""
    if framework == "litgpt":
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return (x * angles + turned * angles).type_as(x)
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    if framework == "torchtitan":
        turned = torch.view_as_real(torch.view_as_complex(pairs) * angles)
        return turned.flatten(-2).type_as(x)
    first, second = pairs.unbind(-1)
    both = torch.stack((first * angles - second * angles, second * angles + first * angles), -1)
    return both.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal self-attention of [B, L, D]."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.shape, self.style = shape, style
        size = shape.head_dim
        sizes = (shape.heads * size, shape.kv_heads * size, shape.kv_heads * size)
        make = partial(linear, shape=shape, style=style)
        if style.framework == "litgpt":
            self.fused = _fused_input(shape, style, sizes)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            self.q, self.k, self.v = (
                make(name, shape.hidden, out, bias=shape.qkv_bias)
                for name, out in zip(names, sizes, strict=True)
            )
        self.out = make("o_proj", sizes[0], shape.hidden, bias=style.framework == "litgpt" and shape.qkv_bias)
        if shape.qk_norm:
            self.q_norm, self.k_norm = Norm(size, shape, style), Norm(size, shape, style)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self._split(x, angles) if self.style.framework == "litgpt" else self._projected(x, angles)
        out = self._attended(q, k, v)
        return self.out(out.reshape(x.shape[0], x.shape[1], -1))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, H, E]. What selective checkpointing is to keep must be an operation of torch's."""
        if self.style.recompute == "products":
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return FlashAttention.apply(q, k, v)

    def _projected(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], -1, self.shape.head_dim)
            for layer in (self.q, self.k, self.v)
        )
        if self.shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        turn = CompiledRotation.apply if self.style.compiled else partial(_rotation, self.style, angles)
        q, k = turn(q), turn(k)
        k, v = (self._expanded(t) for t in (k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _expanded(self, x: Tensor) -> Tensor:
        """[B, L, kv heads, E] -> [B, L, H, E], a copy where they are fewer."""
        times = self.shape.heads // self.shape.kv_heads
        if times == 1:
            return x
        batch, length, heads, size = x.shape
        return x.unsqueeze(3).expand(batch, length, heads, times, size).reshape(batch, length, -1, size)

    def _split(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        per_group = shape.heads // shape.kv_heads
        qkv = self.fused(x).view(x.shape[0], x.shape[1], shape.kv_heads, per_group + 2, shape.head_dim)
        q, k, v = qkv.permute(0, 2, 3, 1, 4).split((per_group, 1, 1), dim=2)
        if shape.heads != shape.kv_heads:
            k, v = (t.expand(-1, -1, per_group, -1, -1) for t in (k, v))
        q, k, v = (t.reshape(x.shape[0], -1, x.shape[1], shape.head_dim) for t in (q, k, v))
        turned = angles.shape[-1]
        q, k = (torch.cat((_turned(t[..., :turned], angles, "litgpt"), t[..., turned:]), -1) for t in (q, k))
        return q, k, v


def _rotation(style: Style, angles: Tensor, x: Tensor) -> Tensor:
    return _turned(x, angles, style.framework)


def _fused_input(shape: Shape, style: Style, sizes: tuple[int, int, int]) -> nn.Module:
    base = linear("", shape.hidden, sum(sizes), shape=shape, style=style, bias=shape.qkv_bias)
    if style.targets & {"q_proj", "k_proj", "v_proj"}:
        return FusedLora(base, shape.hidden, sizes, style)
    return base


def linear(
    name: str,
    inputs: int,
    outputs: int,
    *,
    shape: Shape,
    style: Style,
    bias: bool = False,
    plain: bool = False,
) -> nn.Module:
    """A linear layer of that name: trained, frozen, of four bits, or with an adapter, as the style says.

    plain: never of four bits (torchtune leaves the output layer as it is).
    """
    base: nn.Module = nn.Linear(inputs, outputs, bias=bias)
    if style.base == "nf4" and not plain:
        base = Nf4Linear(inputs, outputs, bias=bias, style=style)
    return Lora(base, inputs, outputs, style) if name in style.targets else base


class Mlp(nn.Module):
    """Gated (SwiGLU) or of two products (GELU), [B, L, D]."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        bias = not shape.gated and shape.qkv_bias
        make = partial(linear, shape=shape, style=style, bias=bias)
        self.gate = make("gate_proj", shape.hidden, shape.intermediate)
        self.up = make("up_proj", shape.hidden, shape.intermediate) if shape.gated else None
        self.down = make("down_proj", shape.intermediate, shape.hidden)
        self.compiled = style.compiled

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.up is None:
            return self.down(functional.gelu(gate))
        if self.compiled:
            return self.down(CompiledGate.apply(gate, self.up(x)))
        return self.down(functional.silu(gate) * self.up(x))


class Layer(nn.Module):
    """One decoder layer; with one norm a layer, attention and MLP stand side by side (Phi)."""

    def __init__(self, shape: Shape, style: Style) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(shape, style), Mlp(shape, style)
        self.before = Norm(shape.hidden, shape, style)
        self.between = Norm(shape.hidden, shape, style) if shape.norms_per_layer > 1 else None

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        normed = self.before(x)
        attended = self.attention(normed, angles)
        if self.between is None:
            return self.mlp(normed) + attended + x
        x = x + attended
        return x + self.mlp(self.between(x))


class Decoder(nn.Module):
    """Embedding, layers, last norm; `output` makes the logits."""

    def __init__(self, shape: Shape, style: Style, layers: int) -> None:
        super().__init__()
        self.shape, self.style = shape, style
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, style) for _ in range(layers))
        self.norm = Norm(shape.hidden, shape, style)
        quantised = style.base == "nf4" and style.framework == "litgpt"
        self.output = linear(
            "lm_head", shape.hidden, shape.vocab, shape=shape, style=style, plain=not quantised
        )
        if shape.tied and isinstance(self.output, nn.Linear):
            self.output.weight = self.embedding.weight
        self._freeze()

    def _freeze(self) -> None:
        if self.style.trains_all:
            return
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            parameter.requires_grad_(bool({"a", "b"} & set(parts)) and "base" not in parts)

    def forward(self, tokens: Tensor, angles: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = self._run(layer, x, angles)
        return self.norm(x)

    def _run(self, layer: nn.Module, x: Tensor, angles: Tensor) -> Tensor:
        if self.style.recompute == "none":
            return layer(x, angles)
        if self.style.recompute == "full":
            return checkpoint(layer, x, angles, use_reentrant=False)
        # A layer's last product is only added to its input: compiled, nothing of it is kept.
        unneeded = (7 if self.shape.gated else 6) if self.style.compiled else 0
        kept = partial(create_selective_checkpoint_contexts, SecondProducts(unneeded))
        return checkpoint(layer, x, angles, use_reentrant=False, context_fn=kept)


class SecondProducts:
    """torchtitan's policy: keep the attention's results and every other product (the first, the third …)."""

    ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default

    def __init__(self, unneeded: int) -> None:
        self.counts, self.unneeded = {False: 0, True: 0}, unneeded

    def __call__(self, ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if func is self.ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if func is not ATEN.mm.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.counts[ctx.is_recompute] += 1
        number = self.counts[ctx.is_recompute]
        if number % 2 == 1 and number != self.unneeded:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def angles(shape: Shape, style: Style, length: int) -> Tensor:
    """The table of the rotary embedding, as it is broadcast."""
    if style.framework == "litgpt":
        # Phi turns half of each head.
        turned = shape.head_dim if shape.norm == "rms" else shape.head_dim // 2
        return torch.empty(length, turned, dtype=torch.bfloat16)
    kind = torch.complex64 if style.framework == "torchtitan" else torch.float32
    return torch.empty(length, 1, shape.head_dim // 2, dtype=kind)

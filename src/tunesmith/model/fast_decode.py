"""The forward pass of serving on a CPU in few calls: two kernels a layer beside attention.

    norm -> q, k, v -> rotation | attention | o + residual -> norm -> gate, up -> SwiGLU -> down + residual

Layers of the Llama family go this way. A layer whose weights are packed (served_weights) is two calls; one
whose linear layers are plain, or have other hooks than an adapter bank's, calls these and computes the rest
in kernels. Any other model, and any with hooks, is computed by transformers.

Shapes: T tokens, D hidden size, H query heads, Hkv key heads, Dh head size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.model import attention, cpu_kernels
from tunesmith.model.adapter_slots import Turn, slot_of
from tunesmith.model.attention import Layout
from tunesmith.model.cpu_kernels import Kernels, Layer, Matrix, OnLayer, PassAdapters
from tunesmith.model.decode_pass import DecodePass
from tunesmith.model.fast_layers import ATTENTION, LAYERS, MLP
from tunesmith.model.fused_adapters import FusedPass
from tunesmith.model.kv_cache import CacheLayout
from tunesmith.model.served_weights import PackedLinear

Forward = Callable[[Tensor, Tensor, Layout], Tensor]


def make_forward(model: nn.Module) -> Forward:
    """forward(input_ids [1, T], positions [1, T], layout) -> final hidden states [1, T, D] after the norm.

    model: after `attention.install`. Weights that change later are seen, other modules put in place of the
    model's are not.
    """
    kernels = cpu_kernels.load() if _is_known(model) else None
    slow = partial(attention.hidden_states, model)
    return slow if kernels is None else _FastForward(model, kernels, slow)


def _is_known(model: Any) -> bool:
    """True for a plain model on a CPU in float32 all of whose layers are of the Llama family."""
    decoder = attention.unwrapped(model).get_decoder()
    layers = list(getattr(decoder, "layers", []))
    first = layers[0] if layers else None
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    wide = all(_is_wide(part) for part in model.modules())
    return (
        not hasattr(model, "peft_config")
        and type(first) in LAYERS
        and all(type(layer) is type(first) and _is_silu(layer) for layer in layers)
        and on_cpu
        and wide
    )


def _is_silu(layer: Any) -> bool:
    return bool(layer.self_attn.config.hidden_act in ("silu", "swish"))


def _is_wide(part: nn.Module) -> bool:
    if isinstance(part, nn.Embedding):
        return True
    return all(value.dtype == torch.float32 for value in part.parameters(recurse=False))


class _FastForward:
    def __init__(self, model: Any, kernels: Kernels, slow: Forward) -> None:
        self._model, self._kernels, self._slow = model, kernels, slow
        self._decoder: Any = model.get_decoder()
        self._layers = [_FastLayer(layer, kernels) for layer in self._decoder.layers]
        self._linears = [part for layer in self._layers for part in layer.linears]
        self._is_packed = all(layer.packed is not None for layer in self._layers)
        self._numbers = [layer.number for layer in self._layers]
        packed = [layer.packed for layer in self._layers if layer.packed is not None]
        alike = self._is_packed and len({layer.shape for layer in self._layers}) == 1
        self._decode = DecodePass(kernels, packed, self._layers[0].scale) if alike else None
        called = {id(part) for part in (*self._linears, self._decoder.embed_tokens, self._decoder.rotary_emb)}
        # Modules that are not called here, so that hooks of theirs would be passed over.
        self._passed_over = [model, *(part for part in self._decoder.modules() if id(part) not in called)]

    def __call__(self, input_ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        if self._model.training or torch.is_grad_enabled() or any(map(_has_hooks, self._passed_over)):
            return self._slow(input_ids, positions, layout)
        x = self._decoder.embed_tokens(input_ids)[0].float().contiguous()
        cos, sin = (part[0].contiguous() for part in self._decoder.rotary_emb(x[None], positions))
        where, turn = _Pass(x, cos, sin, layout), _turn_of(self._linears[0])
        if self._is_packed and all(_is_plain(linear, turn) for linear in self._linears):
            self._fused(where, turn)
        else:
            for layer in self._layers:
                layer.by_modules(where)
        norm = self._decoder.norm
        return self._kernels.rms_norm(x, norm.weight, norm.variance_epsilon)[None]

    def _fused(self, where: _Pass, turn: Turn | None) -> None:
        current = None if turn is None else turn.current
        if current is not None and current.num_tokens != len(where.x):
            raise RuntimeError(f"{len(where.x)} tokens in a pass of {current.num_tokens}")
        adapters = None if current is None else FusedPass(current, [part.linears for part in self._layers])
        given = None if adapters is None else adapters.given
        paged = where.layout.paged(self._numbers) if isinstance(where.layout, CacheLayout) else None
        if paged is not None and self._decode is not None:
            self._decode.run_(where.x, where.cos, where.sin, paged, given)
            return
        room = self._layers[0].room(len(where.x), given)
        for number, layer in enumerate(self._layers):
            layer.fused(number, where, room)


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _turn_of(linear: nn.Module) -> Turn | None:
    # getattr would go through nn.Module's search for what is not there.
    slot = slot_of(linear) if "adapter_slot" in linear.__dict__ else None
    return None if slot is None else slot.group.turn


def _is_plain(linear: nn.Module, turn: Turn | None) -> bool:
    """True when calling the layer gives its product and no more but what the bank of `turn` adds."""
    own = _turn_of(linear) is turn
    return own and not linear._forward_pre_hooks and len(linear._forward_hooks) == (turn is not None)


class _Pass(NamedTuple):
    """x [T, D]: the residual stream, changed in place; cos and sin [T, Dh]."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    layout: Layout


class _Room(NamedTuple):
    """What the layers of a pass use one after the other."""

    normed: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    inner: Tensor
    adapters: PassAdapters | None


class _FastLayer:
    """A decoder layer; linears: its linear layers. packed: for the kernels, None where one is not packed."""

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        self._layer, self._attention, self._mlp, self._kernels = layer, layer.self_attn, layer.mlp, kernels
        self.linears: list[Any] = [getattr(self._attention, name) for name in ATTENTION]
        self.linears += [getattr(self._mlp, name) for name in MLP]
        self._head_size: int = self._attention.head_dim
        self.number: int = self._attention.layer_idx
        self.scale: float = self._attention.scaling
        self.shape = (self.scale, self._head_size, *((p.in_features, p.out_features) for p in self.linears))
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._head_norms = tuple(getattr(self._attention, name, None) for name in ("q_norm", "k_norm"))
        matrices = [part.matrix for part in self.linears if isinstance(part, PackedLinear)]
        found = [matrix for matrix in matrices if matrix is not None]
        self.packed = self._pack(found) if len(found) == len(self.linears) else None

    def _pack(self, matrices: list[Matrix]) -> Layer:
        norms = (*self._norms, *self._head_norms)
        return Layer(
            *matrices,
            *(None if norm is None else norm.weight.data_ptr() for norm in norms),
            *(0.0 if norm is None else norm.variance_epsilon for norm in norms),
            self.linears[0].out_features // self._head_size,
            self.linears[1].out_features // self._head_size,
            self._head_size,
        )

    def room(self, num_tokens: int, adapters: PassAdapters | None) -> _Room:
        q, k, v, _, gate, _, _ = self.linears
        size = self._head_size
        heads_of = [torch.empty(num_tokens, part.out_features // size, size) for part in (q, k, v)]
        normed, inner = (torch.empty(num_tokens, n) for n in (q.in_features, gate.out_features))
        return _Room(normed, (heads_of[0], heads_of[1], heads_of[2]), inner, adapters)

    def fused(self, number: int, where: _Pass, room: _Room) -> None:
        """Compute the layer, the model's number `number`, whose linear layers are packed."""
        assert self.packed is not None
        x, kernels, on = where.x, self._kernels, OnLayer(self.packed, number, room.adapters)
        kernels.before_attention(on, x, where.cos, where.sin, room.normed, room.qkv)
        seen = self._attend(where.layout, room.qkv)
        kernels.after_attention(on, x, seen, room.normed, room.inner)

    def by_modules(self, where: _Pass) -> None:
        """Compute the layer by calling its linear layers, adapters and hooks included."""
        x, cos, sin, layout = where
        q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self.linears
        normed = self._norm(0, x)
        q, k, v = (p(normed).view(len(x), -1, self._head_size) for p in (q_proj, k_proj, v_proj))
        for heads, norm in zip((q, k), self._head_norms, strict=True):
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
            self._kernels.rotate_(heads, cos, sin, weight, eps)
        x.add_(o_proj(self._attend(layout, (q, k, v))))
        normed = self._norm(1, x)
        x.add_(down_proj(self._kernels.swiglu_(gate_proj(normed), up_proj(normed))))

    def _norm(self, which: int, x: Tensor) -> Tensor:
        norm = self._norms[which]
        return self._kernels.rms_norm(x, norm.weight, norm.variance_epsilon)

    def _attend(self, layout: Layout, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """[T, H * Dh], contiguous."""
        q, k, v = (part.transpose(0, 1)[None] for part in qkv)
        seen = layout.attend(self.number, q, k, v, self.scale)
        return seen.reshape(seen.shape[1], -1).contiguous()

"""The model of a foreign stack, as shapes: transformers' own class, with the layers that the stack puts in.

Built on torch's meta device; `model.shape.make_fake` makes it compute. LoRA is as peft computes it, a
quantised base as bitsandbytes and GPTQ lay it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.model.shape import meta_model
from tunesmith.plan.decoder import Shape
from tunesmith.plan.facts_types import Unknown
from tunesmith.plan.stack import Stack
from tunesmith.plan.stock_ops import (
    DequantisedProduct,
    Dropped,
    FlashAttention,
    FusedLora,
    FusedRmsNorm,
    MemoryEfficientAttention,
)
from tunesmith.plan.stock_words import ALL, ATTENTION

NAME = "tunesmith-stock"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far the built model may be from the published count of parameters.
COUNT_TOLERANCE = 0.005
# bitsandbytes: weights that share a scale, scales that share one; GPTQ: weights that share one.
BLOCK, NESTED, GROUP = 64, 256, 128


def build(stack: Stack, layers: int) -> Any:
    """The model of the stack with so many layers, on meta, trained parameters marked. Raises Unknown."""
    model = meta_model(transformers_config(stack.shape), DTYPES[stack.weights], layers=layers)
    model.config._attn_implementation = NAME
    model.requires_grad_(stack.method == "full")
    with torch.device("meta"):
        _prepare_base(model, stack)
        if stack.method == "lora":
            _attach(model, stack)
        _swap(model, stack)
    return model.train()


def blocks(model: Any) -> list[Any]:
    """The decoder layers."""
    decoder = model.get_decoder()
    return list(decoder.layers if hasattr(decoder, "layers") else decoder.h)


def transformers_config(shape: Shape) -> Any:
    """A configuration of transformers that builds this shape. Raises Unknown where none does."""
    import transformers

    common = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 1 << 17,
        "use_cache": False,
    }
    if shape.gated and shape.norm == "rms":
        if shape.norms_per_layer == 4:
            return transformers.Gemma2Config(**common, head_dim=shape.head_dim)
        if re.search(r"granite-[34]", shape.hf_id.lower()):  # as Llama, with factors on what is added
            return transformers.GraniteConfig(**common)
        if shape.qk_norm:
            return transformers.Qwen3Config(**common, head_dim=shape.head_dim)
        if shape.qkv_bias:
            return transformers.Qwen2Config(**common)
        return transformers.LlamaConfig(**common, head_dim=shape.head_dim)
    if not shape.gated and shape.norm == "layer":
        if shape.norms_per_layer == 1:
            return transformers.PhiConfig(**common)
        if shape.kv_heads == 1:
            return _big_code(shape)
        return transformers.Starcoder2Config(**common)
    raise Unknown("no model of transformers with this MLP and these norms is known")


def _big_code(shape: Shape) -> Any:
    """Positions are learned: as many as the published count of parameters leaves for them."""
    import transformers

    per_layer = (
        shape.hidden * (2 * shape.hidden + 2 * shape.head_dim + 2 * shape.intermediate)
        + 7 * shape.hidden
        + 2 * shape.head_dim
        + shape.intermediate
    )
    rest = (shape.num_params or 0) - shape.layers * per_layer - shape.vocab * shape.hidden
    return transformers.GPTBigCodeConfig(
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.intermediate,
        vocab_size=shape.vocab,
        n_positions=max(1, round(rest / shape.hidden)) if shape.num_params else 2048,
        multi_query=True,
        tie_word_embeddings=shape.tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


@cache
def check_count(shape: Shape) -> None:
    """Raises Unknown when the model has not the published number of parameters."""
    if shape.num_params is None:
        return
    config = transformers_config(shape)
    one, two = (
        sum(p.numel() for p in meta_model(config, torch.bfloat16, layers=few).parameters()) for few in (1, 2)
    )
    built = one + (shape.layers - 1) * (two - one)
    if abs(built / shape.num_params - 1) > COUNT_TOLERANCE:
        raise Unknown(f"this shape has {built:,} parameters, the row tells {shape.num_params:,}")


def _prepare_base(model: Any, stack: Stack) -> None:
    if stack.base != "plain":
        for block in blocks(model):
            for name, linear in _linears(block):
                block.set_submodule(name, QuantisedLinear(linear, stack))
    if stack.upcast != "none":
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and ("norm" in name or "ln_" in name or stack.upcast == "all"):
                module.float()


def _linears(block: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def _attach(model: Any, stack: Stack) -> None:
    found: set[str] = set()
    for block in blocks(model):
        for name, module in list(block.named_modules()):
            wanted = stack.targets == (ALL,) or name.rsplit(".", 1)[-1] in stack.targets
            if wanted and isinstance(module, nn.Linear | QuantisedLinear):
                fused = stack.fused_lora and name.rsplit(".", 1)[-1] in ATTENTION
                block.set_submodule(name, LoraLinear(module, stack, fused=fused))
                found.add(name.rsplit(".", 1)[-1])
    missing = [name for name in stack.targets if name not in found and name != ALL]
    if missing or not found:
        raise Unknown(f"no layer of this model is called {' or '.join(missing or stack.targets)}")
    if stack.trains_embeddings:
        _copy_embeddings(model)


def _copy_embeddings(model: Any) -> None:
    """peft's modules_to_save: the originals stay beside the trained copies."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.original = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
        module.weight.requires_grad_(True)


def _swap(model: Any, stack: Stack) -> None:
    """The stack's norms and dropout in place of the model's."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if stack.fused_kernels and kind.endswith("RMSNorm"):
            model.set_submodule(name, FusedNorm(module))
        elif isinstance(module, nn.LayerNorm):
            model.set_submodule(name, CudaLayerNorm(module))
        elif isinstance(module, nn.Dropout) and module.p > 0:
            model.set_submodule(name, MaskedDropout())


class QuantisedLinear(nn.Module):
    """Four bits a weight, and the scales: fp32 a block of 64, or 8 bits and fp32 a block of those."""

    def __init__(self, linear: nn.Linear, stack: Stack) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute = DTYPES[stack.compute]
        count = linear.weight.numel()
        self.packed = nn.Buffer(torch.empty(count // 2, dtype=torch.uint8))
        self.bias = linear.bias
        self.scratch, self.cloned = 0, stack.base == "nf4"
        if stack.base == "gptq":
            self.scales = nn.Buffer(torch.empty(count // GROUP, dtype=torch.float16))
            self.zeros = nn.Buffer(torch.empty(count // GROUP // 2, dtype=torch.uint8))
            self.groups = nn.Buffer(torch.empty(self.in_features, dtype=torch.int32))
        elif stack.double_quant:
            self.scratch = count // BLOCK
            self.scales = nn.Buffer(torch.empty(count // BLOCK, dtype=torch.uint8))
            self.nested = nn.Buffer(torch.empty(-(-count // BLOCK // NESTED)))
        else:
            self.scales = nn.Buffer(torch.empty(count // BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        out = DequantisedProduct.apply(x.to(self.compute), self.packed, self.out_features, self.scratch)
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        return out.to(given)


class LoraLinear(nn.Module):
    """A layer and its adapter, step by step as peft computes them."""

    def __init__(self, base: Any, stack: Stack, *, fused: bool) -> None:
        super().__init__()
        dtype = DTYPES[stack.adapters]
        self.base, self.fused = base, fused
        self.dropout = MaskedDropout() if stack.dropout else nn.Identity()
        self.a = nn.Linear(base.in_features, stack.rank, bias=False, dtype=dtype)
        self.b = nn.Linear(stack.rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            x = x.to(self.base.compute)
            base, dropout = self.base, isinstance(self.dropout, MaskedDropout)
            return FusedLora.apply(x, base.packed, self.a.weight, self.b.weight, base.scratch, dropout)
        result = self.base(x)
        if isinstance(self.base, QuantisedLinear):
            if self.base.cloned:
                result = result.clone()
            if torch.is_autocast_enabled("cpu"):
                return result + self.b(self.a(self.dropout(x))) * 2.0
        given, x = result.dtype, x.to(self.a.weight.dtype)
        result = result + self.b(self.a(self.dropout(x))) * 2.0
        return result.to(given)


class FusedNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return FusedRmsNorm.apply(x, self.weight)


class CudaLayerNorm(nn.Module):
    """CUDA's autocast makes layer norms in fp32; that of fake CPU tensors would not."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.shape = norm.weight, norm.bias, norm.normalized_shape

    def forward(self, x: Tensor) -> Tensor:
        tensors: tuple[Tensor, ...] = (x, self.weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            tensors = tuple(tensor.float() for tensor in tensors)
        x, weight, bias = tensors
        return nn.functional.layer_norm(x, self.shape, weight, bias)


class MaskedDropout(nn.Module):
    """Dropout as CUDA computes it, with a mask of one byte each."""

    def forward(self, x: Tensor) -> Tensor:
        return Dropped.apply(x) if self.training else x


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, S, D] -> [B, S, H, D]."""
    kind, repeats, compute = module.config.stock_attention
    if repeats:
        key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    query, key, value = (t.to(compute) if t.dtype == torch.float32 else t for t in (query, key, value))
    if kind == "flash":
        return FlashAttention.apply(query, key, value), None
    key, value = (_repeated(t, query.shape[1]) for t in (key, value))
    if kind == "efficient":
        return MemoryEfficientAttention.apply(query, key, value), None
    scores = torch.matmul(query, key.transpose(2, 3)) * 1.0
    scores = scores + scores.new_empty(1, 1, *scores.shape[-2:])
    shares = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), None


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    batch, few, length, size = tensor.shape
    if few == heads:
        return tensor
    wide = tensor[:, :, None].expand(batch, few, heads // few, length, size)
    return wide.reshape(batch, heads, length, size)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def fused_rotation(model: Any, fused: bool) -> Iterator[None]:
    """Within it q and k are turned where they lie, as Triton's kernels do it."""
    source = sys.modules[type(model).__module__]
    name = "apply_rotary_pos_emb"
    if not fused or not hasattr(source, name):
        yield
        return
    before = getattr(source, name)
    setattr(source, name, lambda q, k, *_, **__: (q, k))
    try:
        yield
    finally:
        setattr(source, name, before)

"""What Liger's kernels keep and take, for a step that is traced for a card (Hsu et al. 2024,
arXiv:2410.10989; read from liger-kernel 0.8.5).

Their results have the shapes of transformers' own; what differs is what they save, and where they write:

- RMSNorm saves its input and the inverse root of each row in fp32. The gradient takes the place of the one
  that came; that of a trained weight is summed from one row in fp32 for each multiprocessor.
- SwiGLU and GEGLU save both products, and both gradients take the place of them.
- The rotation writes over q and k, its gradient over theirs, and it saves the tables of sines and cosines.

Nothing is computed here: the tensors are fake. The loss is our own with Liger's kernels too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Models that Liger patches in this way; others that it knows differ, and are traced as transformers has them.
KINDS = ("gemma", "llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")
MLP = ("gate_proj", "up_proj", "down_proj")
# Of an A100. The sum takes 4 bytes a multiprocessor and column: 2 MB where 4,096 are wide.
MULTIPROCESSORS = 108


@contextmanager
def imagined_liger(model: Any) -> Iterator[None]:
    """Within it the layers of `model`, a transformers model without adapters around it, keep and take what
    they do under Liger's kernels; the norms and products of `model` stay so, its kind's rotation does not."""
    if model.config.get_text_config().model_type not in KINDS:
        yield
        return
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(_norm, part)
        elif all(hasattr(part, name) for name in MLP):
            part.forward = partial(_gated, part)
    with _rotating(sys.modules[type(model).__module__]):
        yield


@contextmanager
def _rotating(module: Any) -> Iterator[None]:
    before = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = _rotate
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = before


def _norm(part: nn.Module, hidden_states: Tensor) -> Tensor:
    out: Tensor = RmsNorm.apply(hidden_states.contiguous(), part.weight)
    return out


def _gated(part: Any, x: Tensor) -> Tensor:
    out: Tensor = part.down_proj(Gated.apply(part.gate_proj(x), part.up_proj(x)))
    return out


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    turned: tuple[Tensor, Tensor] = Rotation.apply(q, k, cos, sin)
    return turned


class RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _, weight, _ = ctx.saved_tensors
        dx = grads[0].contiguous()
        if not ctx.needs_input_grad[1]:
            return dx, None
        sums = torch.empty(MULTIPROCESSORS, len(weight), dtype=torch.float32)
        return dx, sums.sum(dim=0).to(weight.dtype)


class Gated(torch.autograd.Function):
    """activation(gate) * up, of any activation."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate.contiguous(), up.contiguous())
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        return gate, up


class Rotation(torch.autograd.Function):
    """q, k: [B, H, L, D], views of what products made as [B, L, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _laid_out(q), _laid_out(k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _laid_out(grads[0]), _laid_out(grads[1]), None, None


def _laid_out(heads: Tensor) -> Tensor:
    """The same memory, unless it must be laid out token by token first."""
    return heads.transpose(1, 2).contiguous().transpose(1, 2)

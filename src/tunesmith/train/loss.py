"""Cross-entropy from hidden states, chunk by chunk: logits only where there is a label, never all at once.

The gradient of a chunk's logits, softmax minus one-hot, is known when its loss is. So it goes straight on
into the gradients of the hidden states and of the head, and no logits are kept for the backward pass.

Shapes: T tokens of a micro-batch, N of them with a label, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tunesmith.model.batch import IGNORE
from tunesmith.model.fast_math import row_blocks
from tunesmith.model.hardware import abridged, compute_dtype

# Elements of the largest logits chunk: 64 MiB in fp32.
CHUNK_ELEMENTS = 1 << 24


def loss_sum(head: nn.Module, hidden_1TD: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over the labelled tokens of -log p(token | tokens before it), as a scalar of at least fp32.

    hidden_1TD: final hidden states of the flat stream; labels_T: not shifted, IGNORE where there is none; the
    first token has none. Divide by the labels of the whole optimizer step to get its loss.
    """
    places = (labels_T != IGNORE).nonzero().squeeze(1)
    hidden_ND = hidden_1TD[0].index_select(0, places - 1)
    targets_N = labels_T.index_select(0, places)
    if type(head) is nn.Linear:
        return _linear_loss(hidden_ND, head, targets_N)
    return _module_loss(hidden_ND, head, targets_N)


def _linear_loss(hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor) -> Tensor:
    dtype = compute_dtype(head.weight)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        total: Tensor = _ChunkedLoss.apply(
            hidden_ND.to(dtype), head.weight, head.bias, targets_N, torch.is_grad_enabled()
        )
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, train: bool
    ) -> Tensor:
        wanted = [train and needed for needed in ctx.needs_input_grad[:3]]
        dtype = hidden_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        d_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        d_weight = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=exact) if wanted[2] and bias_V is not None else None
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        rows = max(1, CHUNK_ELEMENTS // len(weight))
        for part in abridged([slice(at, at + rows) for at in range(0, len(hidden_ND), rows)]):
            into = None if d_hidden is None else d_hidden[part], d_weight, d_bias
            total += _chunk_loss(hidden_ND[part], weight, bias, targets_N[part], exact, into)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # In place: d_weight is the largest tensor of a step. A second backward pass raises, as it must.
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden.mul_(scale),
            None if d_weight is None else d_weight.mul_(scale).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(scale).to(bias_dtype),
            None,
            None,
        )


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    exact: torch.dtype,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """A chunk's loss; its gradients are added into those of weight and bias and written to its hidden's.

    A function of its own, so that no chunk's logits live on while the next one's are made.
    """
    logits = F.linear(hidden, weight, bias).to(exact)
    losses, sums = _losses_into_gradient(logits, targets)
    if any(gradient is not None for gradient in into):
        _spread(logits, sums, hidden, weight, into)
    return losses.sum()


def _losses_into_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(losses [n], sums [n, 1]) of a chunk's logits [n, V], which become the gradient times `sums`, in place.

    Worked out in blocks of rows that stay in a core's cache.
    """
    losses, sums = logits.new_empty(len(logits)), logits.new_empty(len(logits), 1)
    for rows in row_blocks(logits):
        block, target = logits[rows], targets[rows, None]
        at_target = block.gather(1, target)
        highest = block.amax(1, keepdim=True)
        sums[rows] = block.sub_(highest).exp_().sum(1, keepdim=True)
        losses[rows] = (sums[rows].log() + highest - at_target)[:, 0]
        block.scatter_add_(1, target, -sums[rows])
    return losses, sums


def _spread(
    scaled: Tensor,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Carry the gradient of a chunk's logits, `scaled` / `sums`, on into those of hidden, weight and bias."""
    d_hidden, d_weight, d_bias = into
    if scaled.dtype != hidden.dtype:  # divided before it is rounded
        scaled = scaled.div_(sums)
        sums = torch.ones_like(sums)
    if d_bias is not None:
        d_bias += (scaled / sums).sum(0)
    d_logits = scaled.to(hidden.dtype)
    if d_hidden is not None:
        torch.mm(d_logits, weight, out=d_hidden)
        d_hidden.div_(sums)
    if d_weight is not None and d_weight.dtype == hidden.dtype:
        d_weight.addmm_(d_logits.T, hidden / sums)
    elif d_weight is not None:
        d_weight += d_logits.T @ hidden


def _module_loss(hidden_ND: Tensor, head: nn.Module, targets_N: Tensor) -> Tensor:
    """For a head that is no plain linear layer, such as one with an adapter: each chunk is computed twice."""

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    rows = max(1, CHUNK_ELEMENTS // _vocabulary(head))
    chunks = [
        checkpoint(chunk_loss, hidden_ND[at : at + rows], targets_N[at : at + rows], use_reentrant=False)
        for at in range(0, len(hidden_ND), rows)
    ]
    return torch.stack(chunks).sum()


def _vocabulary(head: nn.Module) -> int:
    return max(parameter.shape[0] for parameter in head.parameters() if parameter.dim() == 2)

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
    device = hidden_ND.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    with torch.autocast(device, enabled=False):
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
        for at in range(0, len(hidden_ND), rows):
            hidden = hidden_ND[at : at + rows]
            logits = F.linear(hidden, weight, bias).to(exact)
            total += _loss_into_gradient(logits, targets_N[at : at + rows], any(wanted))
            if not any(wanted):
                continue
            d_logits = logits.to(dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[at : at + rows])
            if d_weight is not None:
                d_weight += d_logits.T @ hidden
            if d_bias is not None:
                d_bias += logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * scale.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(weight_dtype),
            None if d_bias is None else (d_bias * scale).to(bias_dtype),
            None,
            None,
        )


def _loss_into_gradient(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The summed loss of a chunk [n, V]; with `gradient`, `logits` become the loss's gradient in place."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest).exp_()
    sums = logits.sum(1, keepdim=True)
    loss = (sums.log() + highest).squeeze(1) - at_target
    if gradient:
        logits.div_(sums)
        logits[torch.arange(len(targets), device=targets.device), targets] -= 1
    return loss.sum()


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

"""Log-probabilities of given tokens with their gradients, chunk by chunk: never all logits at once.

What a preference's gradient is depends on the whole sums, known only after the forward pass. But the
gradient of one token's log-probability by its own hidden state, one-hot minus softmax through the head, does
not: with a frozen head it is taken while the logits are there, and scaled in the backward pass. A head that
is trained needs the logits again then.

Shapes: T tokens of a micro-batch, N of them with a label, D hidden size, V vocabulary; P documents of the
batch, B answers of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tunesmith.model.attention import hidden_states, lm_head
from tunesmith.model.batch import IGNORE, Batch
from tunesmith.model.branches import layout_of
from tunesmith.model.hardware import compute_dtype

# Elements of the largest logits chunk: 64 MiB in fp32.
CHUNK_ELEMENTS = 1 << 24


def answer_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(log p(answer | prompt) [P, B] float64, its tokens [P, B] float64) of a batch that has branches."""
    assert batch.branches is not None
    device = next(model.parameters()).device
    places = np.flatnonzero(batch.labels != IGNORE)
    input_ids = torch.from_numpy(batch.input_ids).to(device)[None]
    positions = torch.from_numpy(batch.positions).to(device)[None]
    hidden_TD = hidden_states(model, input_ids, positions, layout_of(batch))[0]
    hidden_ND = hidden_TD.index_select(0, torch.from_numpy(batch.predictors[places]).to(device))
    logps_N = token_logprobs(lm_head(model), hidden_ND, torch.from_numpy(batch.labels[places]).to(device))
    shape = batch.num_documents, batch.branches.shape[1] - 1
    owners = _owners(batch)[places]
    sums = torch.zeros(shape[0] * shape[1], dtype=torch.float64, device=device)
    sums = sums.index_add(0, torch.from_numpy(owners).to(device), logps_N.double())
    counts = np.bincount(owners, minlength=len(sums)).astype(np.float64)
    return sums.view(shape), torch.from_numpy(counts).to(device).view(shape)


def _owners(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[T]: the number of the answer that a token belongs to, document by document; -1 for prompts."""
    assert batch.branches is not None
    width = batch.branches.shape[1]
    blocks = np.repeat(np.arange(batch.branches.size), batch.branches.ravel())
    document, part = blocks // width, blocks % width
    return np.where(part > 0, document * (width - 1) + part - 1, -1)


def token_logprobs(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) [N], at least fp32, of the head's distribution at every hidden state."""
    if type(head) is not nn.Linear:
        return _module_logprobs(head, hidden_ND, targets_N)
    dtype = compute_dtype(head.weight)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logps: Tensor = _LogProbs.apply(
            hidden_ND.to(dtype), head.weight, head.bias, targets_N, torch.is_grad_enabled()
        )
    return logps


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, train: bool
    ) -> Tensor:
        dtype = hidden_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        trains_head = train and any(ctx.needs_input_grad[1:3])
        unit_ND = (
            torch.empty_like(hidden_ND) if train and ctx.needs_input_grad[0] and not trains_head else None
        )
        logps_N = torch.empty(len(hidden_ND), dtype=exact, device=hidden_ND.device)
        for rows in _chunks(len(hidden_ND), len(weight)):
            logits = F.linear(hidden_ND[rows], weight, bias).to(exact)
            logps_N[rows] = _logprobs_into_softmax(logits, targets_N[rows])
            if unit_ND is not None:
                torch.mm(_onehot_minus(logits, targets_N[rows]).to(dtype), weight, out=unit_ND[rows])
            del logits  # else they live on while the next chunk's are made
        ctx.trains_head = trains_head
        if trains_head:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        else:
            ctx.save_for_backward(unit_ND)
        return logps_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.trains_head:
            return *_with_head(ctx, grads[0]), None, None
        (unit_ND,) = ctx.saved_tensors
        hidden = None if unit_ND is None else (unit_ND * grads[0][:, None]).to(unit_ND.dtype)
        return hidden, None, None, None, None


def _with_head(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by the hidden states, the head's weight and its bias."""
    hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
    wanted, dtype = ctx.needs_input_grad, hidden_ND.dtype
    weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    exact = grad_N.dtype
    d_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
    d_weight = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
    d_bias = torch.zeros_like(bias_V, dtype=exact) if wanted[2] and bias_V is not None else None
    for rows in _chunks(len(hidden_ND), len(weight)):
        logits = F.linear(hidden_ND[rows], weight, bias).to(exact)
        _logprobs_into_softmax(logits, targets_N[rows])
        by_logits = _onehot_minus(logits, targets_N[rows]).mul_(grad_N[rows, None])
        d_logits = by_logits.to(dtype)
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            d_weight += d_logits.T @ hidden_ND[rows]
        if d_bias is not None:
            d_bias += by_logits.sum(0)
        del logits, by_logits, d_logits
    return (
        d_hidden,
        None if d_weight is None else d_weight.to(weight_VD.dtype),
        None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype),
    )


def _chunks(count: int, vocabulary: int) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(at, min(at + rows, count)) for at in range(0, count, rows)]


def _logprobs_into_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets [n]; `logits` [n, V] become the probabilities in place."""
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest).exp_()
    sums = logits.sum(1, keepdim=True)
    logits.div_(sums)
    return at_target - (sums.log() + highest).squeeze(1)


def _onehot_minus(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The gradient of log p(target) by the logits, in place of the probabilities [n, V]."""
    probabilities.neg_()
    probabilities[torch.arange(len(targets), device=targets.device), targets] += 1
    return probabilities


def _module_logprobs(head: nn.Module, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """For a head that is no plain linear layer, such as one with an adapter: each chunk is computed twice."""

    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return -F.cross_entropy(logits.to(exact), targets, reduction="none")

    vocabulary = max(parameter.shape[0] for parameter in head.parameters() if parameter.dim() == 2)
    parts = [
        checkpoint(chunk, hidden_ND[rows], targets_N[rows], use_reentrant=False)
        for rows in _chunks(len(hidden_ND), vocabulary)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=torch.float32)

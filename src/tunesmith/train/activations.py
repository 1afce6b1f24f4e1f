"""What the backward pass needs of the forward pass: kept, computed again, or put into host memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tunesmith.core.errors import UserError
from tunesmith.model.attention import unwrapped
from tunesmith.recipe.schema import Checkpointing

ATEN = torch.ops.aten
# What costs time to compute again; everything else of a layer is a pass over memory. No batched products: our
# own attention and its like change theirs in place.
ATTENTION = frozenset(
    {
        ATEN._scaled_dot_product_flash_attention.default,
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        ATEN._scaled_dot_product_efficient_attention.default,
        ATEN._scaled_dot_product_cudnn_attention.default,
        ATEN._flash_attention_forward.default,
        ATEN._efficient_attention_forward.default,
    }
)
PRODUCTS = frozenset({ATEN.mm.default, ATEN.addmm.default})
# Smaller tensors are not worth a copy to the host and back.
MIN_OFFLOAD_BYTES = 1 << 20


def checkpoint_layers(model: Any, kind: Checkpointing) -> None:
    """Let every decoder layer keep its input alone ("full"; Chen et al. 2016, arXiv:1604.06174), or that and
    what is dear to compute again ("selective"; Korthikanti et al. 2022, arXiv:2205.05198): attention, and
    without adapters matrix products. Layers that `model.fast_layers` computes are selective of themselves.

    model: plain or PeftModel. Raises UserError for a model whose layers cannot be computed again.
    """
    if kind == "none":
        return
    inner = unwrapped(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        raise UserError(
            f"train.gradient_checkpointing: '{kind}': {type(inner).__name__} has no layers that can be "
            "computed again",
            hint="take 'none', and a smaller data.max_length or micro_batch_size where memory is short",
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        # An adapter's product is added into its base's, in place: what was kept would be added to again.
        dear = ATTENTION if inner is not model else ATTENTION | PRODUCTS
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, dear))
    inner.activation_checkpointing_enable(settings)


def _keep(dear: frozenset[Any], _: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in dear else CheckpointPolicy.PREFER_RECOMPUTE


class OffloadedActivations:
    """Puts what a forward pass saves for the backward pass into pinned host memory, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def context(self) -> AbstractContextManager[Any]:
        """For the forward pass; the backward pass, outside of it, brings each tensor back when needed."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if tensor.nbytes < MIN_OFFLOAD_BYTES or self._is_weight(tensor):
            return tensor
        on_gpu = tensor.is_cuda
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=on_gpu)
        # Both copies run on the stream that computes, which so never overtakes them.
        return tensor.device, host.copy_(tensor, non_blocking=on_gpu)

    def _is_weight(self, tensor: Tensor) -> bool:
        """Also of one that is gathered anew for every pass, wherever it lies then."""
        whole = tensor if tensor._base is None else tensor._base
        return isinstance(whole, nn.Parameter) or tensor.untyped_storage().data_ptr() in self.weights


def _unpack(packed: tuple[torch.device, Tensor] | Tensor) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)

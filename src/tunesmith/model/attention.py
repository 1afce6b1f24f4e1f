"""Attention that asks a layout what every token may see, instead of masks and padding.

A forward pass here has batch size 1 and no pad tokens: documents lie end to end. Which keys a token
attends to is the layout's matter: `PackedLayout` confines it to its own document (training, evaluation);
the generator brings one that reads a key/value cache.

Shapes: T tokens, H query heads, Hkv key/value heads, Dh head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.core.errors import UserError
from tunesmith.model.fast_attention import attend_documents
from tunesmith.model.prefixes import Shared, SharedLayout, find_shared

NAME = "tunesmith"


class Layout(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [1, H, T, Dh], k and v [1, Hkv, T, Dh] of decoder layer `layer` -> [1, T, H, Dh]."""
        ...


class PackedLayout:
    """Causal attention within each document; nothing crosses a document's border.

    starts [documents + 1]: document d is tokens starts[d]:starts[d+1]; ids [T]: the tokens where they are at
    hand, so that they need not be asked back from the device.
    """

    def __init__(
        self, starts: NDArray[np.int64] | Sequence[int], ids: NDArray[np.int64] | None = None
    ) -> None:
        self.lengths: list[int] = np.diff(np.asarray(starts)).tolist()
        self.ids = ids

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dropout: float = 0.0,
        own: Sequence[int] | None = None,
    ) -> Tensor:
        """own: how many last tokens of each document q has (`attend_documents`)."""
        return attend_documents(q, k, v, self.lengths, scale, dropout, own)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; without a `layout` it is their own sdpa."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    extra = {"dropout": dropout} if dropout else {}
    return layout.attend(module.layer_idx, query, key, value, scale, **extra), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: nn.Module, *, max_length: int | None = None) -> None:
    """Switch a model (plain or PeftModel) to attention by layout; without a layout it computes as before.

    max_length: most tokens that a token will ever look back on; default: the model's context.
    Raises UserError for models whose attention or logits this does not reproduce.
    """
    inner = unwrapped(model)
    fault = _unsupported(inner, max_length)
    if fault:
        raise UserError(
            f"{inner.config.name_or_path or type(inner).__name__}: {fault}, which is not supported",
            hint="use a decoder with plain causal attention, such as Llama, Qwen2, Qwen3, Mistral or SmolLM",
        )
    inner.set_attn_implementation(NAME)


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _unsupported(model: Any, max_length: int | None) -> str | None:
    """What of the model's attention or logits a layout cannot do; None when it can do all."""
    config = model.config.get_text_config()
    reach = max_length or getattr(config, "max_position_embeddings", None) or 2**31
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = "sliding_attention" in kinds or (
        getattr(config, "layer_types", None) is None and getattr(config, "use_sliding_window", True)
    )
    if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        return f"'{config.model_type}' does not take its attention from transformers' attention interface"
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind '{min(others)}'"
    if window is not None and slides and window < reach:
        return f"its sliding window of {window} tokens is shorter than the context of {reach}"
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"its config has {name} = {getattr(config, name)}"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return "its attention is not causal"
    if any(name.endswith(("sinks", "sink")) for name, _ in model.named_parameters()):
        return "its attention has sinks"
    return None


def hidden_states(model: nn.Module, input_ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Final hidden states [1, T, D] after the last norm, before the output head.

    model: plain or PeftModel, after `install`; input_ids and positions [1, T] int64.
    """
    shared = _shared(model, input_ids, layout)
    if shared is None:
        return _decode(model, input_ids, positions, layout)
    kept = shared.kept
    hidden = _decode(model, input_ids[:, kept], positions[:, kept], SharedLayout(layout, shared))
    return shared.spread(hidden[0])[None]


def _shared(model: nn.Module, input_ids: Tensor, layout: Layout) -> Shared | None:
    """Common beginnings of the documents; none where every token draws random numbers of its own."""
    if type(layout) is not PackedLayout or len(layout.lengths) == 1 or _draws(model):
        return None
    ids = input_ids[0].cpu().numpy() if layout.ids is None else layout.ids
    found = find_shared(ids, layout.lengths)
    return None if found is None else found.to(input_ids.device)


def _draws(model: nn.Module) -> bool:
    """True for a model in training that drops activations, or adds noise to its embeddings."""
    if not model.training:
        return False
    inner = unwrapped(model)
    dropout = getattr(inner.config.get_text_config(), "attention_dropout", None)
    # A hook on the embeddings is how noise gets into them (NEFTune).
    noise = inner.get_input_embeddings()._forward_hooks
    return bool(dropout or noise) or any(type(p) is nn.Dropout and p.p > 0 for p in inner.modules())


def _decode(model: nn.Module, input_ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    decoder = unwrapped(model).get_decoder()
    # A mask of four dimensions is handed on untouched: transformers then builds none of size T x T.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    out = decoder(
        input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=False, layout=layout
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def lm_head(model: nn.Module) -> nn.Module:
    """The module from hidden states [..., D] to logits [..., vocabulary]."""
    return unwrapped(model).get_output_embeddings()

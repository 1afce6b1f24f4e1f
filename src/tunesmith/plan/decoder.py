"""Sizes of a decoder, and where they are read: from a transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder. gated: three matrices in the MLP; norm: kind of its norms, "layer" has biases;
    context: its positions; num_params: as published, for checking; hf_id: its name at the hub, or empty."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norms_per_layer: int = 2
    context: int = 32768
    num_params: int | None = None
    hf_id: str = ""

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    def token_bytes(self, bytes_each: int, cards: int = 1) -> int:
        """One token's keys and values in all layers, on one of `cards`; too few heads are copied."""
        heads = max(1, self.kv_heads // cards)
        return 2 * self.layers * heads * self.head_dim * bytes_each


def shape_of(config: Any) -> Shape:
    """The sizes that a transformers configuration names. Raises AttributeError for no decoder's."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=_inner(text),
        vocab=text.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        gated=getattr(text, "hidden_act", "silu") in ("silu", "swish") or "gemma" in text.model_type,
        context=getattr(text, "max_position_embeddings", None) or 2048,
    )


def _inner(text: Any) -> int:
    """Width of what a token goes through in an MLP: of a whole one, or of all experts that it is sent to."""
    whole = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    return int(max(whole, chosen * (getattr(text, "moe_intermediate_size", None) or whole)))

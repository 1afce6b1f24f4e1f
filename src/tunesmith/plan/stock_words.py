"""What the words of published rows mean: layers with adapters, optimizers."""

from __future__ import annotations

import re
from typing import Any, Literal

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
ALL = "all-linear"
# What other implementations call Llama's layers; Qwen's first generation: fused attention, and `c_proj` the
# last of both halves.
ALIASES = {
    "w1": ("gate_proj",),
    "w2": ("up_proj",),
    "w3": ("down_proj",),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),
}

# Words that name no other optimizer.
PLAIN = re.compile(
    r"adamw?|torch|pytorch|hf|foreach|fused|paged|bnb|bitsandbytes|(8|32).?bit|sgd|default|[\W_]"
)


def linear_names(told: Any, *, gated: bool) -> tuple[str, ...]:
    """told: a list of names, or a text; gated: the layers are Llama's. Returns () when nothing is told."""
    if isinstance(told, str):
        if "all" in told.lower():
            return GATED if gated else (ALL,)
        told = re.findall(r"\w+", told)
    if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
        return ()
    if not gated:
        return tuple(told)
    return tuple(name for each in told for name in ALIASES.get(each, (each,)))


def optimizer_kind(told: str) -> Literal["adamw", "adamw-fused", "bnb", "sgd"] | None:
    """Whose AdamW (torch's, its fused one, bitsandbytes') or SGD a lower-case name means; None for others."""
    if PLAIN.sub("", told):
        return None
    if re.search(r"paged|bnb|bitsandbytes|bit", told):
        return "bnb"
    if "adam" in told:
        return "adamw-fused" if "fused" in told else "adamw"
    return "sgd" if "sgd" in told else None

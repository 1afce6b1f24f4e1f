"""The shape of a published row's model, from its `config`."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.plan.decoder import Shape
from tunesmith.plan.facts_types import Row, Unknown, is_count

SIZES = ("layers", "hidden", "heads", "intermediate", "vocab")
EXPERTS = ("experts", "num_experts", "n_experts", "num_local_experts")
# Families of models whose every member has a gated MLP and RMS norms, by their names.
LIKE_LLAMA = re.compile(r"llama|mistral|qwen|gemma|smollm|\byi-|internlm|deepseek-llm|olmo-2|granite-[34]")
BIASED = re.compile(r"qwen(1\.5|2|2\.5)?-(?!3)")
NORMED_HEADS = re.compile(r"qwen-?3|olmo-2")


def parse_shape(row: Row) -> Shape:
    """The shape of the row's `config`; what it leaves out is that of its model's family, where its name tells
    one. Raises Unknown naming what is missing."""
    config = row.get("config")
    if not isinstance(config, dict):
        raise Unknown("the model's shape is not told")
    for name in SIZES:
        if not is_count(config.get(name)):
            raise Unknown(f"the model's {name} is {config.get(name)!r}")
    if any(config.get(name) for name in EXPERTS):
        raise Unknown("a mixture of experts is not traced")
    name = f"{config.get('hf_id') or ''} {row.get('model') or ''}".lower().strip()
    gated, rms = _kinds(config, name)
    heads = config["heads"]
    shape = Shape(
        layers=config["layers"],
        hidden=config["hidden"],
        heads=heads,
        kv_heads=config.get("kv_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden"] // heads,
        intermediate=config["intermediate"],
        vocab=config["vocab"],
        tied=bool(config.get("tied_embeddings")),
        gated=gated,
        norm="rms" if rms else "layer",
        norms_per_layer=config.get("norms_per_layer") or 2,
        qkv_bias=_told(config, "qkv_bias", BIASED, name),
        qk_norm=_told(config, "qk_norm", NORMED_HEADS, name),
        num_params=config.get("n_params"),
        hf_id=str(config.get("hf_id") or ""),
    )
    _check(shape)
    return shape


def _kinds(config: dict[str, Any], name: str) -> tuple[bool, bool]:
    """Whether the MLP is gated, and whether its norms are RMS norms."""
    mlp, norm = (str(config.get(key) or "").lower() for key in ("mlp", "norm"))
    if LIKE_LLAMA.search(name):
        mlp, norm = mlp or "gated", norm or "rms"
    if not mlp or not norm:
        raise Unknown("whether the MLP is gated, or the kind of its norms, is not told")
    return "gate" in mlp or "glu" in mlp or mlp.startswith("3"), "rms" in norm


def _told(config: dict[str, Any], key: str, families: re.Pattern[str], name: str) -> bool:
    value = config.get(key)
    return bool(families.search(name)) if value is None else bool(value)


def _check(shape: Shape) -> None:
    for name in ("kv_heads", "head_dim", "norms_per_layer"):
        if not is_count(getattr(shape, name)):
            raise Unknown(f"the model's {name} is {getattr(shape, name)!r}")
    if shape.num_params is not None and not is_count(shape.num_params):
        raise Unknown(f"the model's n_params is {shape.num_params!r}")
    if shape.heads % shape.kv_heads:
        raise Unknown(f"{shape.heads} query heads cannot share {shape.kv_heads} key heads")

"""What is wanted of an engine, as plain data: it may be in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.recipe.resolve import SERVE_MAX_LENGTH


@dataclass(frozen=True, kw_only=True)
class EngineWants:
    """What an engine loads and how it computes: numbers and texts, to be sent to another process.

    model_name: under which the model at `path` is served; None: its own. adapter: in place of the one that
    `path` brings. adapters: name and folder of more of them. weights: how they are stored; None: as
    `precision`. cache_tokens: of all requests together; None: as many as max_concurrent of them may need.
    """

    path: str
    model_name: str | None = None
    adapter: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    merge: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    weights: Literal["fp32", "bf16", "int8", "nf4"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    max_length: int | Literal["auto"] = "auto"
    max_concurrent: int = 32
    max_waiting: int = 1024
    cache_tokens: int | None = None


def served_length(wanted: int | Literal["auto"], context: int) -> int:
    """Tokens of prompt and answer together. Raises UserError for more than the model's positions."""
    if wanted == "auto":
        return min(context, SERVE_MAX_LENGTH)
    if wanted > context:
        raise UserError(
            f"--max-length {wanted}: the model's context is {context} tokens", hint=f"give at most {context}"
        )
    return wanted

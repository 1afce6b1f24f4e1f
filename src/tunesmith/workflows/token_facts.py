"""What decides a run's token ids and the end of an answer: stored with the run, compared when served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.prepare import tokenizer_hash
from tunesmith.model.template import stop_token_ids, template_hash


@dataclass(frozen=True)
class Ends:
    """A generation_config as far as `stop_token_ids` reads it."""

    eos_token_id: Sequence[int]


def token_facts(tokenizer: Any, generation_config: Any = None) -> dict[str, Any]:
    """tokenizer_hash, template_hash and stop_ids, as plain values."""
    return {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
        "stop_ids": list(stop_token_ids(tokenizer, generation_config)),
    }

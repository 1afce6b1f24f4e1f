"""What an engine tells of the model that it has loaded, as plain data: it may be in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.template import end_ids


def engine_facts(
    files: ModelFiles,
    *,
    name: str,
    adapter: Path | None,
    adapters: Mapping[str, Path],
    merged: bool,
    context_length: int,
    max_length: int,
    vocab_size: int,
    eos_token_id: Any,
    device: str,
    weights: str,
    probe: Sequence[int],
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What `served_models.Facts` describes, and `probe`, the prompt for the pool's own questions.

    eos_token_id: of the model's generation_config.
    """
    return {
        "name": name,
        "origin": files.origin,
        "base": str(files.folder),
        "base_revision": files.revision,
        "base_adapters": [str(folder) for folder in files.base_adapters],
        "tokenizer": str(files.tokenizer),
        "adapter": str(adapter) if adapter else None,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "merged": merged,
        "context_length": context_length,
        "max_length": max_length,
        "vocab_size": vocab_size,
        "end_ids": list(end_ids(eos_token_id)),
        "device": device,
        "weights": weights,
        "probe": list(probe),
        "trust_remote_code": trust_remote_code,
    }

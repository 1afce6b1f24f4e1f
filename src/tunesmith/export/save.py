"""The files beside the weights of an exported folder: tokenizer, chat template, stop ids, card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json
from tunesmith.model.weights import TOKENIZER_FILES, clean_tokenizer_config

EXPORT = "export.json"
TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files, chat template included, as the training stored them."""
    for name in TOKENIZER_PARTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / "tokenizer_config.json").is_file():
        clean_tokenizer_config(folder / "tokenizer_config.json")


def write_generation_config(base: Path, folder: Path, stop_ids: Sequence[int], pad_id: int | None) -> None:
    """The base's generation settings with the stop ids that were trained.

    Engines stop at `eos_token_id` of this file; a base model's own may not be the template's stop token.
    """
    path = base / "generation_config.json"
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    raw.pop("_from_model_config", None)
    raw["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    if pad_id is not None:
        raw["pad_token_id"] = pad_id
    write_json(folder / "generation_config.json", raw)


def check_target(folder: Path) -> None:
    """Raise UserError when `folder` holds anything but an earlier export: exporting replaces it whole."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file", hint="give a new folder")
    if any(folder.iterdir()) and not (folder / EXPORT).is_file():
        raise UserError(
            f"{folder}: holds files that are no earlier export, and would be replaced",
            hint="give a new folder",
        )


def license_of(folder: Path) -> str | None:
    """The licence that the model card in `folder` names in its head, or None."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("\"'") or None
    return None

"""Weight files of a model or adapter folder: safetensors only, present, and whole. No tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing", hint="copy the whole model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})", hint="fetch the file again") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: holds a {type(found).__name__}, not a JSON object", hint="fetch the file again"
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, sorted by name.

    Raises UserError when they are missing (every missing shard is named) or are pickles.
    """
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    refuse_pickles(folder)
    raise UserError(
        f"{folder}: no weights: neither {SINGLE} nor {INDEX} is there",
        hint="copy the whole model folder, or give a hub id and let 'tunesmith fetch' bring it",
    )


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json_file(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: has no 'weight_map'", hint="fetch the file again")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise UserError(
            f"{folder / INDEX}: names '{outside[0]}', which is not a safetensors file beside it",
            hint="use a model saved as safetensors, with all its files in one folder",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}",
            hint="copy or fetch them again",
        )
    return [folder / name for name in names]


def refuse_pickles(folder: Path) -> None:
    """Raise UserError when the only weights of `folder` are pickles, which can run code when loaded."""
    found = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not found:
        return
    raise UserError(
        f"{folder}: its weights are pickles ({', '.join(found[:3])}), which can run any code when loaded; "
        "only safetensors are read",
        hint='convert them once, if you trust where they come from: python -c "from transformers import '
        f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\", "
        "then copy the tokenizer files into NEW_FOLDER",
    )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name: shape of every tensor in a safetensors file, from its header, without the package.

    Format: https://huggingface.co/docs/safetensors. Raises UserError when the file is cut short or is no
    safetensors file.
    """
    try:
        header, num_bytes = _safetensors_header(path)
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        if max(ends, default=0) != num_bytes:
            raise ValueError(f"its tensors end at byte {max(ends, default=0)} of {num_bytes}")
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise UserError(
            f"{path}: the file is damaged ({error})", hint="copy or fetch it again: it may be cut short"
        ) from None


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """(entry of every tensor, bytes behind the header): 8 bytes of length, then JSON, then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, size - 8 - length


def clean_tokenizer_config(path: Path) -> None:
    """Drop what transformers notes about this machine, and name the class that every release knows."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    for key in ("name_or_path", "is_local", "local_files_only", "gguf_file"):
        raw.pop(key, None)
    if raw.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 and later only
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    raw.setdefault("clean_up_tokenization_spaces", False)  # transformers 4 would take True for no word of it
    write_json(path, raw)

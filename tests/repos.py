"""Small repositories for the tests of downloads: real safetensors headers, random bytes, no torch."""

from __future__ import annotations

import json
import random
from pathlib import Path


def make_model(folder: Path, *, num_bytes: int = 300_000, shards: int = 1, seed: int = 0) -> Path:
    """A model repository with files that a fetch wants, and some that it must leave."""
    folder.mkdir(parents=True)
    texts = {"config.json": '{"model_type": "llama"}', "tokenizer.json": "{}", "README.md": "# tiny\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "special_tokens_map.json").touch()
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    names = names if shards > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(safetensors_bytes(num_bytes, seed + number))
    if shards > 1:
        index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"never wanted")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again, for another program")
    return folder


def safetensors_bytes(num_bytes: int, seed: int = 0) -> bytes:
    """A file of one tensor of `num_bytes` random bytes."""
    entry = {"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(num_bytes)


def wanted(folder: Path) -> dict[str, bytes]:
    """Path: content of the files that a fetch of the model brings."""
    unwanted = ("pytorch_model.bin", "consolidated.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in unwanted}


def contents(folder: Path) -> dict[str, bytes]:
    """Path: content of every file below a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

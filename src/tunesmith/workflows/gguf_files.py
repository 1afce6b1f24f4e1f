"""The GGUF files that llama.cpp serves: made once into the cache, by a process that ends when it has them.

The process that asks needs no torch; the other side is `make_gguf_files`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.core.paths import sha256_json
from tunesmith.core.progress import say
from tunesmith.hub.made import is_whole, models_dir
from tunesmith.hub.model_files import ModelFiles, used_files
from tunesmith.serve import wire

FORMAT = 1
"""Raised whenever other files are made of the same sources."""


@dataclass(frozen=True)
class GgufJob:
    """A file to be made in the folder `name` of the model cache.

    source: what `export_gguf` takes, or with `base` (a model folder) an adapter folder. quant: a number
    format; None: the weights' own.
    """

    name: str
    source: str
    base: str | None = None
    quant: str | None = None

    @property
    def file(self) -> Path:
        """Raises TunesmithError when it has not been made."""
        found = sorted((models_dir() / self.name).rglob("*.gguf"))
        if not found:
            raise TunesmithError(f"{self.source}: no GGUF file was made of it")
        return found[0]


def model_job(source: str, files: ModelFiles, quant: str | None) -> GgufJob:
    """All weights of `source`, whose files are `files`, adapters folded in."""
    folders = [
        files.folder,
        files.tokenizer,
        *files.base_adapters,
        *([files.adapter] if files.adapter else []),
    ]
    return GgufJob(_name([quant, *map(_state, folders)]), source, quant=quant)


def adapter_job(adapter: Path, base: Path) -> GgufJob:
    return GgufJob(_name(["lora", _state(adapter), _state(base)]), str(adapter), base=str(base))


def _name(parts: Sequence[Any]) -> str:
    return f"as-gguf-{sha256_json([FORMAT, *parts])[:32]}"


def _state(folder: Path) -> list[Any]:
    """What changes when a folder's files do, without reading them."""
    found = [(path.name, path.stat()) for path in used_files(folder)]
    return [str(folder), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]]


def make_gguf_files(jobs: Sequence[GgufJob]) -> None:
    """Make those that are not there yet. Raises the error that the making meets."""
    missing = [job for job in jobs if not is_whole(models_dir() / job.name)]
    if not missing:
        return
    say(f"make GGUF files for llama.cpp, once: {', '.join(job.source for job in missing)}")
    command = [sys.executable, "-m", "tunesmith.cli.gguf_files", str(os.getpid())]
    done = proc.run([*command, json.dumps([asdict(job) for job in missing])], check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0:
        return
    if not lines:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise TunesmithError(f"making GGUF files ended with code {done.returncode}:\n{tail}")
    raise wire.error_from(json.loads(lines[-1]))

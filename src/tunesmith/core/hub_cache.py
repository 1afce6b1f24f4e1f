"""Where huggingface_hub keeps what it has fetched, so that every part finds the same copy.

    $HF_HUB_CACHE/models--owner--name/  blobs/HASH  snapshots/COMMIT/path -> ../../blobs/HASH  refs/main

`tunesmith fetch` notes beside it, in tunesmith/COMMIT.json, which files of a snapshot it has brought.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

COMMIT = re.compile(r"^[0-9a-f]{40}$")


def hub_home() -> Path:
    """$HF_HOME, where huggingface_hub keeps its cache and token."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (
        Path(os.path.expandvars(os.environ.get("HF_HOME") or f"{base}/huggingface")).expanduser().absolute()
    )


def hub_cache() -> Path:
    """$HF_HUB_CACHE, else the folder `hub` in $HF_HOME."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(given)).expanduser().absolute() if given else hub_home() / "hub"


def offline_mode() -> bool:
    """$HF_HUB_OFFLINE or $TRANSFORMERS_OFFLINE is on, as huggingface_hub reads them."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def repo_folder(kind: str, name: str) -> Path:
    """The folder of a repository; `kind` is "model" or "dataset"."""
    return hub_cache() / f"{kind}s--{name.replace('/', '--')}"


def note_path(repo: Path, commit: str) -> Path:
    """Where it is noted what was brought of a snapshot."""
    return repo / "tunesmith" / f"{commit}.json"


def fetched_folder(kind: str, name: str) -> Path | None:
    """The snapshot that `tunesmith fetch` brought last of the default branch, or None."""
    repo = repo_folder(kind, name)
    reference = repo / "refs" / "main"
    commit = reference.read_text().strip() if reference.is_file() else ""
    folder = repo / "snapshots" / commit
    return folder if COMMIT.match(commit) and note_path(repo, commit).is_file() and folder.is_dir() else None

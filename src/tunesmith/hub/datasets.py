"""Hub data sets: fetched like models, into the cache where `datasets` and our reader find them offline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tunesmith.hub.repo import Snapshot
from tunesmith.hub.wish import Wish

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
ROW_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")


@dataclass(frozen=True)
class DatasetFiles:
    """A data set in the cache. `files`: path in it: {"bytes", "sha256"}; `revision`: its commit."""

    folder: Path
    name: str
    revision: str
    files: dict[str, dict[str, int | str]]


def dataset_files(wish: Wish, snapshot: Snapshot) -> DatasetFiles:
    return DatasetFiles(snapshot.folder, wish.name, snapshot.commit, snapshot.files)


def is_hub_dataset(path: str) -> bool:
    """True when a recipe's `path` of rows means a hub id: no path here, and no name of a file."""
    here = Path(path).expanduser()
    is_file_name = here.suffix.lower() in ROW_FILES
    return not is_file_name and not here.exists() and HUB_ID.match(path) is not None

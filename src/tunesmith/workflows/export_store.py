"""Exports from a run in an object store, and into one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.core.paths import cache_dir, locked
from tunesmith.core.progress import say
from tunesmith.core.store import check_replaceable, is_url, join, put_folder
from tunesmith.core.store_cache import local_path
from tunesmith.workflows.export import ExportResult

Write = Callable[[str, Path | None], ExportResult]


def export_anywhere(
    path: str, output: str | None, write: Write, *, default: str, checkpoint: int | None = None
) -> dict[str, Any]:
    """`write` an export of a run or model (a path or a URL) to a folder or, whole or not at all, to a URL.

    default: the name below export/ of a run in a store, where `output` is None. Returns what `--json` prints;
    its "folder" is then the URL. Raises UserError for a URL that holds other files.
    """
    url = output if output is not None and is_url(output) else None
    if output is None and is_url(path):
        url = join(path, f"export/{default}")
    if url is None:
        here = local_path(path, step=checkpoint)
        return write(here, None if output is None else Path(output)).as_dict()
    check_replaceable(url)  # before hours of work
    here = local_path(path, step=checkpoint)
    draft = cache_dir() / "exports" / hashlib.sha256(url.encode()).hexdigest()[:16]
    with locked(draft):
        shutil.rmtree(draft, ignore_errors=True)
        done = write(here, draft / PurePosixPath(url).name).as_dict()
        say(f"carry over to {url}")
        put_folder(Path(done["folder"]), url)
        shutil.rmtree(draft)
    return done | {"folder": url}

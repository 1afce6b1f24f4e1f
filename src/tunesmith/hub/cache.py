"""The cache of huggingface_hub, read and written as it does: blobs, snapshots of links, references.

    models--owner--name/  blobs/HASH  snapshots/COMMIT/path -> ../../blobs/HASH  refs/main (a commit)

Ours beside it: tunesmith/COMMIT.json, what was fetched, so that a whole snapshot is known to be whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.hub_cache import COMMIT, note_path, repo_folder
from tunesmith.core.paths import sync_dir, write_json, write_text
from tunesmith.hub.endpoint import Kind
from tunesmith.hub.listing import RemoteFile

CHUNK = 1 << 20
PART = ".tunesmith.incomplete"


@dataclass(frozen=True)
class RepoCache:
    """The folder of one repository in the cache."""

    root: Path

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def lock_target(self) -> Path:
        """What `core.paths.locked` is to lock: in the folder of locks that huggingface_hub passes over."""
        return self.root.parent / ".locks" / self.root.name / "tunesmith"

    def snapshot(self, commit: str) -> Path:
        return self.root / "snapshots" / commit

    def commit_of(self, revision: str | None) -> str | None:
        """The commit that a branch, tag or commit stood for when it was last fetched."""
        if revision and COMMIT.match(revision):
            return revision
        reference = self.root / "refs" / (revision or "main")
        if ".." in (revision or "").split("/") or not reference.is_file():
            return None
        commit = reference.read_text().strip()
        return commit if COMMIT.match(commit) else None

    def remember(self, revision: str, commit: str) -> None:
        reference = self.root / "refs" / revision
        if not reference.is_file() or reference.read_text().strip() != commit:
            write_text(reference, commit)

    # -- manifest ---------------------------------------------------------------------------------

    def manifest(self, commit: str) -> dict[str, Any]:
        """{"selections": [key, ...], "files": {path: {"blob", "bytes", "mtime_ns"}}}; empty if unknown."""
        try:
            found = json.loads(note_path(self.root, commit).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"selections": [], "files": {}}
        return found if isinstance(found, dict) else {"selections": [], "files": {}}

    def is_whole(self, commit: str, selection: str) -> bool:
        """True when that selection was fetched, and its files are still there with their sizes."""
        manifest = self.manifest(commit)
        folder = self.snapshot(commit)
        paths = {folder / path: entry["bytes"] for path, entry in manifest["files"].items()}
        there = all(path.is_file() and path.stat().st_size == size for path, size in paths.items())
        return selection in manifest["selections"] and there

    def note(self, commit: str, selection: str, blobs: dict[str, Path]) -> None:
        """Write down what was fetched: `blobs` maps the path in the repository to its verified blob."""
        manifest = self.manifest(commit)
        for path, blob in blobs.items():
            stat = blob.stat()
            entry = {"blob": blob.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            manifest["files"][path] = entry
        manifest["selections"] = sorted({*manifest["selections"], selection})
        write_json(note_path(self.root, commit), manifest)

    # -- files ------------------------------------------------------------------------------------

    def verified_blobs(self) -> dict[str, tuple[int, int]]:
        """Blob: (bytes, mtime_ns) of every blob that we checked when it came."""
        found: dict[str, tuple[int, int]] = {}
        for path in (self.root / "tunesmith").glob("*.json"):
            for entry in self.manifest(path.stem)["files"].values():
                found[entry["blob"]] = (entry["bytes"], entry["mtime_ns"])
        return found

    def link(self, commit: str, path: str, blob: Path) -> None:
        """Put a verified blob into the snapshot under its name."""
        target = self.snapshot(commit) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = os.path.relpath(blob, target.parent)
        if target.is_symlink() and str(target.readlink()) == wanted:
            return
        temporary = target.with_name(f".{target.name[:80]}.{os.getpid()}.new")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(wanted)
        except OSError:  # a file system without links, such as a USB stick's
            shutil.copyfile(blob, temporary)
        os.replace(temporary, target)

    def sync(self, commit: str) -> None:
        """Flush the names of blobs and snapshot to disk."""
        for folder in (self.blobs, self.snapshot(commit)):
            if folder.is_dir():
                sync_dir(folder)


def repo_cache(kind: Kind, name: str) -> RepoCache:
    return RepoCache(repo_folder(kind, name))


def content_fault(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with the bytes in `path`, measured against what is published of `file`; None: nothing.

    A file that is not large has its git blob SHA-1 (`git hash-object`) published, a large one its SHA-256.
    """
    found_size = path.stat().st_size
    if file.size is not None and found_size != file.size:
        return f"expected {file.size} bytes, got {found_size}"
    if file.sha256:
        return _hash_fault("SHA-256", file.sha256, (_digest(path, "sha256"),))
    if file.git_sha1:
        git = _digest(path, "sha1", f"blob {found_size}\0".encode())
        if git == file.git_sha1:
            return None
        return _hash_fault("git SHA-1", file.git_sha1, (git, _digest(path, "sha1")))
    return None


def _hash_fault(label: str, expected: str, found: tuple[str, ...]) -> str | None:
    return None if expected in found else f"expected {label} {expected}, got {found[0]}"


def _digest(path: Path, algorithm: str, prefix: bytes = b"") -> str:
    made = hashlib.new(algorithm, prefix, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            made.update(chunk)
    return made.hexdigest()

"""What a bundle holds: `manifest.json`, written last, and SHA256SUMS, which names the manifest's own hash.

    manifest.json   canonical JSON: what was collected (items), and size and SHA-256 of every file
    SHA256SUMS      the same hashes as `sha256sum --check` reads them; its first line is manifest.json
    NAME.part001 …  a file that was too large for one volume, cut into plain pieces

Standard library only (with core.errors): the installer runs this before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tunesmith.core.errors import UserError

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
FORMAT = 1
SHA256 = re.compile(r"^[0-9a-f]{64}$")
AGAIN = "copy the bundle again from where it was made"


@dataclass(frozen=True)
class Piece:
    """One file on disk: the whole of a bundled file, or one of the pieces that make it."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A bundled file. `pieces`: the files that make it when joined; none where it lies whole at `path`."""

    path: str
    bytes: int
    sha256: str
    pieces: tuple[Piece, ...] = ()

    @property
    def on_disk(self) -> tuple[Piece, ...]:
        return self.pieces or (Piece(self.path, self.bytes, self.sha256),)


@dataclass(frozen=True)
class Item:
    """What was asked for and collected as one: `part` says what it is, `request` what it was made from, and
    `paths` are its files, below `root` ("": the top of the bundle)."""

    part: str
    name: str
    root: str
    request: Mapping[str, Any]
    paths: tuple[str, ...]

    def below(self, path: str) -> str:
        """The path of one of its files, relative to `root`."""
        return str(PurePosixPath(path).relative_to(self.root))


@dataclass(frozen=True)
class Manifest:
    items: tuple[Item, ...] = ()
    files: Mapping[str, Entry] = field(default_factory=dict)
    tunesmith: str = ""

    def of(self, part: str) -> list[Item]:
        return [item for item in self.items if item.part == part]

    def entries(self, items: Iterable[Item]) -> list[Entry]:
        return [self.files[path] for item in items for path in item.paths]

    def bytes_of(self, *items: Item) -> int:
        return sum(entry.bytes for entry in self.entries(items))

    @property
    def num_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def on_disk(self) -> Iterator[Piece]:
        """Every file that the bundle must hold, beside the manifest and SHA256SUMS."""
        for entry in self.files.values():
            yield from entry.on_disk

    def text(self) -> str:
        """Canonical JSON: the same contents give the same bytes, and so the same hash."""
        files: dict[str, Any] = {}
        for entry in self.files.values():
            files[entry.path] = {"bytes": entry.bytes, "sha256": entry.sha256}
            if entry.pieces:
                pieces = [{"path": p.path, "bytes": p.bytes, "sha256": p.sha256} for p in entry.pieces]
                files[entry.path]["pieces"] = pieces
        value = {
            "format": FORMAT,
            "tunesmith": self.tunesmith,
            "items": [
                {
                    "part": item.part,
                    "name": item.name,
                    "root": item.root,
                    "request": dict(item.request),
                    "paths": list(item.paths),
                }
                for item in self.items
            ],
            "files": files,
        }
        return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")) + "\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text().encode()).hexdigest()

    def sums(self) -> str:
        """SHA256SUMS: the manifest first, then every file on disk."""
        lines = [f"{self.sha256}  {MANIFEST}"]
        lines += [f"{piece.sha256}  {piece.path}" for piece in sorted(self.on_disk(), key=lambda p: p.path)]
        return "\n".join(lines) + "\n"


def open_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle. Raises UserError when there is none or it is damaged."""
    path = bundle / MANIFEST
    if not bundle.is_dir():
        raise UserError(f"{bundle}: there is no such folder", hint="give the folder of the bundle")
    if not path.is_file():
        raise UserError(
            f"{bundle}: has no {MANIFEST}: it is no bundle, or was never finished",
            hint="call 'tunesmith bundle create' with the same options again: it goes on where it stopped",
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, place: str) -> Manifest:
    """The manifest in `content`; `place` names it in errors.

    Raises UserError when it is not whole, was written by a newer version, or names a path outside the bundle.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{place}: damaged: {error}", hint=AGAIN) from None
    if isinstance(value, dict) and isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise UserError(
            f"{place}: has format {value['format']}; this tunesmith reads format {FORMAT}",
            hint="install it with the install.sh in the bundle",
        )
    try:
        return _manifest(value)
    except UserError as error:
        raise UserError(f"{place}: {error.what}", hint=error.hint) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{place}: damaged: {type(error).__name__} {error}", hint=AGAIN) from None


def _manifest(value: dict[str, Any]) -> Manifest:
    files = {safe(path): _entry(safe(path), entry) for path, entry in value["files"].items()}
    items = tuple(_item(entry, files) for entry in value["items"])
    if value["format"] != FORMAT:
        raise UserError(f"has format {value['format']!r}, which does not exist", hint=AGAIN)
    return Manifest(items=items, files=files, tunesmith=str(value["tunesmith"]))


def _item(value: dict[str, Any], files: Mapping[str, Entry]) -> Item:
    paths = tuple(str(path) for path in value["paths"])
    missing = [path for path in paths if path not in files]
    if missing:
        raise UserError(f"damaged: {value['name']} names {missing[0]!r}, which has no hash", hint=AGAIN)
    root = safe(value["root"]) if value["root"] else ""
    item = Item(str(value["part"]), str(value["name"]), root, dict(value["request"]), paths)
    for path in paths:
        item.below(path)
    return item


def _entry(path: str, value: dict[str, Any]) -> Entry:
    pieces = tuple(_piece(safe(piece["path"]), piece) for piece in value.get("pieces", []))
    whole = _piece(path, value)
    if pieces and sum(piece.bytes for piece in pieces) != whole.bytes:
        raise UserError(f"damaged: the pieces of {path} do not add up", hint=AGAIN)
    return Entry(path, whole.bytes, whole.sha256, pieces)


def _piece(path: str, value: dict[str, Any]) -> Piece:
    size, sha256 = value["bytes"], value["sha256"]
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not SHA256.match(sha256):
        raise UserError(f"damaged: size or SHA-256 of {path} is not one", hint=AGAIN)
    return Piece(path, size, sha256)


def safe(path: Any) -> str:
    """`path` if it stays inside the bundle: relative, plain, no '..'. Raises UserError."""
    parts = path.split("/") if isinstance(path, str) else []
    plain = parts and all(part not in ("", ".", "..") for part in parts)
    if not plain or "\\" in path or any(ord(letter) < 32 for letter in path):
        raise UserError(f"names the path {path!r}, which is not one inside the bundle", hint=AGAIN)
    return str(path)

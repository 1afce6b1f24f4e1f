"""The bytes of a bundle: checked, cut into volumes, joined and put in place.

Standard library only (with core.errors): the installer runs this before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import TunesmithError
from tunesmith.hub.bundle_manifest import AGAIN, MANIFEST, SUMS, Entry, Manifest, Piece

CHUNK = 4 << 20
PARTIAL = ".partial"  # where `bundle create` collects; its leftovers are no part of a bundle

Count = Callable[[int], None]


@dataclass(frozen=True)
class Fault:
    """What is wrong with one file of a bundle."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def no_count(num_bytes: int) -> None:
    """For callers that show no progress."""


def find_faults(bundle: Path, manifest: Manifest, *, count: Count = no_count) -> list[Fault]:
    """Every file that is missing, extra, cut short or changed, by name; none: the bundle is whole.

    `count` is told the number of bytes read, as they are read.
    """
    pieces = {piece.path: piece for piece in manifest.on_disk()}
    there = set(_files(bundle)) - {MANIFEST, SUMS}
    faults = _manifest_faults(bundle, manifest)
    faults += [fault for path in sorted(pieces) if (fault := _fault(bundle, pieces[path], count))]
    return faults + [Fault(path, "not in the manifest") for path in sorted(there - pieces.keys())]


def _files(bundle: Path) -> Iterator[str]:
    for folder, _, names in os.walk(bundle):
        for name in names:
            yield str((Path(folder) / name).relative_to(bundle))


def _manifest_faults(bundle: Path, manifest: Manifest) -> list[Fault]:
    """A changed byte in the manifest shows against SHA256SUMS, and one in SHA256SUMS against the manifest."""
    content = (bundle / MANIFEST).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if not (bundle / SUMS).is_file():
        return [Fault(SUMS, "missing")]
    sums = (bundle / SUMS).read_bytes()
    stated = sums.split(b"  ")[0].decode("ascii", "replace")
    if content != manifest.text().encode():
        return [Fault(MANIFEST, "changed: it is not as 'tunesmith bundle create' writes it")]
    if stated != found:  # nothing tells which of the two was changed
        what = f"the SHA-256 of {MANIFEST} is {found}, {SUMS} says {stated[:64]}"
        return [Fault(MANIFEST, what), Fault(SUMS, what)]
    return [] if sums == manifest.sums().encode() else [Fault(SUMS, "does not agree with the manifest")]


def _fault(bundle: Path, piece: Piece, count: Count) -> Fault | None:
    path = bundle / piece.path
    if path.is_symlink():
        return Fault(piece.path, "a link, not a file")
    if not path.is_file():
        return Fault(piece.path, "missing")
    size = path.stat().st_size
    if size != piece.bytes:
        return Fault(piece.path, f"has {size} bytes instead of {piece.bytes}")
    found = hash_file(path, count=count)
    return (
        None if found == piece.sha256 else Fault(piece.path, f"changed: SHA-256 {found}, not {piece.sha256}")
    )


def hash_file(path: Path, *, count: Count = no_count) -> str:
    """SHA-256 of a file; `count` is told of the bytes as they are read."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        count(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def read_entry(bundle: Path, entry: Entry) -> Iterator[bytes]:
    """The bytes of a bundled file, its pieces joined."""
    for piece in entry.on_disk:
        yield from _chunks(bundle / piece.path)


def put(bundle: Path, entry: Entry, target: Path, *, count: Count = no_count) -> None:
    """Write a bundled file to `target`: whole and checked, or not at all; what is there is replaced then.

    Raises TunesmithError when its bytes are not those of the manifest.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")  # one name: what a kill left is written over
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for chunk in read_entry(bundle, entry):
                file.write(chunk)
                digest.update(chunk)
                count(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != entry.sha256:
            raise TunesmithError(f"{bundle / entry.path}: changed while it was copied", hint=AGAIN)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_put(entry: Entry, target: Path) -> bool:
    """True when `target` is the bundled file, byte for byte."""
    return target.is_file() and target.stat().st_size == entry.bytes and hash_file(target) == entry.sha256


def split(bundle: Path, entry: Entry, volume_bytes: int) -> Entry:
    """Cut a file of the bundle into pieces of at most `volume_bytes`; the file itself is gone then.

    It is cut from its end, so that no more than one piece is on the disk twice.
    """
    path = bundle / entry.path
    if entry.pieces or entry.bytes <= volume_bytes:
        return entry
    pieces: list[Piece] = []
    for number in reversed(range((entry.bytes + volume_bytes - 1) // volume_bytes)):
        name = f"{entry.path}.part{number + 1:03d}"
        start = number * volume_bytes
        pieces.insert(0, _cut(path, start, bundle / name, name))
        os.truncate(path, start)
    path.unlink()
    return Entry(entry.path, entry.bytes, entry.sha256, tuple(pieces))


def _cut(path: Path, start: int, target: Path, name: str) -> Piece:
    """Copy the end of a file, from byte `start`, to `target`."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as source, target.open("wb") as file:
        source.seek(start)
        while chunk := source.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Piece(name, num_bytes, digest.hexdigest())

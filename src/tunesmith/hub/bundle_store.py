"""A bundle in the making: what was collected is recorded item by item, so that a second call goes on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.core.errors import UserError
from tunesmith.core.paths import need_disk, sha256_json, sync_dir, write_text
from tunesmith.core.progress import Meter, say
from tunesmith.core.units import bytes_text
from tunesmith.hub.bundle_files import PARTIAL, hash_file, is_put, split
from tunesmith.hub.bundle_manifest import MANIFEST, SUMS, Entry, Item, Manifest, parse_manifest, safe

JOURNAL = "journal.json"
WHOLE = ("packages", "installer")  # dpkg, rpm and sh read these as they lie


def slug(name: str) -> str:
    """A name as one plain part of a path: `owner/name:tag` -> `owner--name--tag`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"[/:]", "--", name)).lstrip(".-") or "item"


class Store:
    """The bundle folder of one `bundle create`.

    `volume_bytes`: files larger than that are cut into pieces, but for packages; None: never.
    """

    def __init__(self, bundle: Path, *, volume_bytes: int | None = None) -> None:
        self.bundle = bundle
        self._volume_bytes = volume_bytes
        self._partial = bundle / PARTIAL
        self._refuse_other()
        self._known = self._read()
        self._items: list[Item] = []
        self._files: dict[str, Entry] = {}

    def _refuse_other(self) -> None:
        """Never write into a folder that holds something else: finish() removes what it does not know."""
        if self.bundle.exists() and not self.bundle.is_dir():
            raise UserError(f"{self.bundle}: is a file", hint="give a new folder")
        ours = (self.bundle / MANIFEST).is_file() or self._partial.is_dir()
        if self.bundle.is_dir() and any(self.bundle.iterdir()) and not ours:
            raise UserError(
                f"{self.bundle}: the folder holds something else than a bundle", hint="give a new folder"
            )

    def _read(self) -> Manifest:
        """What an earlier call collected. Its manifest becomes the journal: from now on it is not whole."""
        self._partial.mkdir(parents=True, exist_ok=True)
        journal, manifest = self._partial / JOURNAL, self.bundle / MANIFEST
        if manifest.is_file():
            os.replace(manifest, journal)
            (self.bundle / SUMS).unlink(missing_ok=True)
        if not journal.is_file():
            return Manifest()
        try:
            return parse_manifest(journal.read_bytes(), str(journal))
        except UserError as error:
            say(f"{error.what}: everything is collected anew")
            return Manifest()

    def staging(self, part: str, name: str) -> Path:
        """A folder to collect in; it outlives a call that is stopped, so that downloads go on."""
        folder = self._partial / f"{part}-{slug(name)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, part: str, name: str, request: Mapping[str, Any]) -> Item | None:
        """The item as an earlier call collected it from the same request, checked; None: collect it.

        Its files are then part of this bundle.
        """
        for item in self._known.of(part):
            if item.name == name and sha256_json(dict(item.request)) == sha256_json(dict(request)):
                entries = [self._known.files[path] for path in item.paths]
                if not all(self._holds(entry) for entry in entries):
                    say(f"{part} {name}: changed on the disk since it was collected, collected anew")
                    return None
                say(f"{part} {name}: there already, checked ({bytes_text(sum(e.bytes for e in entries))})")
                return self._record(item, entries)
        return None

    def _holds(self, entry: Entry) -> bool:
        return all(
            is_put(Entry(piece.path, piece.bytes, piece.sha256), self.bundle / piece.path)
            for piece in entry.on_disk
        )

    def add(self, part: str, name: str, root: str, request: Mapping[str, Any], folder: Path) -> Item:
        """Move all files below `folder` to `root` in the bundle, hashed, and record them as one item."""
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        total = sum((folder / name).stat().st_size for name in names)
        entries = []
        with Meter(f"hash {name}", total=total) as meter:
            for each in names:
                entries.append(self._take(folder / each, f"{root}/{each}".lstrip("/"), meter))
        shutil.rmtree(folder, ignore_errors=True)
        paths = tuple(entry.path for entry in entries)
        return self._record(Item(part, name, root, dict(request), paths), entries)

    def _take(self, source: Path, path: str, meter: Meter) -> Entry:
        target = self.bundle / safe(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256 = hash_file(source, count=meter.advance)
        os.replace(source, target)
        target.chmod(0o644)
        return Entry(path, target.stat().st_size, sha256)

    def _record(self, item: Item, entries: list[Entry]) -> Item:
        if self._volume_bytes is not None and item.part not in WHOLE:
            entries = [split(self.bundle, entry, self._volume_bytes) for entry in entries]
        self._items.append(item)
        self._files |= {entry.path: entry for entry in entries}
        write_text(self._partial / JOURNAL, self._with_known().text())
        return item

    def _with_known(self) -> Manifest:
        """This call's items before those that an earlier call left and this one has not come to yet."""
        done = {(item.part, item.name) for item in self._items}
        rest = [item for item in self._known.items if (item.part, item.name) not in done]
        files = {path: self._known.files[path] for item in rest for path in item.paths}
        return Manifest((*self._items, *rest), files | self._files, __version__)

    def finish(self) -> Manifest:
        """Write the manifest, which makes the bundle whole; what is in no item of this call is removed."""
        order = sorted(self._items, key=lambda item: (item.part, item.name))
        files = dict(sorted(self._files.items()))
        manifest = Manifest(items=tuple(order), files=files, tunesmith=__version__)
        shutil.rmtree(self._partial, ignore_errors=True)
        self._remove_others({piece.path for piece in manifest.on_disk()})
        write_text(self.bundle / SUMS, manifest.sums())
        write_text(self.bundle / MANIFEST, manifest.text())
        return manifest

    def _remove_others(self, known: set[str]) -> None:
        for folder, _, names in os.walk(self.bundle, topdown=False):
            for name in names:
                path = Path(folder) / name
                if str(path.relative_to(self.bundle)) not in known:
                    path.unlink()
            if Path(folder) != self.bundle and not any(Path(folder).iterdir()):
                Path(folder).rmdir()
        sync_dir(self.bundle)


def check_disk(folder: Path, need_bytes: int, *, what: str) -> None:
    """Raise TunesmithError unless the disk of `folder` has `need_bytes` free."""
    need_disk(folder, need_bytes, what=what, hint="free space, or take a folder on another disk")

"""Images as files: saved whole or not at all, their SHA-256 beside them; loaded only when it agrees."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import cache_dir, free_bytes, sha256_file, sync_dir, write_text
from tunesmith.core.proc import run
from tunesmith.core.progress import say
from tunesmith.core.units import bytes_text
from tunesmith.image.docker import docker, find_image, inspect_image

PACKERS = {".gz": "gzip", ".zst": "zstd"}
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Saved:
    """A file with images: their ids by name."""

    file: Path
    sha256: str
    bytes: int
    images: dict[str, str]


def sum_file(file: Path) -> Path:
    """`image.tar.sha256`, in the format of sha256sum."""
    return file.with_name(f"{file.name}.sha256")


def save_images(names: Sequence[str], file: Path) -> Saved:
    """Save images into `file`; `.gz` and `.zst` are packed.

    Raises UserError for an unknown ending, an image that is not here, or a disk that is too small.
    """
    packer = _packer(file)
    found = [inspect_image(name) for name in names]
    # Packed, there is the plain file beside the packed one for a while.
    need = sum(int(image["Size"]) for image in found) * (2 if packer else 1) + SPARE_BYTES
    free = free_bytes(file.parent)
    if free < need:
        raise UserError(
            f"{file}: the images have {bytes_text(need)}, the disk has {bytes_text(free)} free",
            hint="save to another disk",
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    packed = partial
    try:
        docker("save", "--output", str(partial), *names, timeout_s=None)
        if packer:
            packed = partial.with_name(partial.name + file.suffix)
            run([packer, "-q", "-f", *(["--rm"] if packer == "zstd" else []), str(partial)])
        sha256 = _publish(packed, file)
    finally:
        partial.unlink(missing_ok=True)
        packed.unlink(missing_ok=True)
    images = {name: str(image["Id"]) for name, image in zip(names, found, strict=True)}
    return Saved(file, sha256, file.stat().st_size, images)


def _publish(partial: Path, file: Path) -> str:
    """The sum first: a kill in between leaves an old file that no longer agrees, which `load` refuses."""
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.chmod(0o644)
    sha256 = sha256_file(partial)
    write_text(sum_file(file), f"{sha256}  {file.name}\n")
    partial.replace(file)
    sync_dir(file.parent)
    return sha256


def check_file(file: Path, sha256: str | None = None) -> str:
    """The file's SHA-256 when it is the one given, or the one beside it.

    Raises UserError when there is nothing to compare it with, or when it differs: cut off, or changed.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file", hint="give what 'tunesmith image save' wrote")
    wanted = sha256.lower() if sha256 else _recorded(file)
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise UserError(f"{file}: {wanted!r:.80} is not a SHA-256", hint="64 hex digits")
    found = sha256_file(file)
    if found != wanted:
        raise UserError(
            f"{file}: its SHA-256 is {found}, it should be {wanted}: the file was cut off or changed",
            hint="copy it again from where it was saved, with its .sha256 beside it",
        )
    return found


def _recorded(file: Path) -> str:
    beside = sum_file(file)
    if not beside.is_file():
        raise UserError(
            f"{file}: {beside.name} is not beside it, so nobody can tell whether it is whole",
            hint="copy that file too, or give the sum by --sha256",
        )
    return (beside.read_text(encoding="utf-8").split() or [""])[0].lower()


def load_images(file: Path, sha256: str | None = None) -> dict[str, str]:
    """Load the images of a file once it is proven whole: {name: id}. Raises as `check_file` does."""
    packer = _packer(file)
    say(f"verify {file}")
    check_file(file, sha256)
    if packer == "zstd":
        # Daemons before 23 do not unpack zstd themselves; the file may lie on a disk that is read-only.
        plain = cache_dir() / f"load-{os.getpid()}.tar"
        plain.parent.mkdir(parents=True, exist_ok=True)
        try:
            run(["zstd", "-q", "-d", "-f", str(file), "-o", str(plain)])
            return _load(plain)
        finally:
            plain.unlink(missing_ok=True)
    return _load(file)


def _load(file: Path) -> dict[str, str]:
    said = docker("load", "--input", str(file), timeout_s=None)
    names = re.findall(r"^Loaded image(?: ID)?: (\S+)$", said, re.MULTILINE)
    if not names:
        raise TunesmithError(f"{file}: docker loaded no image: {said.strip()[-200:]}")
    return {name: str((find_image(name) or {}).get("Id", "")) for name in names}


def _packer(file: Path) -> str | None:
    if file.suffix == ".tar":
        return None
    if file.suffix in PACKERS and Path(file.stem).suffix == ".tar":
        return PACKERS[file.suffix]
    raise UserError(
        f"{file}: what kind of file should this be?", hint="end its name in .tar, .tar.gz or .tar.zst"
    )

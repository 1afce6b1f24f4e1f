"""`image.lock.json`: which image a name stood for, so that the next build starts from the same bytes.

    {"images": {"python:3.11-slim": {"digest": "sha256:...", "id": "sha256:..."}}}

`digest` is the registry's and goes into FROM. An image that was made on this machine, or loaded from a file,
has no digest there, only its id.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import write_json
from tunesmith.image.bases import Base
from tunesmith.image.docker import IMAGE_ID, docker_show, find_image, inspect_image

LOCK = "image.lock.json"


def read_lock(path: Path) -> dict[str, dict[str, str]]:
    """{image: {"digest" | "id": sha256}}; empty without a file. Raises UserError when it is not a lock."""
    if not path.exists():
        return {}
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}", hint="remove it: a build writes it anew") from None
    images = found.get("images") if isinstance(found, dict) else None
    if not isinstance(images, dict) or not all(_is_entry(entry) for entry in images.values()):
        raise UserError(
            f"{path}: not an image lock", hint='it looks like {"images": {"NAME": {"digest": "sha256:..."}}}'
        )
    return images


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not entry or entry.keys() - {"digest", "id"}:
        return False
    return all(isinstance(value, str) and IMAGE_ID.fullmatch(value) for value in entry.values())


def pinned(base: Base, lock: dict[str, dict[str, str]]) -> Base:
    """The base with the digest that the lock has for it."""
    digest = lock.get(base.name, {}).get("digest")
    return replace(base, digest=digest) if digest and "@" not in base.name else base


def present_base(base: Base, path: Path) -> Base:
    """Bring the base to this machine, write into the lock what it is, and return it pinned.

    A base that the lock knows by its digest may also lie here without one, loaded from a file: then its id
    must be the lock's. Raises UserError when this machine has another image by a name that was never in a
    registry, TunesmithError when the base cannot be pulled.
    """
    entry = read_lock(path).get(base.name, {})
    found = find_image(base.reference)
    if found is None and base.digest:
        local = find_image(base.name)
        if local is not None and local["Id"] == entry.get("id"):
            return replace(base, digest=None)
    if found is not None and "digest" not in entry and entry.get("id", found["Id"]) != found["Id"]:
        raise UserError(
            f"base {base.name}: its id is {found['Id'][:19]}, {path} has {entry['id'][:19]}: another image",
            hint=f"bring the locked image back, or remove its entry from {path}",
        )
    if found is None:
        _pull(base)
    _record(base, path)
    return pinned(base, read_lock(path))


def _pull(base: Base) -> None:
    try:
        docker_show("pull", base.reference)
    except TunesmithError as error:
        raise TunesmithError(
            f"base {base.reference} is not on this machine, and {error.what}",
            hint="behind a slow or closed network: 'tunesmith setup' sets a registry mirror or proxy,"
            " 'tunesmith image load' takes a file from another machine",
        ) from None


def _record(base: Base, path: Path) -> None:
    """Add the base to the lock. An entry that is there is kept: it has just been used."""
    lock = read_lock(path)
    if base.name in lock or "@" in base.name:
        return
    image = inspect_image(base.reference)
    digests = [text.partition("@")[2] for text in image.get("RepoDigests") or []]
    lock[base.name] = {"digest": digests[0], "id": image["Id"]} if digests else {"id": image["Id"]}
    write_json(path, {"images": dict(sorted(lock.items()))})

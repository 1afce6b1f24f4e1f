"""Container images of a bundle: saved here, loaded there."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

from tunesmith.core.progress import say
from tunesmith.hub.bundle_files import read_entry
from tunesmith.hub.bundle_manifest import Item, Manifest
from tunesmith.hub.bundle_store import Store, check_disk, slug
from tunesmith.image.docker import check_reference, docker, find_image, inspect_image


def collect_image(store: Store, tag: str) -> Item:
    """Save the image `tag` into the bundle. Raises UserError when there is no such image, or no docker."""
    image = inspect_image(tag)
    request = {"tag": tag, "id": str(image["Id"])}
    known = store.keep("images", tag, request)
    if known is not None:
        return known
    check_disk(store.bundle, int(image["Size"]), what=f"image {tag}")
    say(f"save image {tag}")
    folder = store.staging("images", tag)
    docker("save", "--output", str(folder / f"{slug(tag)}.tar"), tag, timeout_s=None)
    return store.add("images", tag, "images", request, folder)


def is_loaded(item: Item) -> bool:
    """True when docker has exactly this image under its tag."""
    found = find_image(check_reference(str(item.request["tag"]), "manifest.json"))
    return found is not None and found["Id"] == item.request["id"]


def load_image(bundle: Path, manifest: Manifest, item: Item) -> None:
    """Load an image into docker; one that was cut into pieces is joined on the way, without a file."""
    (entry,) = manifest.entries([item])
    if not entry.pieces:
        docker("load", "--quiet", "--input", str(bundle / entry.path), timeout_s=None)
        return
    with tempfile.TemporaryDirectory(prefix="tunesmith-image-") as scratch:
        pipe = Path(scratch) / "image.tar"
        os.mkfifo(pipe)

        def feed() -> None:
            try:
                with pipe.open("wb") as out:
                    for chunk in read_entry(bundle, entry):
                        out.write(chunk)
            except BrokenPipeError:
                pass  # docker has ended; it says why

        threading.Thread(target=feed, daemon=True).start()
        docker("load", "--quiet", "--input", str(pipe), timeout_s=None)

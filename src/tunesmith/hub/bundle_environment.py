"""The Python environment of a bundle: a venv filled from its wheelhouse, without network.

Standard library only (with core): the installer runs this before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.proc import run
from tunesmith.hub.bundle_files import put
from tunesmith.hub.bundle_manifest import Item, Manifest

STAMP = ".tunesmith-bundle"  # holds the hash of the wheels when, and only when, all are installed
CONSTRAINTS = "constraints.txt"
DEPENDENCIES = "dependencies"  # the item of all wheels but tunesmith's own
UNFINISHED = "unfinished\n"


def wheel_item(manifest: Manifest) -> Item:
    """The item that says what the wheels are for. Raises UserError when the bundle has none."""
    found = [item for item in manifest.of("wheels") if item.name == DEPENDENCIES]
    if not found:
        raise UserError(
            "the bundle holds no Python wheels",
            hint="make it with --parts wheels, or install tunesmith here in another way",
        )
    return found[0]


def check_python(item: Item) -> None:
    """Raise UserError unless the wheels are for this interpreter and this kind of machine."""
    wanted = str(item.request.get("python", ""))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if wanted != here:
        raise UserError(
            f"the wheels of the bundle are for Python {wanted}, this is Python {here}",
            hint=f"run the install.sh of the bundle with PYTHON=python{wanted}",
        )
    names = [str(name) for name in item.request.get("platforms", [])]
    machine = os.uname().machine
    if not any(name.endswith((machine, "any")) for name in names or [str(item.request.get("machine"))]):
        raise UserError(
            f"the wheels of the bundle are for {', '.join(names) or item.request.get('machine')}, "
            f"this machine is {machine}",
            hint="make the bundle with the right --platform",
        )


def environment_is_whole(manifest: Manifest, venv: Path) -> bool:
    """True when `venv` was finished from exactly this bundle."""
    stamp = venv / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == _identity(manifest)


def make_environment(bundle: Path, manifest: Manifest, venv: Path) -> bool:
    """Make `venv` with tunesmith and all that it needs from the wheels of the bundle; False: it was there.

    An environment that was not finished, or came from another bundle, is made anew. Raises UserError when
    the folder holds something else or Python does not fit, TunesmithError with pip's last lines.
    """
    item = wheel_item(manifest)
    check_python(item)
    if environment_is_whole(manifest, venv):
        return False
    if venv.exists() and (not venv.is_dir() or any(venv.iterdir())) and not (venv / STAMP).is_file():
        raise UserError(
            f"{venv}: is there already, and was not made from a bundle", hint="give another folder to --venv"
        )
    venv.mkdir(parents=True, exist_ok=True)
    stamp = venv / STAMP
    stamp.write_text(UNFINISHED, encoding="utf-8")
    _make_venv(venv)
    with _wheelhouse(bundle, manifest) as folders:
        _install(venv, item, folders)
    # A temporary name and a rename: a stamp that is half written must not count.
    new = stamp.with_name(f"{STAMP}.new")
    new.write_text(f"{_identity(manifest)}\n", encoding="utf-8")
    new.replace(stamp)
    return True


def _identity(manifest: Manifest) -> str:
    """What the environment depends on: the wheels by their hashes, not what else the bundle holds."""
    hashes = sorted(entry.sha256 for entry in manifest.entries(manifest.of("wheels")))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _make_venv(venv: Path) -> None:
    # No --clear: it would remove the stamp that says whose folder this is.
    base = getattr(sys, "_base_executable", sys.executable)
    try:
        run([base, "-m", "venv", str(venv)], env=_plain_env())
    except TunesmithError as error:
        raise UserError(
            f"{base} cannot make a virtual environment: {error.what}",
            hint="install Python's venv package first, such as python3.11-venv; a bundle made with --distro "
            "has it in its packages folder",
        ) from None


def _install(venv: Path, item: Item, folders: list[Path]) -> None:
    extras = str(item.request.get("extras", ""))
    args = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-index", "--quiet", "--no-input"]
    # Compiling every module of torch takes a minute; Python compiles those that are used when they are.
    args += ["--disable-pip-version-check", "--force-reinstall", "--no-compile"]
    for folder in folders:
        args += ["--find-links", str(folder)]
        if (folder / CONSTRAINTS).is_file():
            args += ["--constraint", str(folder / CONSTRAINTS)]
    run([*args, f"tunesmith[{extras}]" if extras else "tunesmith"], env=_plain_env())


def _plain_env() -> dict[str, str]:
    """The environment without pip's settings and Python's paths: only the bundle counts."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull}


@contextmanager
def _wheelhouse(bundle: Path, manifest: Manifest) -> Iterator[list[Path]]:
    """Folders that together hold every wheel whole: those cut into pieces are joined for a while."""
    cut = [entry for entry in manifest.entries(manifest.of("wheels")) if entry.pieces]
    with tempfile.TemporaryDirectory(prefix="tunesmith-wheels-") as scratch:
        for entry in cut:
            put(bundle, entry, Path(scratch) / Path(entry.path).name)
        yield [bundle / wheel_item(manifest).root, Path(scratch)]

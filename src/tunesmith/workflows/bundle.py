"""A bundle: everything that a machine without network needs, in one folder; made and verified here.

packages/ubuntu-22.04/*.deb   host packages             models/, data/   models and data sets
wheels/*.whl                  Python, tunesmith too     project/         recipe, its files, examples
images/*.tar                  container images          install.sh       the installer
manifest.json, SHA256SUMS     what there is, and the hash of every byte; written last
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_file, sha256_json, write_text
from tunesmith.core.progress import Meter, say
from tunesmith.core.units import bytes_text
from tunesmith.host import collect as host_collect
from tunesmith.hub import wheels
from tunesmith.hub.builtin import BUILTIN
from tunesmith.hub.bundle_bootstrap import INSTALLER, SCRIPT, write_installer
from tunesmith.hub.bundle_environment import CONSTRAINTS, DEPENDENCIES
from tunesmith.hub.bundle_files import Fault, find_faults
from tunesmith.hub.bundle_manifest import Item, Manifest, open_manifest
from tunesmith.hub.bundle_models import Collected, collect, files_below
from tunesmith.hub.bundle_store import Store, check_disk
from tunesmith.workflows.bundle_images import collect_image
from tunesmith.workflows.bundle_recipe import collect_data, collect_model, collect_recipe

PARTS = ("packages", "wheels", "images", "model", "data", "project")
# Of the source tree; an installation from a wheel has recipes and examples only.
PROJECT_FOLDERS = ("recipes", "examples", "scripts", "docs")
PROJECT_FILES = ("README.md", "LICENSE", "constraints.txt", "pyproject.toml")


@dataclass(frozen=True, kw_only=True)
class CreateOptions:
    """What goes into the bundle.

    parts: None takes wheels, model, data and project, and packages and images where one is named. distros:
    such as `ubuntu-22.04`. platforms, python: the machine that the wheels are for; empty: one like this.
    extras: of tunesmith. images: tags of docker images. split_bytes: no file larger than that. gpu: the
    NVIDIA Container Toolkit too. mirror: a package archive.
    """

    bundle: Path
    recipe: Path | None = None
    parts: tuple[str, ...] | None = None
    distros: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ()
    python: str | None = None
    extras: str = "serve"
    images: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    split_bytes: int | None = None
    gpu: bool = True
    mirror: str | None = None


@dataclass(frozen=True)
class Bundle:
    """A finished bundle, or one that was verified; `faults` then names what is wrong."""

    path: Path
    manifest: Manifest
    faults: tuple[Fault, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "ok": not self.faults,
            "bundle": str(self.path),
            "manifest_sha256": manifest.sha256,
            "files": len(list(manifest.on_disk())),
            "bytes": manifest.num_bytes,
            "items": [
                {
                    "part": item.part,
                    "name": item.name,
                    "bytes": sum(e.bytes for e in manifest.entries([item])),
                }
                for item in manifest.items
            ],
            "faults": [{"path": fault.path, "what": fault.what} for fault in self.faults],
        }


def create(options: CreateOptions) -> Bundle:
    """Collect what is asked for into `options.bundle`, and write its manifest last.

    A call that was stopped goes on where it was. Raises UserError for options that cannot be met here,
    TunesmithError when a download fails or the disk is too small.
    """
    parts = _parts(options)
    bundle = options.bundle.expanduser().absolute()
    _check(options, parts)
    store = Store(bundle, volume_bytes=options.split_bytes)
    if "packages" in parts:
        for label in options.distros:
            _packages(store, label, options)
    if "wheels" in parts:
        _wheels(store, options)
    if "images" in parts:
        for tag in options.images:
            collect_image(store, tag)
    _contents(store, options, parts)
    _installer(store, options)
    manifest = store.finish()
    say(f"{bundle}: {bytes_text(manifest.num_bytes)}, manifest {manifest.sha256}")
    return Bundle(bundle, manifest)


def verify(bundle: Path, *, expect: str | None = None) -> Bundle:
    """Read every byte of a bundle and compare; `expect`: the hash that its manifest must have.

    Raises UserError when there is no manifest that can be read.
    """
    bundle = bundle.expanduser().absolute()
    manifest = open_manifest(bundle)
    with Meter("verify", total=manifest.num_bytes) as meter:
        faults = find_faults(bundle, manifest, count=meter.advance)
    if expect is not None and manifest.sha256 != expect.strip().lower():
        faults.insert(
            0, Fault("manifest.json", f"its SHA-256 is {manifest.sha256}, not {expect} as expected")
        )
    return Bundle(bundle, manifest, tuple(faults))


# -- what is asked for -----------------------------------------------------------------------------------


def _parts(options: CreateOptions) -> set[str]:
    if options.parts is None:
        found = {"wheels", "model", "data", "project"}
        return (
            found | ({"packages"} if options.distros else set()) | ({"images"} if options.images else set())
        )
    return known_parts(options.parts)


def known_parts(parts: Iterable[str]) -> set[str]:
    """The parts that a user names. Raises UserError for one that there is not."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: '{part}' is no part", hint=f"the parts are {', '.join(PARTS)}")
    return set(parts)


def _check(options: CreateOptions, parts: set[str]) -> None:
    """All that can be said before anything is downloaded."""
    if "packages" in parts and not options.distros:
        raise UserError(
            "--parts packages: of which distribution?",
            hint=f"--distro NAME: {', '.join(host_collect.KNOWN)}",
        )
    if "images" in parts and not options.images:
        raise UserError(
            "--parts images: which images?", hint="--image TAG, as 'tunesmith image build' named it"
        )
    for label in options.distros:
        host_collect.distro_named(label)
    _target(options).check()
    if options.recipe is not None and not options.recipe.is_file():
        raise UserError(f"{options.recipe}: there is no such recipe", hint="check the path")


def _target(options: CreateOptions) -> wheels.WheelTarget:
    return wheels.WheelTarget(options.platforms, options.python)


# -- parts -----------------------------------------------------------------------------------------------


def _packages(store: Store, label: str, options: CreateOptions) -> Item:
    distro = host_collect.distro_named(label)
    names = host_collect.wanted_packages(distro, gpu=options.gpu)
    request = {"distro": label, "packages": names, "mirror": options.mirror}

    def fill(folder: Path) -> None:
        check_disk(store.bundle, host_collect.NEED_BYTES, what=f"packages {label}")
        # apt's root lies outside of what becomes part of the bundle: it keeps half downloaded packages.
        scratch = store.staging("apt", label)
        host_collect.collect_packages(distro, scratch, folder, gpu=options.gpu, mirror=options.mirror)
        shutil.rmtree(scratch, ignore_errors=True)

    return _once(store, "packages", label, f"packages/{label}", request, fill)


def _wheels(store: Store, options: CreateOptions) -> None:
    """tunesmith's own wheel, and those that it depends on: the second is large and changes seldom."""
    target = _target(options)
    own = _once(store, "wheels", "tunesmith", "wheels", {"own": _code_hash()}, _build_own)
    pins = wheels.constraints()
    request = {
        **target.as_dict(),
        "extras": options.extras,
        "requires": sorted(requires("tunesmith") or []),
        "constraints": sha256_json(pins),
    }

    def fill(folder: Path) -> None:
        check_disk(store.bundle, wheels.NEED_BYTES, what="the wheels")
        write_text(folder / CONSTRAINTS, pins)
        wheel = store.bundle / own.paths[0]
        wheels.download_wheels(wheel, options.extras, target, folder / CONSTRAINTS, folder)
        (folder / wheel.name).unlink(missing_ok=True)

    _once(store, "wheels", DEPENDENCIES, "wheels", request, fill)


def _build_own(folder: Path) -> None:
    wheels.build_own_wheel(folder)


def _code_hash() -> str:
    """The hash of this tunesmith's own files: a wheel holds times, and so another hash at each build."""
    package = Path(sys.modules["tunesmith"].__file__ or "").parent
    names = {str(path.relative_to(package)): sha256_file(path) for path in sorted(package.rglob("*.py"))}
    return sha256_json(names)


def _contents(store: Store, options: CreateOptions, parts: set[str]) -> None:
    """Model, data and project: of the recipe, or what the quickstart needs."""
    if options.recipe is not None:
        collect_recipe(store, options.recipe, parts)
    elif "model" in parts and not options.models:
        collect_model(store, BUILTIN)
    if "model" in parts:
        for name in options.models:
            collect_model(store, name)
    if options.recipe is not None and "data" in parts:
        collect_data(store, options.recipe)
    if "project" in parts:
        collect(
            store,
            Collected("project", "tunesmith", "project/tunesmith", {"kind": "project"}, _project_files()),
        )


def _project_files() -> dict[str, Path]:
    """Recipes, examples, scripts and documents: of the source tree, or those in the installed package."""
    root = wheels.source_tree()
    if root is None:
        return files_below(Path(sys.modules["tunesmith"].__file__ or "").parent / "shipped")
    found = {name: root / name for name in PROJECT_FILES if (root / name).is_file()}
    for folder in PROJECT_FOLDERS:
        found |= {f"{folder}/{name}": path for name, path in _sources(root / folder)}
    return found


def _sources(folder: Path) -> Iterable[tuple[str, Path]]:
    return [(name, path) for name, path in files_below(folder).items() if "__pycache__" not in path.parts]


def _installer(store: Store, options: CreateOptions) -> Item:
    python = str(_target(options).as_dict()["python"])
    request = {"python": python, "own": _code_hash()}
    names = f"{SCRIPT} and {INSTALLER}"
    return _once(
        store, "installer", names, "", request, lambda folder: write_installer(folder, python=python)
    )


def _once(
    store: Store, part: str, name: str, root: str, request: dict[str, Any], fill: Callable[[Path], None]
) -> Item:
    """The item as it was collected before, or as `fill(folder)` collects it now."""
    known = store.keep(part, name, request)
    if known is not None:
        return known
    folder = store.staging(part, name)
    fill(folder)
    return store.add(part, name, root, request, folder)

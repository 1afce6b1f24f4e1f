"""Put a bundle in place on a machine without network: verify, then each part that is not there yet."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.progress import Meter, say
from tunesmith.core.units import bytes_text
from tunesmith.host.collect import this_distro
from tunesmith.hub.bundle_environment import environment_is_whole, make_environment
from tunesmith.hub.bundle_manifest import Item, Manifest, open_manifest
from tunesmith.hub.bundle_models import conflicts, is_placed, place, place_of
from tunesmith.hub.bundle_store import check_disk
from tunesmith.workflows.bundle import PARTS, known_parts, verify
from tunesmith.workflows.bundle_images import is_loaded, load_image

FAULTS_SHOWN = 20
State = Literal["there already", "done", "to do", "by hand", "not for here"]


@dataclass(frozen=True, kw_only=True)
class InstallOptions:
    """parts: None takes all that the bundle has. venv: where the Python environment goes; None: this one
    stays. project: folder for the recipe, its data and the examples. verified: it was checked just now.
    set_up: brings the bundle's packages onto this host; None leaves that to the person.
    """

    bundle: Path
    parts: tuple[str, ...] | None = None
    venv: Path | None = None
    project: Path = Path("tunesmith")
    dry_run: bool = False
    verified: bool = False
    set_up: Callable[[Path], None] | None = None


@dataclass
class Step:
    """One thing to put in place: `place` says where, `command` what a person has to call."""

    part: str
    name: str
    place: str
    bytes: int = 0
    state: State = "to do"
    command: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class Installed:
    """`steps`: what was done for each item; `then`: the commands that can be called now."""

    bundle: Path
    steps: list[Step]
    then: list[str]
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": True,
            "bundle": str(self.bundle),
            "dry_run": self.dry_run,
            "steps": [step.as_dict() for step in self.steps],
            "then": self.then,
        }


@dataclass(frozen=True)
class _Job:
    """A step with what does it, and what tells that it is done."""

    step: Step
    is_done: Callable[[], bool]
    do: Callable[[], object]


def install(options: InstallOptions) -> Installed:
    """Verify the bundle and put its parts in place; what is in place already is left alone.

    Raises TunesmithError when the bundle is damaged, UserError when a file stands in the way.
    """
    bundle = options.bundle.expanduser().absolute()
    manifest = _verified(bundle, options)
    parts = _parts(manifest, options)
    project = options.project.expanduser().absolute()
    jobs = _jobs(bundle, manifest, parts, project, options)
    for job in jobs:
        if job.step.state == "to do" and job.is_done():
            job.step.state = "there already"
    _check(manifest, parts, project, [job.step for job in jobs])
    for job in jobs if not options.dry_run else []:
        if job.step.state == "to do":
            say(f"{job.step.part} {job.step.name} -> {job.step.place} ({bytes_text(job.step.bytes)})")
            job.do()
            job.step.state = "done"
    return Installed(
        bundle, [job.step for job in jobs], _then(manifest, parts, project, options, jobs), options.dry_run
    )


def _verified(bundle: Path, options: InstallOptions) -> Manifest:
    if options.verified:
        return open_manifest(bundle)
    found = verify(bundle)
    if found.faults:
        told = "\n".join(f"  {fault}" for fault in found.faults[:FAULTS_SHOWN])
        raise TunesmithError(
            f"{bundle}: the bundle is damaged, nothing was installed:\n{told}",
            hint="copy these files again; 'tunesmith bundle verify' lists all",
        )
    return found.manifest


def _parts(manifest: Manifest, options: InstallOptions) -> set[str]:
    there = {item.part for item in manifest.items} & set(PARTS)
    if options.parts is None:
        return there
    wanted = known_parts(options.parts)
    for part in options.parts:
        if part not in there:
            raise UserError(
                f"--parts {part}: the bundle does not hold it", hint=f"it holds {', '.join(sorted(there))}"
            )
    return wanted


def _jobs(
    bundle: Path, manifest: Manifest, parts: set[str], project: Path, options: InstallOptions
) -> list[_Job]:
    packages = manifest.of("packages") if "packages" in parts else ()
    jobs = [_packages_job(bundle, item, manifest, options.set_up) for item in packages]
    if "wheels" in parts and options.venv is not None:
        jobs.append(_environment_job(bundle, manifest, options.venv.expanduser().absolute()))
    for item in manifest.items:
        if item.part not in parts:
            continue
        if item.part == "images":
            jobs.append(_image_job(bundle, manifest, item))
        elif item.part in ("model", "data", "project"):
            jobs.append(_files_job(bundle, manifest, item, project))
    return jobs


def _packages_job(
    bundle: Path, item: Item, manifest: Manifest, set_up: Callable[[Path], None] | None
) -> _Job:
    """Host packages go in by setup, which knows the rest of the way; first, since images need docker."""
    step = Step("packages", item.name, "this host", manifest.bytes_of(item))
    if this_distro().label != item.name:
        step.state = "not for here"
    elif set_up is None:
        step.state, step.command = "by hand", f"sudo tunesmith setup --bundle {bundle}"
    return _Job(step, lambda: False, lambda: set_up(bundle) if set_up else None)


def _environment_job(bundle: Path, manifest: Manifest, venv: Path) -> _Job:
    size = manifest.bytes_of(*manifest.of("wheels"))
    return _Job(
        Step("wheels", "python", str(venv), 4 * size),  # unpacked, and compiled to bytecode
        lambda: environment_is_whole(manifest, venv),
        lambda: make_environment(bundle, manifest, venv),
    )


def _image_job(bundle: Path, manifest: Manifest, item: Item) -> _Job:
    size = manifest.bytes_of(item)
    return _Job(
        Step("images", item.name, "docker", size),
        lambda: is_loaded(item),
        lambda: load_image(bundle, manifest, item),
    )


def _files_job(bundle: Path, manifest: Manifest, item: Item, project: Path) -> _Job:
    size = manifest.bytes_of(item)

    def do() -> None:
        with Meter(item.name, total=size) as meter:
            place(bundle, manifest, item, project, count=meter.advance)

    step = Step(item.part, item.name, str(place_of(item, project)), size)
    return _Job(step, lambda: is_placed(manifest, item, project), do)


def _check(manifest: Manifest, parts: set[str], project: Path, steps: list[Step]) -> None:
    """Refuse before anything is written: a file in the way, or too small a disk."""
    for item in manifest.items:
        if item.part in parts & {"model", "data", "project"}:
            stands = conflicts(manifest, item, project)
            if stands:
                raise UserError(
                    f"{stands[0]}: is there already, and is another file than the bundle's",
                    hint="move it away, or give another folder to --project",
                )
    need: dict[Path, int] = defaultdict(int)
    for step in steps:
        if step.state == "to do" and step.part != "images":
            need[_mount(Path(step.place))] += step.bytes
    for folder, num_bytes in need.items():
        check_disk(folder, num_bytes, what="the bundle")


def _mount(path: Path) -> Path:
    """The folder at which the disk of `path` is mounted."""
    while not path.exists() or not path.is_mount():
        path = path.parent
    return path


def _then(
    manifest: Manifest, parts: set[str], project: Path, options: InstallOptions, jobs: list[_Job]
) -> list[str]:
    """What can be called now."""
    venv = options.venv.expanduser().absolute() if options.venv else Path(sys.prefix)
    program = str(venv / "bin" / "tunesmith")
    found = [job.step.command.replace("tunesmith", program, 1) for job in jobs if job.step.command]
    if "project" in parts and any(item.name == "recipe" for item in manifest.of("project")):
        found.append(f"cd {project} && {program} train recipe.yaml")
    elif "model" in parts:
        found.append(f"{program} quickstart")
    return found

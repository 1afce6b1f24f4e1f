"""Building an image: the context folder, and the docker commands.

CONTEXT/Dockerfile   build/tunesmith-*.whl   build/constraints.txt   build/pins.py   build/wheels/*.whl
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.paths import free_bytes, write_text
from tunesmith.core.units import bytes_text
from tunesmith.image import pins
from tunesmith.image.docker import check_reference, docker_show, inspect_image
from tunesmith.image.dockerfile import ImageSpec, Stage, render

NETWORKS = ("default", "host", "none")


@dataclass(frozen=True)
class Built:
    """An image that a build made. `bytes`: its size with all layers."""

    stage: Stage
    name: str
    id: str
    bytes: int
    labels: dict[str, str]


def image_names(stages: Sequence[Stage], tag: str | None = None) -> dict[Stage, str]:
    """The names that the stages' images get: `tunesmith:STAGE`, or `NAME:STAGE` for another NAME.

    A tag that is whole (`NAME:TAG`) names one stage's image. Raises UserError when it is given for several.
    """
    name = check_reference(tag or "tunesmith", "--tag")
    if "@" in name:
        raise UserError(f"--tag {name}: a digest cannot be given to an image", hint="give NAME or NAME:TAG")
    if ":" not in name.rpartition("/")[2]:
        return {stage: f"{name}:{stage}" for stage in stages}
    if len(stages) > 1:
        raise UserError(
            f"--tag {name}: one name for {len(stages)} images",
            hint="give --stage too, or a name without a tag",
        )
    return {stages[0]: name}


def build_commands(spec: ImageSpec, names: dict[Stage, str], network: str | None) -> list[list[str]]:
    """The arguments of docker for each stage, to be run in the context folder."""
    if network is not None and network not in NETWORKS:
        raise UserError(f"--network '{network}': docker build takes {', '.join(NETWORKS)}")
    more = ["--network", network] if network else []
    return [["build", *more, "--target", stage, "--tag", names[stage], "."] for stage in spec.stages]


def make_context(
    folder: Path,
    spec: ImageSpec,
    *,
    constraints: str,
    own_wheel: Callable[[Path], Path],
    wheelhouse: Path | None,
) -> None:
    """Fill an empty folder with all that the Dockerfile copies. `own_wheel` makes tunesmith's in a folder."""
    write_text(folder / "Dockerfile", render(spec))
    build = folder / "build"
    write_text(build / "constraints.txt", constraints)
    # Only its source is used: it runs under the image's Python.
    write_text(build / "pins.py", Path(pins.__file__).read_text(encoding="utf-8"))
    if wheelhouse is not None:
        _copy_wheels(wheelhouse, build / "wheels")
    wheel = own_wheel(build)
    if wheel.name != spec.wheel:
        wheel.rename(build / spec.wheel)


def check_wheelhouse(folder: Path) -> list[Path]:
    """The wheels in a folder. Raises UserError when there is none."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(
            f"--wheelhouse {folder}: no wheels are in it",
            hint="'pip download' or 'tunesmith bundle create' fills a folder with wheels",
        )
    return wheels


def _copy_wheels(wheelhouse: Path, target: Path) -> None:
    wheels = [path for path in check_wheelhouse(wheelhouse) if not path.name.startswith("tunesmith-")]
    need = sum(path.stat().st_size for path in wheels)
    free = free_bytes(target)
    if free < need:
        raise UserError(
            f"{target}: the wheels have {bytes_text(need)}, the disk has {bytes_text(free)} free",
            hint="set TUNESMITH_CACHE to a folder on another disk",
        )
    target.mkdir(parents=True)
    for path in wheels:
        _link_or_copy(path, target / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def run_builds(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Build every stage; docker's log goes to stderr. Raises TunesmithError when one fails."""
    for command in commands:
        docker_show(*command, cwd=folder)


def built(stage: Stage, name: str) -> Built:
    image = inspect_image(name)
    labels = dict((image.get("Config") or {}).get("Labels") or {})
    return Built(stage=stage, name=name, id=str(image["Id"]), bytes=int(image["Size"]), labels=labels)

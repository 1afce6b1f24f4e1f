"""Runs inside an image build: makes our locked versions and those of the base image one list for pip.

A base such as NVIDIA's PyTorch image brings a torch of its own, and packages compiled against it: a second
torch over it breaks them all (`undefined symbol`). So these are held at what the base has; the base's
constraint file holds for the rest, but for versions that tunesmith cannot use, which go into its own
environment and leave the base's as they are.

This file is copied into the build and imports nothing of tunesmith. `pins.py write` makes /build/pins.txt,
`pins.py check` fails when something that is held came from elsewhere than the base.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from importlib.metadata import Distribution, distributions
from pathlib import Path

BASE_CONSTRAINTS = Path("/etc/pip/constraint.txt")
HELD = re.compile(
    r"torch|torch(vision|audio|ao|-tensorrt)|(pytorch-)?triton|flash-attn.*|transformer-engine.*|apex|"
    r"numpy|nvidia-.*|cuda-.*|cupy.*|xgrammar|nvfuser.*"
)
PIN = re.compile(r"^\s*([A-Za-z0-9][\w.-]*)\s*===?\s*([^\s;#]+)")


def canonical(name: str) -> str:
    """The name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """`name==version` lines as {canonical name: version}; all other lines are left out."""
    found = (PIN.match(line) for line in text.splitlines())
    return {canonical(match[1]): match[2] for match in found if match}


def installed(own_prefix: str) -> dict[str, str]:
    """The packages of the base image: those that this environment sees outside of its own folder."""
    found: dict[str, str] = {}
    for dist in distributions():
        name = dist.metadata["Name"]
        if name and not str(dist.locate_file("")).startswith(own_prefix):
            found.setdefault(canonical(name), dist.version)
    return found


def merge(
    ours: dict[str, str], theirs: dict[str, str], base: dict[str, str], requirements: list[str]
) -> tuple[dict[str, str], list[str]]:
    """The pins to install with, and notes on what was decided.

    ours: our lock; theirs: the base's constraint file; base: what the base has installed; requirements: what
    tunesmith itself asks for. What is held has the base's version; else the base's constraint where tunesmith
    can use it; else ours.
    """
    held = {name: version for name, version in base.items() if HELD.fullmatch(name)}
    unusable = {name for name, version in theirs.items() if not usable(name, version, requirements)}
    notes = [f"{name} {theirs[name]} of the base is not what tunesmith needs" for name in sorted(unusable)]
    clash = sorted(unusable & held.keys())
    if clash:
        raise SystemExit(f"pins.py: the base image is too old for tunesmith: {', '.join(clash)}")
    kept = {name: version for name, version in theirs.items() if name not in unusable}
    return ours | kept | held, notes


def usable(name: str, version: str, requirements: list[str]) -> bool:
    """Whether all requirements on `name` take `version`; pre-releases count, as NVIDIA's torch is one."""
    from pip._vendor.packaging.requirements import Requirement

    asked = (Requirement(text) for text in requirements)
    return all(
        item.specifier.contains(version, prereleases=True) for item in asked if canonical(item.name) == name
    )


def requirements_of(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata, without those that are tunesmith's own extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [text for text in found if not text.startswith("tunesmith")]


def write(folder: Path) -> None:
    wheel = next(folder.glob("tunesmith-*.whl"))
    theirs = read_pins(BASE_CONSTRAINTS.read_text()) if BASE_CONSTRAINTS.exists() else {}
    base = installed(sys.prefix)
    ours = read_pins((folder / "constraints.txt").read_text())
    pins, notes = merge(ours, theirs, base, requirements_of(wheel))
    (folder / "pins.txt").write_text("".join(f"{name}=={pins[name]}\n" for name in sorted(pins)))
    held = {name: version for name, version in base.items() if HELD.fullmatch(name)}
    (folder / "held.json").write_text(json.dumps(held))
    for note in notes:
        print(note)  # noqa: T201


def check(folder: Path) -> None:
    held = json.loads((folder / "held.json").read_text())
    own = {canonical(dist.metadata["Name"]) for dist in distributions() if _inside(dist)}
    replaced = sorted(held.keys() & own)
    if replaced:
        raise SystemExit(f"pins.py: pip installed over the base image's own: {', '.join(replaced)}")


def _inside(dist: Distribution) -> bool:
    return str(dist.locate_file("")).startswith(sys.prefix)


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))

"""Host packages in a bundle: where they lie, and in which order they go in.

    packages/ubuntu-22.04/order.txt     file names in dependency order, one a line
    packages/ubuntu-22.04/*.deb         (*.rpm for the dnf and yum families)

`collect_packages` (host/collect.py) writes this layout; `bundled_packages` reads it, and also a plain folder
of package files that somebody collected by hand.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.host.distro import Distro

PACKAGES = "packages"
ORDER = "order.txt"

TOOLKIT_VERSION = "1.20.0-1"
# The order in which dpkg and rpm take them when each is installed alone (NVIDIA's install guide).
TOOLKIT = (
    "libnvidia-container1",
    "libnvidia-container-tools",
    "nvidia-container-toolkit-base",
    "nvidia-container-toolkit",
)
# What is collected by hand goes in so: what the others depend on, then docker, then the toolkit.
BY_HAND = (
    "containerd.io",
    "docker-ce-cli",
    "docker-ce",
    "docker.io",
    "docker-buildx",
    "docker-compose",
    *TOOLKIT,
)
DOCKER_RPM = ("docker-ce", "docker-ce-cli", "containerd.io", "docker-buildx-plugin", "docker-compose-plugin")


def bundled_releases(bundle: Path) -> list[str]:
    """The distributions that a bundle has packages for, such as `ubuntu-22.04`."""
    found = (bundle / PACKAGES).glob(f"*/{ORDER}")
    return sorted(path.parent.name for path in found)


def bundled_packages(bundle: Path, distro: Distro) -> list[Path]:
    """The package files of a bundle for this distribution, in the order in which they are to be installed.

    Raises UserError when the folder is no bundle with packages, has none for this distribution, or when its
    order.txt names a file that is not there.
    """
    name = distro.label
    folder = bundle / PACKAGES / name
    loose = _loose_packages(bundle, distro)
    if loose and not (bundle / PACKAGES).exists():
        return loose
    if not (folder / ORDER).is_file():
        there = ", ".join(bundled_releases(bundle)) or "none at all"
        raise UserError(
            f"{bundle}: has no host packages for {name}; it has {there}",
            hint=f"with network: tunesmith bundle create DIR --parts packages --distro {name}; a folder with "
            f"{'.rpm' if distro.is_rpm else '.deb'} files alone will do too",
        )
    lines = (folder / ORDER).read_text(encoding="utf-8").splitlines()
    return [_package(folder, line.strip()) for line in lines if line.strip()]


def _loose_packages(folder: Path, distro: Distro) -> list[Path]:
    """The distribution's kind of package files lying in `folder` itself, in the order of `BY_HAND`."""
    return sorted(
        folder.glob("*.rpm" if distro.is_rpm else "*.deb"), key=lambda path: (_rank(path), path.name)
    )


def _rank(path: Path) -> int:
    """The place of the longest name in `BY_HAND` that the file's name begins with; others go first."""
    fits = [name for name in BY_HAND if path.name.startswith((f"{name}-", f"{name}_"))]
    return BY_HAND.index(max(fits, key=len)) if fits else -1


def _package(folder: Path, name: str) -> Path:
    if "/" in name or not name.endswith((".deb", ".rpm")):
        raise UserError(f"{folder / ORDER}: '{name}' is no name of a .deb or .rpm file")
    path = folder / name
    if not path.is_file():
        raise UserError(
            f"{path}: is named in {ORDER}, but is not there",
            hint="copy the bundle again; tunesmith bundle verify names all that is missing",
        )
    return path

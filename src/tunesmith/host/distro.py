"""Which Linux distribution a host runs, and what follows from that: package tool, names, toolkit support."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from tunesmith.host.facts import Facts

Family = Literal["apt", "dnf", "yum", "other"]

OS_RELEASE = "/etc/os-release"

APT_IDS = ("ubuntu", "debian")
RPM_IDS = ("centos", "rocky", "rhel", "almalinux")

# Releases that NVIDIA's list of supported platforms names (container toolkit documents, July 2026). Newer
# Debian and AlmaLinux are not named; the same two package repositories serve them, "any Debian-derived
# distribution" works by the install guide, and packages are said to be forward-compatible.
LISTED = {
    "ubuntu": ("22.04", "24.04", "26.04"),
    "debian": ("11",),
    "centos": ("8",),
    "rhel": ("8", "9", "10"),
    "rocky": ("9",),
}
# Releases that were on that list once: an answer of "unknown" would hide that support has ended.
DROPPED = {
    "centos": ("7",),
    "rhel": ("7",),
    "debian": ("9", "10"),
    "ubuntu": ("16.04", "18.04", "20.04"),
}

CODENAMES = {
    ("ubuntu", "18.04"): "bionic", ("ubuntu", "20.04"): "focal", ("ubuntu", "22.04"): "jammy",
    ("ubuntu", "24.04"): "noble", ("ubuntu", "26.04"): "resolute",
    ("debian", "10"): "buster", ("debian", "11"): "bullseye", ("debian", "12"): "bookworm",
    ("debian", "13"): "trixie",
}  # fmt: skip

ToolkitSupport = Literal["listed", "works", "dropped", "unknown"]


@dataclass(frozen=True)
class Distro:
    """A distribution as `/etc/os-release` names it.

    `id`: ubuntu, debian, centos, rocky, rhel, almalinux or what the file says. `version`: VERSION_ID.
    `family`: its package tool ("apt", "dnf", "yum"), "other" where tunesmith knows none.
    `name`: for people. `toolkit`: "listed" by NVIDIA, "works" (same packages, not listed), "dropped" from
    the list, "unknown".
    """

    id: str
    version: str
    family: Family
    codename: str
    name: str
    toolkit: ToolkitSupport
    stream: bool = False

    @property
    def major(self) -> int:
        """The release before the first dot; 0 when there is none."""
        found = re.match(r"\d+", self.version)
        return int(found[0]) if found else 0

    @property
    def is_rpm(self) -> bool:
        return self.family in ("dnf", "yum")

    @property
    def supported_by_toolkit(self) -> bool:
        return self.toolkit in ("listed", "works")

    @property
    def tool(self) -> str:
        """The package command: apt-get, dnf or yum; of an unknown distribution the most common one."""
        return {"apt": "apt-get", "dnf": "dnf", "yum": "yum", "other": "apt-get"}[self.family]

    def install(self, *packages: str) -> list[str]:
        """The command that installs packages without asking."""
        return [self.tool, "install", "-y", *packages]

    def remove(self, *packages: str) -> list[str]:
        """The command that removes packages without asking."""
        return [self.tool, "remove", "-y", *packages]

    @property
    def label(self) -> str:
        """`ubuntu-22.04`, `rocky-9`: the name of the folder that holds its packages in a bundle."""
        return f"{self.id}-{self.version if self.family == 'apt' else self.major}"


def read_os_release(text: str) -> dict[str, str]:
    """The keys of an os-release file; quotes are those of a shell, a broken line is left out."""
    found = {}
    for line in text.splitlines():
        key, sign, value = line.strip().partition("=")
        if not sign or key.startswith("#"):
            continue
        try:
            found[key] = " ".join(shlex.split(value))
        except ValueError:
            continue
    return found


def read_distro(facts: Facts) -> Distro:
    """The distribution of a host; of a host without `/etc/os-release` one of family "other"."""
    keys = read_os_release(facts.file(OS_RELEASE) or facts.file("/usr/lib/os-release") or "")
    ident, version = keys.get("ID", "").lower(), keys.get("VERSION_ID", "")
    name = keys.get("PRETTY_NAME") or f"{keys.get('NAME') or ident or 'unknown Linux'} {version}".strip()
    like = keys.get("ID_LIKE", "").lower().split()
    return Distro(
        id=ident or "unknown",
        version=version,
        family=_family(ident, version, like),
        codename=keys.get("VERSION_CODENAME")
        or keys.get("UBUNTU_CODENAME")
        or CODENAMES.get((ident, version), ""),
        name=name,
        toolkit=_toolkit(ident, version),
        stream="stream" in name.lower(),
    )


def _family(ident: str, version: str, like: list[str]) -> Family:
    if ident in APT_IDS or (ident not in RPM_IDS and {"debian", "ubuntu"} & set(like)):
        return "apt"
    if ident in RPM_IDS or ident in ("ol", "fedora") or {"rhel", "fedora", "centos"} & set(like):
        major = re.match(r"\d+", version)
        return "yum" if ident != "fedora" and major and int(major[0]) < 8 else "dnf"
    return "other"


def _toolkit(ident: str, version: str) -> ToolkitSupport:
    major = version.split(".")[0]
    if version in DROPPED.get(ident, ()) or major in DROPPED.get(ident, ()):
        return "dropped"
    if version in LISTED.get(ident, ()) or major in LISTED.get(ident, ()):
        return "listed"
    if ident in (*APT_IDS, *RPM_IDS, "ol", "fedora"):
        return "works"
    return "unknown"

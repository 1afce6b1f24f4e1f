"""Distributions by their os-release files, as those are found on real systems."""

from __future__ import annotations

import pytest

from tunesmith.host.distro import read_distro
from tunesmith.host.facts import Facts


def distro(text: str):  # type: ignore[no-untyped-def]
    return read_distro(Facts(files={"/etc/os-release": text}))


@pytest.mark.parametrize(
    ("text", "family", "tool", "codename", "toolkit", "label"),
    [
        ("ID=ubuntu\nVERSION_ID=\"22.04\"\nVERSION_CODENAME=jammy\n", "apt", "apt-get", "jammy", "listed", "ubuntu-22.04"),
        ("ID=ubuntu\nVERSION_ID=\"22.04\"\n", "apt", "apt-get", "jammy", "listed", "ubuntu-22.04"),
        ("ID=ubuntu\nVERSION_ID='20.04'\n", "apt", "apt-get", "focal", "dropped", "ubuntu-20.04"),
        ("ID=ubuntu\nVERSION_ID=26.04\n", "apt", "apt-get", "resolute", "listed", "ubuntu-26.04"),
        ("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n", "apt", "apt-get", "bookworm", "works", "debian-12"),
        ("ID=\"centos\"\nVERSION_ID=\"7\"\nID_LIKE=\"rhel fedora\"\n", "yum", "yum", "", "dropped", "centos-7"),
        ("ID=\"centos\"\nVERSION_ID=\"8\"\n", "dnf", "dnf", "", "listed", "centos-8"),
        ("ID=\"rocky\"\nVERSION_ID=\"9.4\"\n", "dnf", "dnf", "", "listed", "rocky-9"),
        ("ID=\"rhel\"\nVERSION_ID=\"10.0\"\n", "dnf", "dnf", "", "listed", "rhel-10"),
        ("ID=\"almalinux\"\nVERSION_ID=\"9.3\"\n", "dnf", "dnf", "", "works", "almalinux-9"),
        ("ID=linuxmint\nVERSION_ID=\"21.3\"\nID_LIKE=\"ubuntu debian\"\nUBUNTU_CODENAME=jammy\n", "apt", "apt-get", "jammy", "unknown", "linuxmint-21.3"),
        ("ID=arch\n", "other", "apt-get", "", "unknown", "arch-0"),
    ],
)  # fmt: skip
def test_known_distributions(
    text: str, family: str, tool: str, codename: str, toolkit: str, label: str
) -> None:
    found = distro(text)
    assert (found.family, found.tool, found.codename, found.toolkit, found.label) == (
        family, tool, codename, toolkit, label,
    )  # fmt: skip
    assert found.supported_by_toolkit == (toolkit in ("listed", "works"))


def test_names_for_people() -> None:
    assert (
        distro('ID=rocky\nVERSION_ID=9.4\nPRETTY_NAME="Rocky Linux 9.4 (Blue Onyx)"\n').name
        == "Rocky Linux 9.4 (Blue Onyx)"
    )
    assert distro("ID=ubuntu\nVERSION_ID=22.04\n").name == "ubuntu 22.04"
    assert read_distro(Facts()).name == "unknown Linux"


def test_stream_and_broken_lines() -> None:
    found = distro('NAME="CentOS Stream"\nID="centos"\nVERSION_ID="9"\nBROKEN="no end\n# ID=debian\n')
    assert (found.stream, found.id, found.major) == (True, "centos", 9)
    assert found.install("docker-ce") == ["dnf", "install", "-y", "docker-ce"]
    assert found.remove("podman") == ["dnf", "remove", "-y", "podman"]


def test_the_other_place_of_the_file() -> None:
    assert read_distro(Facts(files={"/usr/lib/os-release": "ID=debian\nVERSION_ID=12\n"})).id == "debian"

"""Host packages of a bundle: where they lie, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.host.collect import (
    archive_sources,
    collect_packages,
    distro_named,
    repositories,
    rpm_order,
    this_distro,
    wanted_packages,
)
from tunesmith.host.packages import TOOLKIT, bundled_packages, bundled_releases


def bundle(folder: Path, label: str, names: list[str], order: str | None = None) -> Path:
    place = folder / "packages" / label
    place.mkdir(parents=True)
    for name in names:
        (place / name).write_bytes(b"x")
    (place / "order.txt").write_text(order if order is not None else "".join(f"{name}\n" for name in names))
    return folder


def test_packages_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    bundle(tmp_path, "ubuntu-22.04", ["b_1_amd64.deb", "a_1_amd64.deb"])
    found = bundled_packages(tmp_path, distro_named("ubuntu-22.04"))
    assert [path.name for path in found] == ["b_1_amd64.deb", "a_1_amd64.deb"]
    assert bundled_releases(tmp_path) == ["ubuntu-22.04"]


def test_another_distribution_is_told_what_there_is(tmp_path: Path) -> None:
    bundle(tmp_path, "ubuntu-22.04", ["a.deb"])
    with pytest.raises(UserError, match=r"no host packages for rocky-9; it has ubuntu-22\.04"):
        bundled_packages(tmp_path, distro_named("rocky-9.4"))
    with pytest.raises(UserError, match="it has none at all"):
        bundled_packages(tmp_path / "nothing", distro_named("debian-12"))


@pytest.mark.parametrize("line", ["../evil.deb", "/tmp/evil.deb", "--force.txt", "gone.deb"])
def test_the_order_names_only_packages_that_are_there(tmp_path: Path, line: str) -> None:
    bundle(tmp_path, "debian-12", ["a.deb"], f"a.deb\n{line}\n")
    with pytest.raises(UserError, match=line.rpartition("/")[2]):
        bundled_packages(tmp_path, distro_named("debian-12"))


@pytest.mark.parametrize("label", ["ubuntu", "ubuntu-99.04", "arch-2024", "../x", "ubuntu-22.04; rm", ""])
def test_unknown_distributions_are_refused(label: str) -> None:
    with pytest.raises(UserError, match="--distro"):
        distro_named(label)


def test_what_each_family_needs() -> None:
    jammy = wanted_packages(distro_named("ubuntu-22.04"), gpu=True)
    assert jammy[:3] == ["python3.11", "python3.11-venv", "docker.io"]
    assert jammy[-4:] == [f"{name}=1.20.0-1" for name in TOOLKIT]
    rocky = wanted_packages(distro_named("rocky-9"), gpu=True)
    assert rocky[:3] == ["python3.11", "docker-ce", "docker-ce-cli"]
    assert rocky[-1] == "nvidia-container-toolkit-1.20.0-1"
    assert not set(TOOLKIT) & set(wanted_packages(distro_named("debian-12"), gpu=False))


def test_rpm_repositories_are_checked_against_their_keys() -> None:
    options = repositories(distro_named("rocky-9"), gpu=True)
    assert "tunesmith-docker,https://download.docker.com/linux/centos/9/$basearch/stable" in options
    assert sum(option.endswith(".gpgcheck=1") for option in options) == 2


def test_the_toolkit_stands_last_in_its_own_order() -> None:
    files = [f"{name}-1.20.0-1.x86_64.rpm" for name in reversed(TOOLKIT)]
    ordered = rpm_order([*files, "docker-ce-29.0-1.el9.x86_64.rpm", "containerd.io-2.1-1.x86_64.rpm"])
    assert ordered == [
        "containerd.io-2.1-1.x86_64.rpm",
        "docker-ce-29.0-1.el9.x86_64.rpm",
        *(f"{name}-1.20.0-1.x86_64.rpm" for name in TOOLKIT),
    ]


def test_sources_are_signed_by_the_distributions_keyring() -> None:
    if this_distro().id != "debian":
        pytest.skip("Debian's keyring is on Debian")
    text = archive_sources(distro_named("debian-13"), "https://your.mirror/debian")
    assert text.count("signed-by=/usr/share/keyrings/debian-archive-keyring.gpg") == 3
    assert "trixie-security main" in text and "https://your.mirror/debian trixie main" in text
    mirrored = archive_sources(distro_named("debian-12"), "https://your.mirror/debian/")
    assert "https://your.mirror/debian bookworm main" in mirrored
    assert "https://your.mirror/debian-security bookworm-security main" in mirrored


def test_another_release_needs_its_archive_named() -> None:
    if this_distro().id != "debian":
        pytest.skip("Debian's keyring is on Debian")
    with pytest.raises(UserError, match="package sources are for") as caught:
        archive_sources(distro_named("debian-13"), None)
    assert "--mirror https://your.mirror/debian" in str(caught.value.hint)


def test_a_keyring_that_is_missing_is_named() -> None:
    if Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg").exists():
        pytest.skip("Ubuntu's keyring is here")
    with pytest.raises(UserError, match="cannot be checked") as caught:
        archive_sources(distro_named("ubuntu-22.04"), "https://your.mirror/ubuntu")
    assert caught.value.hint == "sudo apt-get install ubuntu-keyring"


def test_rpm_packages_are_collected_on_their_own_distribution(tmp_path: Path) -> None:
    if this_distro().label == "rocky-9":
        pytest.skip("this is the distribution")
    with pytest.raises(UserError, match="collected with dnf on a rocky-9"):
        collect_packages(distro_named("rocky-9"), tmp_path / "s", tmp_path / "f", gpu=True)


HAND = [
    "libseccomp2_2.5_amd64.deb",
    "containerd.io_1.7_amd64.deb",
    "docker-ce-cli_28.0_amd64.deb",
    "docker-ce_28.0_amd64.deb",
    "docker-buildx-plugin_0.2_amd64.deb",
    "libnvidia-container1_1.20.0-1_amd64.deb",
    "libnvidia-container-tools_1.20.0-1_amd64.deb",
    "nvidia-container-toolkit-base_1.20.0-1_amd64.deb",
    "nvidia-container-toolkit_1.20.0-1_amd64.deb",
]


def test_a_plain_folder_of_packages_is_put_in_order(tmp_path: Path) -> None:
    names = [name.replace("_amd64.deb", "").replace("_", "-") + ".x86_64.rpm" for name in HAND]
    for name in (*HAND, *names):
        (tmp_path / name).touch()
    assert [path.name for path in bundled_packages(tmp_path, distro_named("ubuntu-22.04"))] == HAND
    assert [path.name for path in bundled_packages(tmp_path, distro_named("rocky-9"))] == names
    (tmp_path / "packages").mkdir()
    with pytest.raises(UserError, match="it has none at all"):
        bundled_packages(tmp_path, distro_named("ubuntu-22.04"))

"""The commands that put a finding right, for each distribution, as lines for a root shell.

What `setup` installs is taken from its own steps, so that the two never differ.
"""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

from tunesmith.host.checks_host import Host
from tunesmith.host.distro import Distro
from tunesmith.host.packages import TOOLKIT, TOOLKIT_VERSION
from tunesmith.host.steps_packages import (
    docker_repository_step,
    docker_step,
    is_end_of_life_centos,
    toolkit_repository_step,
    toolkit_step,
    toolkit_version,
    vault_step,
)
from tunesmith.host.steps_types import DOCKER_HOST, Step, Write

RESTART = "systemctl restart docker"
REBOOT = "reboot"
CUDA_REPOSITORY = "https://developer.download.nvidia.com/compute/cuda/repos"
# Folders that the package tools bring.
THERE = ("/etc/yum.repos.d", "/etc/apt/sources.list.d")


def lines_of(*steps: Step) -> list[str]:
    """The commands of steps as lines of a shell."""
    lines = []
    for step in steps:
        for action in step.actions:
            if isinstance(action, Write):
                parent = str(PurePosixPath(action.path).parent)
                lines += [] if parent in THERE else [f"mkdir -p {parent}"]
                lines.append(write_line(action.path, action.text))
            elif isinstance(action, tuple):
                lines.append(shlex.join(action))
    return lines


def write_line(path: str, text: str) -> str:
    """One line of shell that writes a file."""
    quoted = shlex.quote(text.rstrip("\n").replace("\\", "\\\\").replace("%", "%%").replace("\n", "\\n"))
    return f"printf {quoted[:-1]}\\n' > {path}" if quoted.endswith("'") else f"printf '{quoted}\\n' > {path}"


def install_docker(distro: Distro) -> list[str]:
    """docker-ce from Docker's own repository, started now and at every boot."""
    if distro.family == "other" or (distro.family == "apt" and not distro.codename):
        return ["# install docker-ce as https://docs.docker.com/engine/install/ says for this distribution"]
    first = vault(distro) if is_end_of_life_centos(distro) else []
    if not distro.is_rpm:
        first = ["apt-get update", "apt-get install -y ca-certificates curl"]
    steps = lines_of(
        docker_repository_step(distro, DOCKER_HOST),
        docker_step(distro, "docker-ce", refresh=False, replace=False),
    )
    return [*first, *steps, "systemctl enable --now docker"]


def install_toolkit(distro: Distro) -> list[str]:
    """NVIDIA's container toolkit, known to docker, and docker restarted."""
    if distro.family == "other":
        return [f"# install nvidia-container-toolkit {TOOLKIT_VERSION} as NVIDIA's install guide says"]
    note = []
    if distro.toolkit == "dropped":
        version = toolkit_version(distro)
        note = [f"# NVIDIA no longer lists {distro.name}: {version} is the last release of when it did"]
    first = [] if distro.is_rpm else ["apt-get update", "apt-get install -y ca-certificates curl gnupg"]
    return [
        *note,
        *(vault(distro) if is_end_of_life_centos(distro) else []),
        *first,
        *lines_of(toolkit_repository_step(distro), toolkit_step(distro)),
        "nvidia-ctk runtime configure --runtime=docker",
        RESTART,
    ]


def install_toolkit_offline(distro: Distro, machine: str) -> list[str]:
    """The four files of the toolkit in the order of their dependencies, from the folder they lie in."""
    version = toolkit_version(distro)
    arm = machine in ("aarch64", "arm64")
    if distro.is_rpm:
        ending = f"-{version}.{'aarch64' if arm else 'x86_64'}.rpm"
        install = "rpm -ivh"
    else:
        ending = f"_{version}_{'arm64' if arm else 'amd64'}.deb"
        install = "dpkg -i"
    files = " ".join(f"{name}{ending}" for name in TOOLKIT)
    return [
        "# without network: the files come from a bundle made elsewhere (tunesmith setup --bundle DIR), or",
        "# from the release archive of libnvidia-container; in the folder they lie in:",
        f"{install} {files}",
        "nvidia-ctk runtime configure --runtime=docker",
        RESTART,
    ]


def install_driver(distro: Distro) -> list[str]:
    """NVIDIA's driver, without the reboot that it needs."""
    if distro.id == "ubuntu":
        return [
            "apt-get update",
            "apt-get install -y ubuntu-drivers-common linux-headers-$(uname -r)",
            "ubuntu-drivers install",
        ]
    if distro.family == "apt":
        return [
            "# /etc/apt/sources.list: the components 'contrib non-free non-free-firmware' have to be there",
            "apt-get update",
            "apt-get install -y linux-headers-$(uname -r) nvidia-driver firmware-misc-nonfree",
        ]
    if distro.is_rpm:
        return _install_driver_rpm(distro)
    return ["# install NVIDIA's driver with the package tool of this distribution"]


def _install_driver_rpm(distro: Distro) -> list[str]:
    release = f"rhel{distro.major}"
    url = f"{CUDA_REPOSITORY}/{release}/$(uname -m)/cuda-{release}.repo"
    if distro.family == "yum":
        return [
            "yum install -y epel-release yum-utils kernel-devel-$(uname -r) kernel-headers-$(uname -r)",
            f"yum-config-manager --add-repo {url}",
            "yum install -y nvidia-driver-latest-dkms",
        ]
    return [
        *(vault(distro) if is_end_of_life_centos(distro) else []),
        _epel(distro),
        "dnf install -y dnf-plugins-core kernel-devel-$(uname -r) kernel-headers",
        f"dnf config-manager --add-repo {url}",
        # From release 10 on the repository has no module streams.
        "dnf module install nvidia-driver:latest-dkms" if distro.major < 10 else "dnf install -y nvidia-open",
    ]


def _epel(distro: Distro) -> str:
    if distro.id == "rhel":
        base = "https://dl.fedoraproject.org/pub/epel"
        return f"dnf install -y {base}/epel-release-latest-{distro.major}.noarch.rpm"
    return "dnf install -y epel-release"


def blacklist_nouveau(distro: Distro) -> list[str]:
    """nouveau off from the next boot on."""
    rebuild = "dracut --force" if distro.is_rpm else "update-initramfs -u"
    text = "blacklist nouveau\noptions nouveau modeset=0\n"
    return [write_line("/etc/modprobe.d/blacklist-nouveau.conf", text), rebuild]


def enrol_key(distro: Distro) -> list[str]:
    """The key that signs the kernel module, enrolled; the boot asks for the password that is set here."""
    key = "/var/lib/shim-signed/mok/MOK.der" if distro.id == "ubuntu" else "/var/lib/dkms/mok.pub"
    return [
        "# Secure Boot: set a password here, and choose 'Enroll MOK' in the blue screen of the next boot",
        f"mokutil --import {key}",
    ]


def hold_driver(distro: Distro) -> list[str]:
    """The driver's packages, kept from being upgraded under a running kernel module."""
    if distro.is_rpm:
        plugin = "yum-plugin-versionlock" if distro.family == "yum" else "python3-dnf-plugin-versionlock"
        lock = "yum versionlock" if distro.family == "yum" else "dnf versionlock"
        return [f"{distro.tool} install -y {plugin}", f"{lock} add 'nvidia-driver*' 'kmod-nvidia*'"]
    packages = (
        "dpkg-query -W -f '${db:Status-Abbrev} ${Package}\\n' 'nvidia-driver*' 'nvidia-dkms*' "
        "'nvidia-kernel*' 'nvidia-utils*' 'nvidia-compute-utils*' 'libnvidia-compute*' "
        "'linux-modules-nvidia*'"
    )
    return [f"apt-mark hold $({packages} | sed -n 's/^ii *//p')"]


def vault(distro: Distro) -> list[str]:
    """CentOS repositories that still exist, for a release whose mirrors are gone."""
    return [*lines_of(vault_step()), f"{distro.tool} clean all", f"{distro.tool} makecache"]


def delete_old_sources() -> list[str]:
    """Every package source of NVIDIA's toolkit but the one that is current."""
    return [
        "grep -l nvidia.github.io /etc/apt/sources.list.d/* "
        "| grep -vE '/nvidia-container-toolkit.list$' | xargs -r rm --",
        "apt-get update",
    ]


def restart_warning(host: Host) -> list[str]:
    """A note before a command that takes GPUs from containers that run, or stops them."""
    names = [name for name, gpus in host.gpu_containers.items() if gpus]
    if not names or host.gpu == "none":
        return []
    shown = " ".join(shlex.quote(name) for name in names)
    return [
        "# containers that may hold GPUs lose them by what follows: let their work end, stop them",
        f"# now, and start them afterwards (docker start {shown})",
        f"docker stop {shown}",
    ]

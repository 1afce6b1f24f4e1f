"""Bring the packages that a server without network needs: docker, NVIDIA's toolkit, Python.

apt: from any Debian or Ubuntu machine, for any release of both, in an apt root of its own. What a minimal
installation has anyway (priority required or important, with dependencies) is left out: a bundle must never
replace a server's libc. dnf: on a machine or in a container of the same release only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import write_text
from tunesmith.core.proc import run
from tunesmith.core.progress import say
from tunesmith.host.distro import CODENAMES, OS_RELEASE, Distro, read_distro
from tunesmith.host.facts import Facts
from tunesmith.host.packages import ORDER, TOOLKIT
from tunesmith.host.steps_packages import NVIDIA_REPOSITORY, docker_packages, toolkit_version

LABEL = re.compile(r"^(?P<id>[a-z]+)-(?P<version>\d+(\.\d+)?)$")
KNOWN = ("ubuntu-22.04", "ubuntu-24.04", "debian-12", "debian-13", "rocky-8", "rocky-9", "rhel-9", "centos-9")
KEYRINGS = {
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
}
APT_HELPER = "/usr/lib/apt/apt-helper"
BASE_PRIORITIES = ("required", "important")
INSTALLED = re.compile(r"^Inst (\S+) ", re.MULTILINE)
NEED_BYTES = 1 << 30
# Python 3.11 or newer with venv, of the distribution itself.
PYTHON = {
    "ubuntu-22.04": ("python3.11", "python3.11-venv"),
    "ubuntu-24.04": ("python3", "python3-venv"),
    "debian-12": ("python3", "python3-venv"),
    "debian-13": ("python3", "python3-venv"),
    **{f"{name}-{major}": ("python3.11",) for name in ("rocky", "rhel", "almalinux") for major in (8, 9)},
    "centos-9": ("python3.11",),
}


def distro_named(label: str) -> Distro:
    """The distribution that a label such as `ubuntu-22.04` names. Raises UserError for one not known."""
    found = LABEL.match(label)
    if found is None:
        raise UserError(f"--distro '{label}': is no distribution", hint=f"known: {', '.join(KNOWN)}")
    text = f'ID={found["id"]}\nVERSION_ID="{found["version"]}"\n'
    distro = read_distro(Facts(files={OS_RELEASE: text}))
    if distro.family == "other" or (distro.family == "apt" and not distro.codename):
        raise UserError(f"--distro '{label}': is not known here", hint=f"known: {', '.join(KNOWN)}")
    return distro


def this_distro() -> Distro:
    """The distribution of this machine."""
    path = Path(OS_RELEASE)
    return read_distro(Facts(files={OS_RELEASE: path.read_text()} if path.is_file() else {}))


def wanted_packages(distro: Distro, *, gpu: bool) -> list[str]:
    """The names of what a server needs: Python, docker, and with `gpu` the toolkit at its pinned version."""
    names = [
        *PYTHON.get(distro.label, ()),
        *docker_packages(distro, "docker-ce" if distro.is_rpm else "docker.io"),
    ]
    sign = "-" if distro.is_rpm else "="
    return names + ([f"{name}{sign}{toolkit_version(distro)}" for name in TOOLKIT] if gpu else [])


def collect_packages(
    distro: Distro, scratch: Path, folder: Path, *, gpu: bool, mirror: str | None = None
) -> None:
    """Fill `folder` with the packages of `distro` and order.txt. `scratch` keeps what is half downloaded.

    `mirror`: the archive of an apt distribution, in place of this machine's sources; needed for another
    release. Raises UserError where this machine cannot collect for that distribution, TunesmithError where a
    download fails.
    """
    if distro.label not in PYTHON:
        say(f"{distro.name} has no Python 3.11 of its own: bring one to the server in another way")
    folder.mkdir(parents=True, exist_ok=True)
    if distro.is_rpm:
        _collect_rpm(distro, scratch, folder, gpu=gpu)
    else:
        _collect_deb(distro, scratch, folder, gpu=gpu, mirror=mirror)


# -- apt -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AptRoot:
    """An apt of its own below `path`: other sources, no lock and no trace on this machine's."""

    path: Path

    @property
    def status(self) -> Path:
        return self.path / "status"

    @property
    def sources(self) -> Path:
        return self.path / "sources.list.d"

    @property
    def archives(self) -> Path:
        return self.path / "cache" / "archives"

    def prepare(self) -> None:
        for folder in (self.sources, self.path / "state" / "lists" / "partial", self.archives / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        self.status.write_text("")

    def run(self, tool: str, *args: str) -> str:
        """Run apt-get or apt-cache in this root; its output. Raises TunesmithError with apt's last lines."""
        settings = {
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self.sources,
            "Dir::State": self.path / "state",
            "Dir::State::status": self.status,
            "Dir::Cache": self.path / "cache",
            "APT::Sandbox::User": "root",
            "APT::Update::Error-Mode": "any",
            "APT::Install-Recommends": "false",
            "Acquire::Retries": "3",
        }
        options = [option for key, value in settings.items() for option in ("-o", f"{key}={value}")]
        return run([tool, *options, *args], env=None).stdout


def _collect_deb(distro: Distro, scratch: Path, folder: Path, *, gpu: bool, mirror: str | None) -> None:
    if shutil.which("apt-get") is None:
        raise UserError(
            f"packages for {distro.label} are collected with apt-get, which this machine does not have",
            hint=f"make this part on a Debian or Ubuntu machine, or in a container of {distro.label}",
        )
    root = AptRoot(scratch)
    root.prepare()
    for path in root.sources.iterdir():
        path.unlink()
    if distro.label == this_distro().label and mirror is None:
        _copy_sources(root)
    else:
        write_text(root.sources / "archive.list", archive_sources(distro, mirror))
    if gpu:
        _add_toolkit_source(root)
    say(f"read the package lists of {distro.label}")
    try:
        root.run("apt-get", "update")
    except TunesmithError as error:
        raise TunesmithError(
            f"the packages of {distro.label} cannot be listed: {error.what}",
            hint="behind a mirror: --mirror https://your.mirror/ubuntu",
        ) from None
    names = wanted_packages(distro, gpu=gpu)
    _assume_base_system(root)
    order = INSTALLED.findall(root.run("apt-get", "--simulate", "install", *names))
    say(f"download {len(order)} packages for {distro.label}")
    root.run("apt-get", "--yes", "--download-only", "install", *names)
    _take(root.archives.glob("*.deb"), order, folder)


def archive_sources(distro: Distro, mirror: str | None) -> str:
    """sources.list of a release: its archive, updates and security fixes, signed by its keyring.

    Raises UserError without a `mirror`, and when this machine does not have that keyring.
    """
    keyring = KEYRINGS.get(distro.id)
    if keyring is None or (distro.id, distro.version) not in CODENAMES:
        raise UserError(
            f"the package archive of {distro.label} is not known", hint=f"known: {', '.join(KNOWN)}"
        )
    if not keyring.is_file():
        raise UserError(
            f"the packages of {distro.label} cannot be checked: {keyring} is not on this machine",
            hint=f"sudo apt-get install {distro.id}-{'archive-' if distro.id == 'debian' else ''}keyring",
        )
    if mirror is None:
        raise UserError(
            f"--distro {distro.label}: this machine's package sources are for {this_distro().label}",
            hint=f"name the archive of {distro.label}, as its own sources.list does: "
            f"--mirror https://your.mirror/{distro.id}",
        )
    archive = mirror.rstrip("/")
    components = "main universe" if distro.id == "ubuntu" else "main"
    begin, name = f"deb [signed-by={keyring}]", distro.codename
    security = f"{archive.removesuffix('/debian')}/debian-security" if distro.id == "debian" else archive
    return (
        f"{begin} {archive} {name} {components}\n"
        f"{begin} {archive} {name}-updates {components}\n"
        f"{begin} {security} {name}-security {components}\n"
    )


def _copy_sources(root: AptRoot) -> None:
    """This machine's own sources, and so its mirrors; not those that setup would add with another key."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for path in places:
        if path.suffix in (".list", ".sources") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if "nvidia.github.io" not in text and "download.docker.com" not in text:
                write_text(root.sources / path.name, text)


def _add_toolkit_source(root: AptRoot) -> None:
    key = root.path / "nvidia.asc"  # apt reads an armoured key only under this ending
    try:
        run([APT_HELPER, "download-file", f"{NVIDIA_REPOSITORY}/gpgkey", str(key)])
    except TunesmithError as error:
        raise TunesmithError(
            f"the key of NVIDIA's repository could not be fetched: {error.what}",
            hint="a server without an NVIDIA GPU does not need it: --no-gpu",
        ) from None
    line = f"deb [signed-by={key}] {NVIDIA_REPOSITORY}/stable/deb/$(ARCH) /\n"
    write_text(root.sources / "nvidia-container-toolkit.list", line)


def _assume_base_system(root: AptRoot) -> None:
    """Tell apt that a minimal installation is there, so that it does not bring it."""
    stanzas = dict(_stanzas(root.run("apt-cache", "dumpavail")))
    base = [name for name, text in stanzas.items() if _is_base(text)]
    assumed = INSTALLED.findall(root.run("apt-get", "--simulate", "install", *base))
    texts = [f"{stanzas[name]}\nStatus: install ok installed\n" for name in assumed if name in stanzas]
    write_text(root.status, "\n".join(texts))


def _stanzas(text: str) -> Iterator[tuple[str, str]]:
    """Package name and text of every stanza; of several versions the first, which apt would take."""
    seen = set()
    for stanza in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
        if name and name[1] not in seen:
            seen.add(name[1])
            yield name[1], stanza.strip()


def _is_base(stanza: str) -> bool:
    priority = re.search(r"^Priority: (\S+)", stanza, re.MULTILINE)
    return bool(priority and priority[1] in BASE_PRIORITIES) or "\nEssential: yes" in stanza


def _take(files: Iterable[Path], order: list[str], folder: Path) -> None:
    """Move the packages of `order` into `folder`, and write order.txt: the toolkit last, in its own order."""
    by_name = {path.name.split("_")[0]: path for path in files}
    missing = [name for name in order if name not in by_name]
    if missing:
        raise TunesmithError(f"apt-get did not download {', '.join(missing)}")
    ordered = [name for name in order if name not in TOOLKIT] + [name for name in TOOLKIT if name in order]
    for name in ordered:
        shutil.copyfile(by_name[name], folder / by_name[name].name)
    write_text(folder / ORDER, "".join(f"{by_name[name].name}\n" for name in ordered))


# -- dnf -------------------------------------------------------------------------------------------------


def _collect_rpm(distro: Distro, scratch: Path, folder: Path, *, gpu: bool) -> None:
    here = this_distro().label
    if here != distro.label or shutil.which("dnf") is None:
        raise UserError(
            f"packages for {distro.label} are collected with dnf on a {distro.label}; this machine is {here}",
            hint=f"call this with --parts packages on such a machine, or in a container of {distro.label}",
        )
    say(f"download the packages for {distro.label}")
    options = ["--assumeyes", "--resolve", "--destdir", str(folder), *repositories(distro, gpu=gpu)]
    run(["dnf", "download", *options, *wanted_packages(distro, gpu=gpu)])
    write_text(
        folder / ORDER, "".join(f"{name}\n" for name in rpm_order(path.name for path in folder.glob("*.rpm")))
    )


def repositories(distro: Distro, *, gpu: bool) -> list[str]:
    """dnf's options for Docker's and NVIDIA's repositories, with their keys: packages are checked."""
    docker = f"https://download.docker.com/linux/{'rhel' if distro.id == 'rhel' else 'centos'}"
    places = {"tunesmith-docker": (f"{docker}/{distro.major}/$basearch/stable", f"{docker}/gpg")}
    if gpu:
        nvidia = f"{NVIDIA_REPOSITORY}/stable/rpm/$basearch"
        places["tunesmith-nvidia"] = (nvidia, f"{NVIDIA_REPOSITORY}/gpgkey")
    found = []
    for name, (url, key) in places.items():
        found += [
            "--repofrompath",
            f"{name},{url}",
            f"--setopt={name}.gpgcheck=1",
            f"--setopt={name}.gpgkey={key}",
        ]
    return found


def rpm_order(names: Iterable[str]) -> list[str]:
    """File names in the order for order.txt. One rpm transaction orders its packages itself; the toolkit
    stands last, in the order in which its four packages can be installed one by one."""
    rank = {name: number for number, name in enumerate(TOOLKIT, start=1)}
    return sorted(names, key=lambda name: (rank.get(re.sub(r"-\d.*$", "", name), 0), name))

"""What the facts of a host say about its GPU, its docker and its containers.

The command strings here are the probes of `doctor`, to the letter: a facts file is found by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tunesmith.host.distro import Distro, read_distro
from tunesmith.host.facts import TIMED_OUT, UNKNOWN, Answer, Facts, plain

SMI = "nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader"
SMI_PLAIN = "nvidia-smi"
NOUVEAU = "lsmod|grep -w nouveau"
NVIDIA_MODULE = "lsmod|grep -w nvidia"
SECURE_BOOT = "mokutil --sb-state"
PCI = "lspci"
DRIVER_FILE = "/proc/driver/nvidia/version"
COMPAT = "/usr/local/cuda/compat"

DOCKER_CLIENT = "command -v docker"
DOCKER_VERSION = "docker version -f '{{.Server.Version}}'"
DOCKER_ROOT = "docker info -f '{{.DockerRootDir}}'"
DOCKER_CGROUP = "docker info -f '{{.CgroupDriver}}'"
DOCKER_NETWORK = "docker info -f '{{.HTTPProxy}} {{json .RegistryConfig.Mirrors}}'"
DOCKER_STARTED = "systemctl show docker -p ActiveEnterTimestamp"
DOCKER_ENVIRONMENT = "systemctl show docker -p Environment"
HOOKS = "command -v nvidia-container-runtime-hook nvidia-cdi-hook"
CDI_LIST = "nvidia-ctk cdi list"
SNAP = "snap list docker"
GETENFORCE = "getenforce"

IMAGE_ENV = "docker image inspect -f '{{json .Config.Env}}' "
IMAGE_LABELS = "docker image inspect -f '{{json .Config.Labels}}' "
IMAGE_DIGESTS = "docker image inspect -f '{{json .RepoDigests}}' "
IMAGE_SIZE = "docker image inspect -f '{{.Size}}' "
IMAGE_HISTORY = "docker history --no-trunc --format '{{.CreatedBy}} {{.Comment}}' "
CONTAINER_SHM = "docker inspect -f '{{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}}' "
CONTAINER_GPUS = "docker inspect -f '{{json .HostConfig.DeviceRequests}} {{.HostConfig.Runtime}}' "
CONTAINER_START = (
    "docker inspect -f '{{.HostConfig.NetworkMode}} {{json .Config.Entrypoint}} {{json .Config.Cmd}}' "
)
CONTAINERS = "docker ps --format '{{.Names}}'"

GpuState = Literal["ok", "dead", "none"]
DockerState = Literal["ok", "missing", "down", "denied", "hung", "podman"]
Version = tuple[int, ...]

# The newest CUDA that each driver branch can run (NVIDIA, CUDA release notes, table of driver versions).
CUDA_OF_BRANCH = {
    410: (10, 0), 418: (10, 1), 440: (10, 2), 450: (11, 0), 455: (11, 1), 460: (11, 2), 465: (11, 3),
    470: (11, 4), 495: (11, 5), 510: (11, 6), 515: (11, 7), 520: (11, 8), 525: (12, 0), 530: (12, 1),
    535: (12, 2), 545: (12, 3), 550: (12, 4), 555: (12, 5), 560: (12, 6), 565: (12, 7), 570: (12, 8),
    575: (12, 9), 580: (13, 0), 590: (13, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """`memory` as nvidia-smi prints it, such as `24576 MiB`."""

    name: str
    memory: str


def numbers(text: str) -> Version:
    """The first dotted number of a text: `20.10.7-0ubuntu5` -> (20, 10, 7); empty when there is none."""
    found = re.search(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def first_line(text: str) -> str:
    """The first line that is not empty, without the spaces around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class Host:
    """A host as its facts show it. Everything is read from the facts; nothing is looked at."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.distro: Distro = read_distro(facts)

    def saying(self, pattern: str, commands: str = "") -> tuple[str, str] | None:
        """(command, line) of the first answer with a line in which `pattern` is found, case ignored.

        `commands`: a pattern of the commands that are asked; without it all are.
        """
        for command, answer in self.facts.matching(commands).items():
            for line in answer.text.splitlines():
                if re.search(pattern, line, re.IGNORECASE):
                    return command, line.strip()
        return None

    def subjects(self, command: str) -> Iterator[tuple[str, Answer]]:
        """(name, answer) of every command that begins with `command`: one for each image or container."""
        # `docker inspect` finds images too.
        start = re.escape(plain(command)).replace(r"docker\ image\ inspect", r"docker\ (?:image\ )?inspect")
        for text, answer in self.facts.matching(f"^{start}").items():
            if answer.ok:
                yield re.sub(f"^{start}", "", text).strip(" '"), answer

    @cached_property
    def smi(self) -> Answer:
        """The answer of nvidia-smi: of the query, or of another call of it where the query was not made."""
        found = self.facts.answer(SMI)
        if found.rc != UNKNOWN:
            return found
        others = [a for a in self.facts.matching(r"^nvidia-smi\b").values() if a.rc != UNKNOWN]
        return others[0] if others else found

    @cached_property
    def _rows(self) -> list[list[str]]:
        """The rows of the query of nvidia-smi: name, driver, compute capability, memory."""
        answer = self.facts.answer(SMI)
        rows = [re.split(r",\s*", line.strip()) for line in answer.stdout.splitlines()] if answer.ok else []
        return [row for row in rows if len(row) >= 3 and numbers(row[1])]

    @property
    def gpus(self) -> list[Gpu]:
        return [Gpu(row[0], row[-1]) for row in self._rows]

    @cached_property
    def driver(self) -> Version:
        """The version of the driver, such as (550, 54, 14); empty when nothing tells it."""
        if self._rows:
            return numbers(self._rows[0][1])
        header = re.search(r"Driver Version:\s*([\d.]+)", self._plain_smi)
        return numbers(header[1]) if header else self.module_version

    @cached_property
    def module_version(self) -> Version:
        """The version of the loaded kernel module."""
        text = self.facts.file(DRIVER_FILE) or self.facts.answer(f"cat {DRIVER_FILE}").stdout
        found = re.search(r"Kernel Module\b[^\d\n]*?(?:for \S+\s+)?(\d+\.\d[\d.]*)", text)
        return numbers(found[1]) if found else ()

    @cached_property
    def cuda(self) -> Version:
        """The newest CUDA that the driver can run: what nvidia-smi says, else that of the driver's branch."""
        header = re.search(r"CUDA Version:\s*(\d+\.\d+)", self._plain_smi)
        if header:
            return numbers(header[1])
        branches = [branch for branch in CUDA_OF_BRANCH if self.driver and branch <= self.driver[0]]
        return CUDA_OF_BRANCH[max(branches)] if branches else ()

    @property
    def _plain_smi(self) -> str:
        return "\n".join(a.stdout for a in self.facts.matching(r"^nvidia-smi\b").values() if a.ok)

    @cached_property
    def card(self) -> bool | None:
        """Whether an NVIDIA card is on the bus; None when nothing tells."""
        lists = [a for a in self.facts.matching(r"^lspci\b").values() if a.rc in (0, 1)]
        lines = [line for a in lists for line in a.stdout.splitlines()]
        if any(re.search(r"(?i)nvidia|10de:", line) and not _side_function(line) for line in lines):
            return True
        if self.nouveau or self.facts.file(DRIVER_FILE) is not None:
            return True
        return False if lists else None

    @cached_property
    def nouveau(self) -> bool:
        answers = self.facts.matching(r"^lsmod\b").values()
        return any(re.search(r"(?m)^nouveau\b", a.stdout) for a in answers if a.ok)

    @cached_property
    def gpu(self) -> GpuState:
        if self._rows or "Driver Version:" in self._plain_smi:
            return "ok"
        if self.smi.rc == UNKNOWN:
            return "dead" if self.card else "none"
        return "none" if self.card is False else "dead"

    @cached_property
    def docker(self) -> DockerState:
        answers = [a for c, a in self.facts.matching(r"^docker\b").items() if a.rc != UNKNOWN]
        text = "\n".join(a.text for a in answers)
        if "Emulate Docker CLI using podman" in text:
            return "podman"
        if any(a.ok for a in self._daemon_answers):
            return "ok"
        if re.search(r"permission denied while trying to connect|dial unix .*permission denied", text):
            return "denied"
        if re.search(r"Cannot connect to the Docker daemon|Is the docker daemon running", text):
            return "down"
        if any(a.rc == TIMED_OUT for a in answers):
            return "hung"
        if self.facts.answer(DOCKER_VERSION).rc != UNKNOWN:
            return "down"
        runs = self.dockerd_started or self.facts.answer(SNAP).ok or answers
        return "ok" if runs else ("down" if self.facts.answer(DOCKER_CLIENT).ok else "missing")

    @property
    def _daemon_answers(self) -> list[Answer]:
        found = self.facts.matching(
            r"^docker (?:version -f|info|ps|inspect|image|images|container|history)\b"
        )
        return list(found.values())

    @cached_property
    def dockerd_started(self) -> str:
        """When dockerd started, as systemd prints it; empty when it does not run or nothing tells."""
        return self.facts.answer(DOCKER_STARTED).stdout.partition("=")[2].strip()

    @cached_property
    def docker_version(self) -> Version:
        answer = self.facts.answer(DOCKER_VERSION)
        return numbers(answer.stdout) if answer.ok else ()

    @cached_property
    def gpu_containers(self) -> dict[str, bool]:
        """Running containers by name: whether they hold GPUs."""
        asked = {name: _asks_for_gpus(a.stdout) for name, a in self.subjects(CONTAINER_GPUS)}
        listed = self.facts.answer(CONTAINERS)
        for name in listed.stdout.split() if listed.ok else []:
            asked.setdefault(name, True)
        return asked

    @property
    def without_gpu(self) -> str:
        """Why a check of GPUs is not made; the GPU itself is the matter of the check `driver`."""
        return "not looked at: it needs a driver that answers (see 'driver')"

    @property
    def without_docker(self) -> str:
        return "not looked at: it needs a docker that answers (see 'docker')"


def _side_function(line: str) -> bool:
    """Whether a PCI line is the sound or USB function of a card."""
    return re.search(r"(?i)audio|usb|serial bus|\b0c03:|\b0403:", line) is not None


def _asks_for_gpus(text: str) -> bool:
    return re.search(r'"gpu"|"cdi"|nvidia', text, re.IGNORECASE) is not None

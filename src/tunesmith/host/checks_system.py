"""Checks of the system around docker: files, SELinux, model hub, package sources, disk, processor, memory."""

from __future__ import annotations

import re
import shlex

from tunesmith.core.checks import Check, Topic
from tunesmith.core.units import bytes_text
from tunesmith.host.checks_fixes import delete_old_sources, install_toolkit_offline, vault
from tunesmith.host.checks_host import (
    DOCKER_ROOT,
    GETENFORCE,
    HOOKS,
    IMAGE_SIZE,
    Host,
    first_line,
)

OWNERSHIP = Topic(
    "ownership",
    "Owner of files",
    "A container that runs as root leaves files in mounts that you can neither change nor delete.",
)
SELINUX = Topic(
    "selinux",
    "SELinux",
    "SELinux keeps containers from devices and folders that are not labelled for them.",
)
MIRROR = Topic(
    "hub-mirror",
    "Model hub mirror",
    "Hub mirrors pass on the list of files; large files come by hf_xet from another host, and fail while the "
    "small ones work.",
)
SOURCES = Topic("package-sources", "Package sources", "While they are broken, nothing can be installed.")
DISK = Topic(
    "disk",
    "Disk of docker",
    "A new image lies beside the old one while it is built or loaded: three times its size should be free.",
)
CPU = Topic("cpu", "Processor", "Tokenising, data loading and all work without a GPU run on it.")
MEMORY = Topic(
    "memory", "Memory", "Weights pass through the host's memory, and optimizer state may be moved into it."
)

NOT_LABELLED = r"Failed to initialize NVML: Insufficient Permissions"
SIGNED_BY = r"Conflicting values set for option Signed-By"
CENTOS_GONE = r"mirrorlist\.centos\.org"
NO_NETWORK = (
    r"Temporary failure resolving|Could not resolve host|Could not resolve|No route to host|"
    r"Network is unreachable|Name or service not known|Could not connect to|Failed to connect"
)
PACKAGE_TOOLS = (
    r"^(?:apt|apt-get|apt-cache|dnf|yum|microdnf)\b|^ip route get\b|"
    r"^(?:curl|wget|ping)\b.*(?:nvidia\.github\.io|download\.docker\.com|/debian|/ubuntu|/centos)"
)
XET_HOST = r"cas-server\.xethub\.hf\.co"

# Unpacked sizes to reckon with where no image is there yet: an NGC PyTorch image; python with torch for CPU.
NGC_IMAGE_BYTES = 22 * 10**9
CPU_IMAGE_BYTES = 2 * 10**9
SMALL_MEMORY_BYTES = 7 * 1024**3


def ownership(host: Host) -> Check:
    finds = host.facts.matching(r"^find \S+.* -uid 0\b")
    root = first_line(host.facts.answer("id -u").stdout) == "0"
    for command, answer in finds.items():
        path = first_line(answer.stdout)
        if path and not root:
            work = _searched(command)
            return OWNERSHIP.warn(
                f"root owns {path}",
                [
                    f'chown -R "$SUDO_USER": {work}',
                    "# from now on: make the folders of mounts first, as yourself (mkdir -p), and run",
                    "docker run --user $(id -u):$(id -g) IMAGE",
                ],
            )
    places = ", ".join(_searched(command) for command in finds)
    return OWNERSHIP.ok(
        f"nothing of root's in {places}" if finds and not root else "nothing of root's in the way"
    )


def _searched(command: str) -> str:
    """The folder of a `find`, quoted as it is there."""
    return command.removeprefix("find ").partition(" -")[0]


def selinux(host: Host) -> Check:
    mode = first_line(host.facts.answer(GETENFORCE).stdout)
    if mode != "Enforcing":
        return SELINUX.ok(mode or "not on this system")
    denied = host.saying(NOT_LABELLED) or host.saying(
        r"permission denied|EACCES", commands=r"^docker (?:run|logs|exec|start|compose)\b"
    )
    if denied is None:
        return SELINUX.ok("Enforcing, and nothing was seen to be refused")
    return SELINUX.warn(
        f"Enforcing, and a container was refused: {denied[1]}",
        [
            "# mounts: docker labels folders of your own (never /etc, /home, /usr); :z if several share it",
            "docker run -v /data/you:/data:Z IMAGE",
            "# what was refused, to write a policy for it:",
            "ausearch -m avc -ts recent",
            "# last of all, as it takes SELinux off this container altogether:",
            "# docker run --security-opt label=disable IMAGE",
        ],
    )


def hub_mirror(host: Host) -> Check:
    env = host.facts.env
    endpoint = env.get("HF_ENDPOINT", "").rstrip("/")
    if not endpoint or endpoint == "https://huggingface.co":
        return MIRROR.ok(endpoint or "the hub itself")
    if env.get("HF_HUB_DISABLE_XET", "").lower() in ("1", "true", "yes", "on"):
        return MIRROR.ok(f"{endpoint}, xet off")
    asked, tried = host.facts.matching(r"\bhf[_-]xet\b"), host.facts.matching(XET_HOST)
    reached = any(a.ok for a in tried.values())
    # Somebody who tried to reach xet's host, and did not ask for the package, has it.
    xet = any(a.ok for a in asked.values()) or bool(tried and not asked)
    if not xet or reached:
        return MIRROR.ok(f"{endpoint}, {'xet can be reached' if reached else 'without hf_xet'}")
    return MIRROR.warn(
        f"{endpoint} with hf_xet, and cas-server.xethub.hf.co cannot be reached",
        [
            "# as the user who downloads, not as root:",
            "export HF_HUB_DISABLE_XET=1",
            "echo 'export HF_HUB_DISABLE_XET=1' >> ~/.profile",
        ],
        "tunesmith switches xet off behind mirrors by itself; other programs do not.",
    )


def package_sources(host: Host) -> Check:
    conflict = host.saying(SIGNED_BY)
    if conflict:
        return SOURCES.fail(
            f"two files name one repository with different keys: {conflict[1]}", delete_old_sources()
        )
    if _centos_is_gone(host):
        return SOURCES.fail(
            "mirrorlist.centos.org is no more: this release is past its end of life",
            vault(host.distro),
            "It gets no security fixes any more: plan to move to Rocky 9 or Ubuntu 24.04.",
        )
    offline = host.saying(NO_NETWORK, commands=PACKAGE_TOOLS)
    if offline or _no_route(host):
        return _offline(host, offline[1] if offline else "there is no route to the outside")
    return SOURCES.ok("no fault was seen")


def _centos_is_gone(host: Host) -> bool:
    if host.saying(rf"(?:Could not resolve host|Cannot (?:find|retrieve)).*{CENTOS_GONE}"):
        return True
    named = any(
        re.search(rf"(?m)^mirrorlist\s*=.*{CENTOS_GONE}", text)
        for path, text in host.facts.files.items()
        if path.startswith("/etc/yum.repos.d/")
    )
    listed = any(a.ok and a.stdout.strip() for a in host.facts.matching(rf"^grep .*{CENTOS_GONE}").values())
    return host.distro.id == "centos" and host.distro.major in (7, 8) and (named or listed)


def _no_route(host: Host) -> bool:
    answers = [a for a in host.facts.matching(r"^ip (?:-\S+ )?route(?: show\b.*)?$").values() if a.ok]
    return bool(answers) and not any(re.search(r"(?m)^default\b", a.stdout) for a in answers)


def _offline(host: Host, said: str) -> Check:
    toolkit = bool(host.facts.answer(HOOKS).stdout.strip()) or host.gpu == "none"
    complete = host.docker == "ok" and toolkit and host.gpu != "dead"
    if complete and not host.saying(NO_NETWORK, commands=PACKAGE_TOOLS):
        return SOURCES.ok(f"{said}; nothing has to be installed")
    machine = first_line(host.facts.answer("uname -m").stdout)
    return SOURCES.fail(f"no network: {said}", install_toolkit_offline(host.distro, machine))


def disk(host: Host) -> Check:
    free = _free_bytes(host)
    if free is None:
        return DISK.skip("not looked at: nothing tells how much is free")
    sizes = {name: int(a.stdout) for name, a in host.subjects(IMAGE_SIZE) if a.stdout.strip().isdigit()}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    one = sizes[largest] if largest else (CPU_IMAGE_BYTES if host.gpu == "none" else NGC_IMAGE_BYTES)
    root = first_line(host.facts.answer(DOCKER_ROOT).stdout) or "/var/lib/docker"
    if free >= 3 * one:
        return DISK.ok(f"{bytes_text(free)} free for {root}")
    what = f"{largest} has {bytes_text(one)}" if largest else f"an image has about {bytes_text(one)}"
    return DISK.warn(
        f"{bytes_text(free)} free for {root}; {what}, so {bytes_text(3 * one)} should be",
        [
            "docker system df",
            "docker system prune",
            "# or keep docker's data on a larger disk: tunesmith setup --data-root /data/docker",
        ],
    )


def _free_bytes(host: Host) -> int | None:
    """Free bytes of docker's disk: the fourth column of `df`, in the unit that its first line names."""
    root = first_line(host.facts.answer(DOCKER_ROOT).stdout) or "/var/lib/docker"
    asked = host.facts.matching(r"^df\b")
    of_root = {command: a for command, a in asked.items() if shlex.quote(root) in command}
    for answer in (of_root or asked).values():
        lines = answer.stdout.strip().splitlines()
        if len(lines) < 2:
            continue
        if len(lines[0].split()) == 1:
            return _bytes(lines[-1].strip(), lines[0])
        words = lines[-1].split()
        if len(words) >= 4:
            return _bytes(words[-3], lines[0])
    return None


def _bytes(text: str, header: str) -> int | None:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)(?:i?B)?", text)
    if found is None:
        return None
    if found[2]:
        return int(float(found[1]) * 1024 ** ("KMGTP".index(found[2]) + 1))
    unit = re.search(r"\b(\d+)([KM]?)-blocks|\b1(B)-blocks", header)
    if unit is None or unit[3]:
        return int(float(found[1]))
    return int(float(found[1])) * int(unit[1]) * {"": 1, "K": 1024, "M": 1024**2}[unit[2]]


def cpu(host: Host) -> Check:
    text = host.facts.answer("lscpu").stdout or host.facts.file("/proc/cpuinfo") or ""
    count = first_line(host.facts.answer("nproc --all").stdout or host.facts.answer("nproc").stdout)
    listed = re.search(r"(?m)^CPU\(s\):\s*(\d+)", text)
    cores = (
        int(count)
        if count.isdigit()
        else int(listed[1])
        if listed
        else len(re.findall(r"(?m)^processor\s*:", text))
    )
    if not cores:
        return CPU.skip("not looked at: nothing tells what it is")
    name = re.search(r"(?mi)^model name\s*:\s*(.*)$", text)
    machine = first_line(host.facts.answer("uname -m").stdout)
    found = f"{cores} threads{f', {name[1].strip()}' if name else ''}"
    flags = re.search(r"(?mi)^flags\s*:(.*)$", text)
    if machine and machine not in ("x86_64", "amd64", "aarch64", "arm64"):
        return CPU.warn(
            f"{found}, {machine}", [], "PyTorch has no ready-made packages for this kind of processor."
        )
    if flags and machine not in ("aarch64", "arm64") and " avx2" not in flags[1]:
        return CPU.warn(f"{found}, without AVX2", [], "PyTorch works without AVX2, but many times slower.")
    known = [
        label for flag, label in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flags and flag in flags[1]
    ]
    return CPU.ok(", ".join([found, *known]))


def memory(host: Host) -> Check:
    total, free = _memory_bytes(host)
    if not total:
        return MEMORY.skip("not looked at: nothing tells how much there is")
    found = bytes_text(total) + (f", {bytes_text(free)} of it available" if free else "")
    if total < SMALL_MEMORY_BYTES:
        return MEMORY.warn(
            found,
            [],
            "Less than 7 GiB: a full fine-tune of 0.5B parameters does not fit; LoRA on smaller models does.",
        )
    return MEMORY.ok(found)


def _memory_bytes(host: Host) -> tuple[int, int]:
    """(total, available), 0 where nothing tells: from /proc/meminfo, else from `free` in bytes."""
    text = host.facts.file("/proc/meminfo") or host.facts.answer("cat /proc/meminfo").stdout
    values = dict(re.findall(r"(?m)^(MemTotal|MemAvailable):\s*(\d+) kB", text))
    if values:
        return int(values.get("MemTotal", 0)) * 1024, int(values.get("MemAvailable", 0)) * 1024
    for command, answer in host.facts.matching(r"^free\b").items():
        row = re.search(r"(?m)^Mem:\s+(\d+)(?:\s+\d+){4}\s+(\d+)", answer.stdout)
        unit = {"-b": 1, "-m": 1024**2, "-g": 1024**3}.get([*command.split(), ""][1], 1024)
        if row:
            return int(row[1]) * unit, int(row[2]) * unit
    return 0, 0

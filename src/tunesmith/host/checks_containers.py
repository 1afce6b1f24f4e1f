"""Checks of containers and images: shared memory, broken extensions, open notebooks, lost recipes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from tunesmith.core.checks import Check, Topic
from tunesmith.host.checks_host import (
    CONTAINER_GPUS,
    CONTAINER_SHM,
    CONTAINER_START,
    IMAGE_DIGESTS,
    IMAGE_HISTORY,
    IMAGE_LABELS,
    Host,
)
from tunesmith.host.facts import plain

SHM = Topic(
    "docker-shm",
    "Shared memory of containers",
    "Data loaders and NCCL pass tensors through /dev/shm; docker gives 64 MiB, and the workers die of a bus "
    "error when it is full.",
)
ABI = Topic(
    "abi",
    "Compiled extensions",
    "flash-attn and transformer-engine are compiled against one build of torch; another torch beneath them, "
    "such as one that pip put over NVIDIA's, breaks them.",
)
TOKEN = Topic(
    "jupyter-token",
    "JupyterLab token",
    "A notebook without a token is a root shell for everyone who reaches its port.",
)
RECIPE = Topic(
    "image-recipe",
    "Images can be rebuilt",
    "Nobody can tell what is in an image from `docker commit`, nor build it again.",
)

DEFAULT_SHM = 64 * 1024 * 1024
BUS_ERROR = r"bus error"
SHARED = r"shared memory"
APPS = r"\b(?:ServerApp|NotebookApp|LabApp|IdentityProvider)"
# As an option, in a Python configuration, in a JSON one.
EMPTY_TOKEN = (
    rf"""--{APPS}\.token=(?:''|"")?["']?(?=[\s,\]}}]|$)|{APPS}\.token\s*=\s*(?:''|"")(?!['"])"""
    r"""|"token"\s*:\s*\"\""""
)
PASSWORD = r"""password["']?\s*[=:]\s*["']*(?!none\b|false\b|u?["'])[^\s"',\]}]"""
BIND = r"""(?:--ip["']?[=,\s]+|\.ip\s*=\s*|"(?:ip|hostname)"\s*:\s*)["']*([^\s"',\]}]+)"""
HOST_NETWORK = r"--net(?:work)?[=\s]host\b"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONFIGS = r"jupyter_(?:server|notebook|lab)_config\.(?:py|json)$"
# What builders and `docker import` write into the history of an image, and `docker commit` does not.
BUILT = r"#\(nop\)|buildkit|^/bin/sh -c |^RUN |^COPY |^ENTRYPOINT |\bbazel build\b|Imported from"


def docker_shm(host: Host) -> Check:
    died = _bus_error(host)
    if died:
        return SHM.warn(f"a program died of full shared memory ({died})", _larger_shm())
    sizes = {name: answer.stdout.split() for name, answer in host.subjects(CONTAINER_SHM)}
    gpus = {name for name, _ in host.subjects(CONTAINER_GPUS)}
    small = [
        name
        for name, words in sizes.items()
        if words[:1] == [str(DEFAULT_SHM)] and not _shares(words[1:]) and _may_train(host, name, gpus)
    ]
    if small:
        return SHM.warn(f"64 MiB, the default, in {', '.join(small)}", _larger_shm())
    if not sizes and host.docker != "ok":
        return SHM.skip(host.without_docker)
    return SHM.ok(f"enough in {', '.join(sizes)}" if sizes else "no container runs")


def _bus_error(host: Host) -> str | None:
    """The command in whose answer a bus error and shared memory are spoken of."""
    for command, answer in host.facts.matching("").items():
        if re.search(BUS_ERROR, answer.text, re.I) and re.search(SHARED, answer.text, re.I):
            return command
    return None


def _shares(words: list[str]) -> bool:
    """Whether a container has the shared memory of the host, or of another container."""
    return bool(words) and (words[0] == "host" or words[0].startswith("container:"))


def _may_train(host: Host, name: str, known: set[str]) -> bool:
    """A container that is known to hold no GPU needs no large shared memory."""
    return name not in known or host.gpu_containers[name]


def _larger_shm() -> list[str]:
    return [
        "# create the container anew (what it holds outside of mounts is lost), with:",
        "docker run --shm-size=16g IMAGE",
        "# or with the shared memory of the host: docker run --ipc=host IMAGE",
    ]


def abi(host: Host) -> Check:
    broken = host.saying(r"undefined symbol")
    if broken:
        command, line = broken
        package = _package(f"{command} {line}")
        return ABI.fail(f"{package} does not fit torch: {line}", _rebuild(package))
    if host.docker != "ok":
        return ABI.skip(host.without_docker)
    return ABI.ok("no undefined symbol in what containers printed; 'tunesmith image check' tries an image")


def _package(text: str) -> str:
    for pattern, name in (
        (r"flash[_-]attn", "flash-attn"),
        (r"transformer[_-]engine", "transformer-engine"),
        (r"\bapex\b", "apex"),
        (r"\bxformers\b", "xformers"),
        (r"\bdeepspeed\b", "deepspeed"),
        (r"\bvllm\b", "vllm"),
    ):
        if re.search(pattern, text, re.IGNORECASE):
            return name
    return "torch"


def _rebuild(package: str) -> list[str]:
    if package == "torch":
        return [
            "# in the Dockerfile: never 'pip install torch' over an NGC image; NVIDIA's pins:",
            "pip install --constraint /etc/pip/constraint.txt -r requirements.txt",
            "tunesmith image build",
        ]
    return [
        "# in the Dockerfile; an NGC image keeps its torch (pins: /etc/pip/constraint.txt, from 25.03 on):",
        f"pip uninstall -y {package}",
        f"pip install --no-build-isolation --no-cache-dir {package}",
        "tunesmith image build",
    ]


def jupyter_token(host: Host) -> Check:
    empty = [(place, text) for place, text in _notebooks(host) if _is_empty(text)]
    opened = [place for place, text in empty if _is_open(text)]
    if opened:
        return TOKEN.fail(f"no token, and open to the network: {opened[0]}", _safe_notebook())
    if empty:
        found = f"no token; only this machine reaches it, but every user of it does: {empty[0][0]}"
        return TOKEN.warn(found, _safe_notebook())
    return TOKEN.ok("no notebook without a token was found")


def _notebooks(host: Host) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that may start or configure a notebook."""
    for path, text in host.facts.files.items():
        if re.search(CONFIGS, path):
            yield path, "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    start = plain(CONTAINER_START)
    for command, answer in host.facts.matching("").items():
        text = answer.stdout.replace("\\", "")
        if command.startswith(start) or re.match(r"docker (container )?inspect", command):
            yield f"container {command.split()[-1]}", f"{text}\n{_network(host, command)}"
            continue
        if re.match(r"docker (run|create)\b", command):
            yield command, command
        for line in answer.text.splitlines():
            yield f"process {line.strip():.60}", line


def _network(host: Host, command: str) -> str:
    """The network of the container that a command asks about, where another command tells it."""
    name = command.split()[-1]
    others = host.facts.matching(rf"^docker (container )?inspect\b.*NetworkMode.* {re.escape(name)}$")
    return "\n".join(answer.stdout for answer in others.values())


def _is_empty(text: str) -> bool:
    return (
        re.search(EMPTY_TOKEN, text, re.MULTILINE) is not None
        and re.search(PASSWORD, text, re.IGNORECASE) is None
    )


def _is_open(text: str) -> bool:
    binds = re.findall(BIND, text)
    network = re.search(HOST_NETWORK, text) or re.search(r"(?m)^host\b|\"NetworkMode\":\s*\"host\"", text)
    return bool(network) or any(bind not in LOOPBACK for bind in binds)


def _safe_notebook() -> list[str]:
    return [
        "# stop it; then, with a token of its own and on this machine only:",
        "tunesmith lab",
        "# or by hand:",
        '# JUPYTER_TOKEN="$(openssl rand -hex 24)" jupyter lab --ip=127.0.0.1 --port=8888',
    ]


def image_recipe(host: Host) -> Check:
    committed = [image for image in _images(host) if not _has_recipe(host, image)]
    if committed:
        return RECIPE.warn(
            f"no build recipe: {', '.join(committed[:3])}"
            + (f" and {len(committed) - 3} more" if len(committed) > 3 else ""),
            [
                "# write down what was put in by hand; rebuild from a Dockerfile, a lock and a digest:",
                f"docker history --no-trunc {shlex.quote(committed[0])}",
                "tunesmith image show",
                "tunesmith image build",
            ],
            "Its labels name no recipe, no registry knows it, and its history shows no build: the marks of "
            "`docker commit`.",
        )
    if host.docker != "ok":
        return RECIPE.skip(host.without_docker)
    return RECIPE.ok("no image from `docker commit` was found")


def _images(host: Host) -> list[str]:
    asked = (IMAGE_LABELS, IMAGE_HISTORY)
    return list(dict.fromkeys(name for command in asked for name, _ in host.subjects(command)))


def _has_recipe(host: Host, image: str) -> bool:
    """Whether an image names its recipe, came from a registry, or was built by a builder."""
    answers = {
        command: dict(host.subjects(command)) for command in (IMAGE_LABELS, IMAGE_DIGESTS, IMAGE_HISTORY)
    }
    labels = answers[IMAGE_LABELS].get(image)
    if labels and _names_recipe(labels.stdout):
        return True
    digests = answers[IMAGE_DIGESTS].get(image)
    if digests and "@sha256:" in digests.stdout:
        return True
    history = answers[IMAGE_HISTORY].get(image)
    if history:
        # The newest layer is the first line: that of a commit holds the container's command.
        newest = next((line for line in history.stdout.splitlines() if line.strip()), "")
        return re.search(BUILT, newest) is not None
    return False


def _names_recipe(text: str) -> bool:
    keys = re.findall(r"[\w.-]+(?=\"?:)", text)
    known = r"recipe|lock|dockerfile|image\.(?:source|revision)|vcs-ref|compose\.project"
    return any(re.search(known, key, re.IGNORECASE) for key in keys)

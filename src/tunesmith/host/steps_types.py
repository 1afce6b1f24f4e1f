"""What `setup` is asked for, and what it answers with: a plan of steps."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from tunesmith.core.errors import UserError

DockerSource = Literal["docker.io", "docker-ce"]
Command = tuple[str, ...]

DOCKER_HOST = "https://download.docker.com"
NVIDIA_REPOSITORY = "https://nvidia.github.io/libnvidia-container"
NO_PROXY = "localhost,127.0.0.1,::1"
HIDDEN = "***"


@dataclass(frozen=True)
class Write:
    """Put a file there in one move: a reader sees the old text or the new. `mode`: octal, from the start."""

    path: str
    text: str
    mode: str = "0644"

    @property
    def commands(self) -> tuple[Command, ...]:
        """What does it; `dd` reads `text` from its stdin."""
        new = f"{self.path}.tunesmith-new"
        return (
            ("mkdir", "-p", str(PurePosixPath(self.path).parent)),
            ("install", "-m", self.mode, "/dev/null", new),
            # Not /dev/stdin: over ssh stdin is a socket, which cannot be opened by name.
            ("dd", f"of={new}", "status=none"),
            ("mv", "-f", new, self.path),
        )


@dataclass(frozen=True)
class Copy:
    """Bring a file of this machine to the host."""

    source: Path
    target: str


Action = Command | Write | Copy


@dataclass(frozen=True)
class Step:
    """One thing to do: `actions` in order, and the reason for people."""

    id: str
    title: str
    why: str
    actions: tuple[Action, ...]

    @property
    def commands(self) -> tuple[Command, ...]:
        """Every command of the step in order, those that write a file among them."""
        found: list[Command] = []
        for action in self.actions:
            if isinstance(action, Write):
                found += action.commands
            elif not isinstance(action, Copy):
                found.append(action)
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "why": self.why,
            "commands": [list(command) for command in self.commands],
            "files": [
                {"path": a.path, "mode": a.mode, "text": a.text} for a in self.actions if isinstance(a, Write)
            ],
            "copies": [{"from": str(a.source), "to": a.target} for a in self.actions if isinstance(a, Copy)],
        }


@dataclass(frozen=True)
class Plan:
    """What a host still needs. `env`: variables of every command. `secrets`: texts never to be shown."""

    steps: tuple[Step, ...]
    warnings: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()

    def hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text


@dataclass(frozen=True)
class SetupOptions:
    """What is wanted of a host; None leaves the choice to the facts.

    `user`: who shall use docker without sudo. `data_root`: where docker keeps images and containers.
    `bundle`: a folder made by `tunesmith bundle`, used in place of the network; `upload`: its packages have
    to be brought to the host first. `running`: False for a root file system in a folder, where no service can
    be started. Raises UserError for a value that no host could take.
    """

    docker: DockerSource | None = None
    toolkit: bool | None = None
    user: str | None = None
    data_root: str | None = None
    registry_mirrors: tuple[str, ...] = ()
    proxy: str | None = None
    no_proxy: str = NO_PROXY
    docker_mirror: str = DOCKER_HOST
    toolkit_mirror: str = NVIDIA_REPOSITORY
    bundle: Path | None = None
    upload: bool = False
    running: bool = True

    def __post_init__(self) -> None:
        if self.user is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*\$?", self.user):
            raise UserError(f"--user: '{self.user}' is not a user name", hint="letters, digits, - _ and .")
        if self.data_root is not None:
            _check_folder("--data-root", self.data_root)
        for mirror in self.registry_mirrors:
            _check_url("--registry-mirror", mirror, ("https", "http"), path=False)
        if self.proxy is not None:
            _check_url("--proxy", self.proxy, ("http", "https", "socks5", "socks5h"), path=False)
        if not re.fullmatch(r"[A-Za-z0-9.,:/*_\[\]-]*", self.no_proxy):
            raise UserError(
                f"--no-proxy: '{self.no_proxy}' is not a list of hosts", hint="localhost,10.0.0.0/8"
            )
        _check_url("--docker-mirror", self.docker_mirror, ("https", "http"), path=True)
        _check_url("--toolkit-mirror", self.toolkit_mirror, ("https", "http"), path=True)

    @property
    def proxy_password(self) -> str | None:
        return urlsplit(self.proxy).password if self.proxy else None


def _check_folder(option: str, value: str) -> None:
    clean = str(PurePosixPath(value)) == value.rstrip("/") and ".." not in PurePosixPath(value).parts
    if value == "/":
        raise UserError(f"{option}: '/' is the whole disk", hint=f"{option} /data/docker, for example")
    if not value.startswith("/") or value.startswith("//") or not clean or re.search(r"[\x00-\x1f]", value):
        raise UserError(
            f"{option}: '{value}' is not the full path of a folder",
            hint=f"{option} /data/docker, for example",
        )


def _check_url(option: str, value: str, schemes: tuple[str, ...], *, path: bool) -> None:
    try:
        parts = urlsplit(value)
        sound = parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or re.search(r"[\s\"'\\<>`\x00-\x1f\x7f]", value) or parts.query or parts.fragment:
        shown = re.sub(r"//[^@/]*@", f"//{HIDDEN}@", value)
        raise UserError(
            f"{option}: '{shown}' is not a URL that starts with {' or '.join(s + '://' for s in schemes)}",
            hint=f"{option} https://your.mirror"
            if schemes[0] == "https"
            else f"{option} http://10.0.0.1:3128",
        )
    if not path and parts.path not in ("", "/"):
        raise UserError(
            f"{option}: '{value}' has a path; docker takes only a host here",
            hint=f"{option} {parts.scheme}://{parts.netloc.rpartition('@')[2]}",
        )

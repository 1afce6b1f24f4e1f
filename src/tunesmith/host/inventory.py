"""The hosts that a command works on: this one, others over ssh, a folder that holds a root file system."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from tunesmith.core.errors import UserError

KEYS = ("host", "user", "port", "key")
SHAPE = "hosts:\n  - {host: 10.0.0.5, user: ubuntu, port: 22, key: ~/.ssh/id_ed25519}\n  - admin@10.0.0.6"


@dataclass(frozen=True)
class Target:
    """A host. `name`: for people and for pyinfra: '@local', '@chroot/DIR', or user@host:port."""

    name: str
    host: str | None = None
    user: str | None = None
    port: int | None = None
    key: Path | None = None

    @property
    def is_local(self) -> bool:
        return self.host is None and not self.is_chroot

    @property
    def is_chroot(self) -> bool:
        return self.name.startswith("@chroot/")


LOCAL = Target("@local")


def parse_target(text: str, key: Path | None = None) -> Target:
    """`[user@]host[:port]`, `@local`, or `@chroot/DIR`. Raises UserError for anything else."""
    if text == "@local":
        return LOCAL
    if text.startswith("@chroot/"):
        return _chroot(text)
    found = re.fullmatch(
        r"(?:(?P<user>[A-Za-z0-9._-]+)@)?(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?",
        text,
    )
    if not found or not re.match(r"[A-Za-z0-9\[]", found["host"]):
        raise UserError(f"--target: '{text}' is not a host", hint="user@host, user@host:2222, or @local")
    port = _port(int(found["port"]), f"--target {text}") if found["port"] else None
    return Target(text, found["host"].strip("[]"), found["user"], port, _key(key, f"--target {text}"))


def _chroot(text: str) -> Target:
    folder = Path("/") / text.removeprefix("@chroot/").lstrip("/")
    if not (folder / "etc").is_dir() or folder == Path("/"):
        raise UserError(f"--target: '{text}': {folder} holds no root file system", hint="@chroot/srv/root")
    return Target(f"@chroot/{str(folder).lstrip('/')}")


def _port(port: int, place: str) -> int:
    if not 0 < port < 65536:
        raise UserError(f"{place}: {port} is not a TCP port", hint="1 to 65535; ssh listens on 22")
    return port


def _key(key: Path | None, place: str) -> Path | None:
    if key is None:
        return None
    found = key.expanduser()
    if not found.is_file():
        raise UserError(
            f"{place}: the ssh key {found} does not exist", hint="check the path of the private key"
        )
    return found


def read_inventory(path: Path) -> list[Target]:
    """The hosts of a YAML file. Raises UserError that names the line or entry at fault."""
    try:
        value = YAML(typ="safe", pure=True).load(io.StringIO(path.read_text(encoding="utf-8")))
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: {line}{error.problem}", hint=f"it looks like this:\n{SHAPE}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is not YAML: {error}", hint=f"it looks like this:\n{SHAPE}") from None
    entries = value.get("hosts") if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: no list of hosts is in it", hint=f"it looks like this:\n{SHAPE}")
    targets = [_entry(item, f"{path}: hosts[{number}]") for number, item in enumerate(entries)]
    check_unique(targets, str(path))
    return targets


def _entry(item: Any, place: str) -> Target:
    if isinstance(item, str):
        try:
            return parse_target(item)
        except UserError as error:
            raise UserError(error.what.replace("--target", place), error.hint) from None
    if not isinstance(item, dict) or not isinstance(item.get("host"), str):
        raise UserError(f"{place}: {item!r:.60} names no host", hint=f"it looks like this:\n{SHAPE}")
    unknown = [str(key) for key in item if key not in KEYS]
    if unknown:
        raise UserError(
            f"{place}: '{unknown[0]}' is not a key of a host", hint=f"the keys are {', '.join(KEYS)}"
        )
    return _from_keys(item, place)


def _from_keys(item: dict[str, Any], place: str) -> Target:
    user, port, key = item.get("user"), item.get("port"), item.get("key")
    for name, value, kind in (("user", user, str), ("port", port, int), ("key", key, str)):
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(
                f"{place}: {name}: {value!r} is not {'a number' if kind is int else 'text'}", hint=SHAPE
            )
    text = f"{user}@{item['host']}" if user else str(item["host"])
    try:
        target = parse_target(f"{text}:{port}" if port is not None else text)
    except UserError as error:
        raise UserError(error.what.replace("--target", place), error.hint) from None
    return Target(target.name, target.host, target.user, target.port, _key(Path(key) if key else None, place))


def check_unique(targets: list[Target], place: str) -> None:
    names = [target.name for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{place}: {twice} is named twice", hint="name every host once")

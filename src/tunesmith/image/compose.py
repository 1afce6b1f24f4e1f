"""The compose file: written to be read, kept and changed by hand.

It has no `version` key: docker compose v2 calls that key obsolete, docker-compose 1.27 and later do without.
Everything in it is understood by both; the GPU reservation needs 1.28. Docker-compose 1 reads YAML 1.1, where
a bare `no` is false and `1000:50` a number in base 60: such values are quoted.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString as Quoted

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.image.services import PASSED_ON, WORKSPACE, Gpus, Health, Mount, Options, Port, Service

HEAD = """\
Written by tunesmith; yours to read, keep and change. 'tunesmith up' uses what is here as it is, adds a
service that is missing, and writes one anew only with --render. By hand, in the folder of this file:
docker compose up -d lab        (or docker-compose, 1.28 or later)
"""
STACK_BYTES = 64 * 1024**2
PROBE = (
    "import http.client as h, sys; c = h.HTTPConnection('{host}', {port}, timeout=4); "
    "c.request('GET', '{path}'); sys.exit(c.getresponse().status != 200)"
)


def compose_yaml(services: Sequence[Service], options: Options, *, base: Path) -> str:
    """The compose file with these services; paths in or beside the folder `base` are relative to it."""
    return add_services(None, services, options, base=base)


def add_services(text: str | None, services: Sequence[Service], options: Options, *, base: Path) -> str:
    """An existing file's text with these services written anew; all others, and their comments, are kept.

    Raises UserError when the text is not a compose file.
    """
    file = _new_file() if text is None else read_compose(text, "compose.yaml")
    for service in services:
        file["services"].ca.items.pop(service.name, None)
        file["services"][service.name] = _service(service, options, base)
        for secret in service.secrets:
            file.setdefault("secrets", CommentedMap())[secret.name] = {"file": _path(secret.file, base)}
    out = io.StringIO()
    _yaml().dump(file, out)
    return out.getvalue()


def read_compose(text: str, place: str) -> CommentedMap:
    """The file as ruamel.yaml's round-trip mapping. Raises UserError when it has no mapping `services`."""
    try:
        found = _yaml().load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{place}: {line}{error.problem}", hint="the file is not valid YAML here") from None
    except YAMLError as error:
        raise UserError(f"{place}: {error}", hint="the file is not valid YAML") from None
    if not isinstance(found, CommentedMap) or not isinstance(found.get("services"), CommentedMap):
        raise UserError(
            f"{place}: has no services", hint="move the file away: 'tunesmith up' writes a new one"
        )
    return found


def same_service(text: str, service: Service, options: Options, *, base: Path) -> bool:
    """True when the file holds the service just as it would be written now; comments do not count."""
    held = read_compose(text, "compose.yaml")["services"].get(service.name)
    return bool(_plain(held) == _plain(_service(service, options, base)))


def _new_file() -> CommentedMap:
    file = CommentedMap()
    file["services"] = CommentedMap()
    file.yaml_set_start_comment(HEAD)
    return file


def _yaml() -> YAML:
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = sys.maxsize
    yaml.preserve_quotes = True
    return yaml


def _plain(value: Any) -> Any:
    """Without comments and quotes, for comparing."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _flow(items: Sequence[Any] | Mapping[str, Any]) -> CommentedSeq | CommentedMap:
    """On one line: `[a, b]` or `{a: 1}`."""
    short: CommentedSeq | CommentedMap
    short = CommentedMap(items) if isinstance(items, Mapping) else CommentedSeq(items)
    short.fa.set_flow_style()
    return short


def _text(value: str) -> str:
    """Compose replaces $NAME by the environment's value: a dollar sign stands for itself when doubled."""
    return value.replace("$", "$$")


# -- one service -----------------------------------------------------------------------------------------


def _service(service: Service, options: Options, base: Path) -> CommentedMap:
    block = CommentedMap(
        {
            "image": _text(service.image),
            "command": CommentedSeq([_text(part) for part in service.command]),
            "user": Quoted(f"{options.uid}:{options.gid}"),
            "working_dir": str(WORKSPACE),
            "init": True,
            "restart": Quoted(service.restart),
            "stop_grace_period": f"{service.grace_s}s",
        }
    )
    block["environment"] = CommentedMap({**service.environment, **dict.fromkeys(PASSED_ON)})
    block["volumes"] = CommentedSeq([_volume(mount, options, base) for mount in service.mounts])
    if service.secrets:
        block["secrets"] = _flow([secret.name for secret in service.secrets])
    _add_network(block, service.port, options)
    _add_memory(block, options)
    _add_gpus(block, options.gpus)
    if service.health:
        block["healthcheck"] = _health(service.health, options)
    block["security_opt"] = _flow([Quoted("no-new-privileges:true")])
    rotation = _flow({"max-size": "10m", "max-file": Quoted("3")})
    block["logging"] = CommentedMap({"driver": "json-file", "options": rotation})
    return _commented(block, service, options)


def _commented(block: CommentedMap, service: Service, options: Options) -> CommentedMap:
    share = f"a quarter of this host's {options.memory_bytes / GIB:.0f} GiB; a limit, not a reservation"
    pinned = "" if options.gpus == "none" else "; memlock: pinned memory for copies to a GPU"
    notes = {
        "image": service.about,
        "user": "you: what is written in the mounts belongs to you, not to root",
        "volumes": "folder of the host : its place in the container",
        "secrets": "files in /run/secrets; what they hold is never in this file",
        "shm_size": "as asked for; a limit, not a reservation" if options.shm_gib else share,
        "ulimits": "64 MiB of stack, as NVIDIA's images ask for" + pinned,
    }
    for key, note in notes.items():
        if key in block:
            block.yaml_set_comment_before_after_key(key, before=note, indent=4)
    block["environment"].yaml_set_comment_before_after_key(
        PASSED_ON[0], before="taken over from your shell, where set:", indent=6
    )
    return block


def _volume(mount: Mount, options: Options, base: Path) -> str:
    modes = [mode for mode, on in (("ro", mount.read_only), ("z", options.selinux)) if on]
    parts = [_path(mount.source, base), _text(str(mount.target))]
    if any(":" in part for part in parts):
        raise UserError(
            f"{mount.source}: docker cannot mount a path with a colon",
            hint="rename it, or give another folder",
        )
    return ":".join([*parts, *([",".join(modes)] if modes else [])])


def _path(path: Path, base: Path) -> str:
    """Relative (`./x`, `../x`) for what lies in `base` or beside it, so that the project can be moved."""
    for start, prefix in ((base, "."), (base.parent, "..")):
        if path != start and path.is_relative_to(start):
            return _text(f"{prefix}/{path.relative_to(start)}")
    return _text(str(path))


def _add_network(block: CommentedMap, port: Port | None, options: Options) -> None:
    if options.host_network:
        block["network_mode"] = "host"
    elif port is not None:
        bind = f"[{port.bind}]" if ":" in port.bind else port.bind
        block["ports"] = _flow([Quoted(f"{bind}:{port.host}:{port.container}")])


def _add_memory(block: CommentedMap, options: Options) -> None:
    block["ipc"] = options.ipc
    if options.ipc == "private":
        block["shm_size"] = f"{options.shm}g"
    # A daemon without CAP_SYS_RESOURCE cannot raise memlock: asked for only where GPUs need pinned memory.
    pinned = {} if options.gpus == "none" else {"memlock": -1}
    block["ulimits"] = _flow(pinned | {"stack": STACK_BYTES})


def _add_gpus(block: CommentedMap, gpus: Gpus) -> None:
    """Through `deploy`: docker-compose 1.28 knows it, but neither `gpus:` nor CDI names in `devices:`."""
    if gpus == "none":
        return
    wanted: dict[str, Any] = {"driver": "nvidia", "count": "all"}
    if gpus == "cdi":
        wanted = {"driver": "cdi", "device_ids": _flow(["nvidia.com/gpu=all"])}
    device = CommentedMap(wanted | {"capabilities": _flow(["gpu"])})
    block["deploy"] = {"resources": {"reservations": {"devices": [device]}}}


def _health(health: Health, options: Options) -> dict[str, Any]:
    """With the standard library: images have no curl, and urllib would ask a proxy for 127.0.0.1."""
    everywhere = options.bind in ("0.0.0.0", "::") or not options.host_network
    probe = PROBE.format(host="127.0.0.1" if everywhere else options.bind, port=health.port, path=health.path)
    return {
        "test": _flow(["CMD", "python3", "-c", Quoted(probe)]),
        "interval": "5s",
        "timeout": "6s",
        "retries": 3,
        "start_period": f"{health.start_s}s",
    }


# -- a file as it is, written by us or by hand -----------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a service in a compose file needs before it can start.

    `user` is (uid, gid) when the file has numbers; `mounts` are (folder or file of the host, read-only);
    `secrets` are their files by name.
    """

    image: str
    user: tuple[int, int] | None
    mounts: list[tuple[Path, bool]]
    secrets: dict[str, Path]


def written_services(text: str, place: Path) -> dict[str, Written]:
    """The services of a compose file at `place`; relative paths are below its folder."""
    file = _plain(read_compose(text, str(place)))
    base = place.parent
    files = {
        name: _absolute(str(entry["file"]), base)
        for name, entry in (file.get("secrets") or {}).items()
        if isinstance(entry, dict) and "file" in entry
    }
    return {name: _written(block or {}, files, base) for name, block in file["services"].items()}


def _written(block: dict[str, Any], files: dict[str, Path], base: Path) -> Written:
    user = re.fullmatch(r"(\d+):(\d+)", str(block.get("user", "")))
    mounts = [_mounted(volume, base) for volume in block.get("volumes") or []]
    return Written(
        image=str(block.get("image", "")),
        user=(int(user[1]), int(user[2])) if user else None,
        mounts=[mount for mount in mounts if mount is not None],
        secrets={name: files[name] for name in block.get("secrets") or [] if str(name) in files},
    )


def _mounted(volume: Any, base: Path) -> tuple[Path, bool] | None:
    """None for a volume that docker keeps itself."""
    if isinstance(volume, dict):
        source, read_only = str(volume.get("source", "")), bool(volume.get("read_only"))
    else:
        source, _, modes = [*str(volume).split(":"), "", ""][:3]
        read_only = "ro" in modes.split(",")
    return (_absolute(source, base), read_only) if source.startswith((".", "/", "~")) else None


def _absolute(path: str, base: Path) -> Path:
    return Path(os.path.normpath(base / Path(path.replace("$$", "$")).expanduser()))

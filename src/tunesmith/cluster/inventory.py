"""`cluster.yaml`: the hosts that one run spans, and what they share."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from tunesmith.recipe.load import checked, read_yaml
from tunesmith.recipe.section import Auto, Section

EXAMPLE = (
    "hosts:\n  - {host: 10.0.0.5, user: ubuntu, gpus: 2}\n  - {host: 10.0.0.6, user: ubuntu, gpus: 2}\n"
    "shared: /mnt/shared\ninterface: eth0"
)
SHORT = re.compile(r"(?:(?P<user>[^@\s]+)@)?(?P<host>\[[^\]\s]+\]|[^@:\s\[\]]+)(?::(?P<port>\d+))?")
ADDRESS = r"[A-Za-z0-9][A-Za-z0-9.:%_-]*"


class Host(Section):
    """A machine that is reached by ssh. In the file a mapping, or short: `user@host:port`."""

    host: str = Field(description="Name or address of the host, as ssh takes it: 10.0.0.5")
    user: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="Who logs in; default: as ssh finds it."
    )
    port: int = Field(22, gt=0, lt=65536, description="Port that its ssh server listens on, 1 to 65535.")
    key: str | None = Field(None, description="Private key on this machine: ~/.ssh/id_ed25519")
    address: str | None = Field(
        None,
        description="Where the other hosts reach it, if not at 'host': its address on 'interface'.",
    )
    gpus: int | None = Field(None, ge=0, description="How many GPUs it has; default: those it shows.")
    processes: int | Auto = Field(
        "auto", ge=1, description="How many training processes it runs; auto: one a GPU, one without any."
    )
    python: str | None = Field(None, description="Its Python with tunesmith: /opt/tunesmith/bin/python")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = SHORT.fullmatch(value)
        if found is None:
            raise ValueError("is not a host, written short as user@host:port")
        return {name: part for name, part in found.groupdict().items() if part is not None}

    @field_validator("host", "address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        bare = value.removeprefix("[").removesuffix("]") if value is not None else None
        # Else ssh would read a name that begins with '-' as an option.
        if bare is not None and not re.fullmatch(ADDRESS, bare):
            raise ValueError("is not the name or address of a host")
        return bare

    @field_validator("key")
    @classmethod
    def _is_file(cls, value: str | None) -> str | None:
        path = Path(value).expanduser() if value is not None else None
        if path is not None and not path.is_file():
            raise ValueError("is not a file on this machine")
        return str(path) if path is not None else None

    @field_validator("python")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        return _absolute(value)

    @property
    def name(self) -> str:
        """The host for people: `[user@]host[:port]`, without the port of every ssh server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" if self.port == 22 else f"{user}{host}:{self.port}"

    @property
    def reached_at(self) -> str:
        """Name or address at which the other hosts reach it."""
        return self.address or self.host

    @property
    def processes_known(self) -> int | None:
        """How many training processes it runs; None when only the host can tell."""
        if self.processes != "auto":
            return self.processes
        return max(self.gpus, 1) if self.gpus is not None else None


class Inventory(Section):
    """A cluster. The first host is its head: the others meet there, on `port`."""

    hosts: tuple[Host, ...] = Field(description="The hosts; the others meet at the first one.")
    shared: str | None = Field(
        None, description="A folder that every host has at the same path, or a URL: s3://bucket/folder"
    )
    interface: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]{1,15}$", description="Network interface for NCCL and gloo: eth0, ib0"
    )
    port: int = Field(29500, gt=0, lt=65536, description="Port on the first host where the others meet.")
    python: str | None = Field(
        None, description="Python with tunesmith on the hosts; default: the path of the one that runs here."
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Variables of the processes on the hosts, as text: '1', not 1."
    )

    @field_validator("hosts")
    @classmethod
    def _once_each(cls, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
        if not hosts:
            raise ValueError("names no host")
        names = [(host.host, host.port) for host in hosts]
        twice = next((host.name for host in hosts if names.count((host.host, host.port)) > 1), None)
        if twice:
            raise ValueError(f"names {twice} twice")
        return hosts

    @field_validator("shared")
    @classmethod
    def _is_shared(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value and not value.startswith("/"):
            raise ValueError("is neither an absolute path nor a URL")
        return value

    @field_validator("python")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        return _absolute(value)

    @field_validator("env")
    @classmethod
    def _are_names(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = next((name for name in value if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)), None)
        if wrong is not None:
            raise ValueError(f"holds '{wrong}', which is not the name of a variable")
        return value

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def shared_folder(self) -> Path | None:
        """The folder that all hosts share; None when there is none, or a URL in its place."""
        return Path(self.shared) if self.shared is not None and "://" not in self.shared else None

    def python_on(self, host: Host) -> str:
        """The interpreter that runs tunesmith on `host`."""
        return host.python or self.python or sys.executable


def read_cluster(path: Path) -> Inventory:
    """The cluster in a YAML file.

    Raises RecipeErrors with every fault (file, key path, value, remedy), or UserError when the file cannot be
    read as YAML.
    """
    return checked(Inventory, read_yaml(path, "cluster file", EXAMPLE), str(path))


def _absolute(value: str | None) -> str | None:
    if value is not None and not value.startswith("/"):
        raise ValueError("is not an absolute path")
    return value

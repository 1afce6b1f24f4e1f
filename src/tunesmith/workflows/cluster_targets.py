"""The hosts of a cluster file as `doctor` and `setup` take hosts."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cluster.inventory import Host
from tunesmith.host.inventory import Target


def target_of(host: Host) -> Target:
    key = Path(host.key) if host.key is not None else None
    return Target(host.name, host.host, host.user, host.port, key)

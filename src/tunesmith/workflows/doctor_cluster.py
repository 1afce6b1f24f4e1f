"""Look a cluster over: each of its hosts as `doctor` does, then what only a cluster has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.cluster.checks import check_cluster
from tunesmith.cluster.inventory import Host, read_cluster
from tunesmith.cluster.probe import look
from tunesmith.core.checks import Check
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import say
from tunesmith.host.checks import run_checks
from tunesmith.host.distro import read_distro
from tunesmith.host.probe import gather_remote
from tunesmith.workflows.cluster_targets import target_of
from tunesmith.workflows.doctor import Diagnosis


@dataclass(frozen=True)
class HostDiagnosis:
    """A host by its name: what doctor finds there, or why it cannot look."""

    name: str
    found: Diagnosis | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        found = self.found
        return {
            "host": self.name,
            "distro": found.host if found else None,
            "ok": found is not None and found.ok,
            "checks": [check.as_dict() for check in found.checks] if found else [],
            "error": self.error,
        }


@dataclass(frozen=True)
class ClusterDiagnosis:
    """`hosts`: each by itself, in the order of the file; `checks`: of the cluster as a whole."""

    hosts: Sequence[HostDiagnosis]
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """Whether no check fails, of no host; warnings do not count."""
        fine = all(host.found is not None and host.found.ok for host in self.hosts)
        return fine and all(check.status != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "hosts": [host.as_dict() for host in self.hosts],
            "checks": [check.as_dict() for check in self.checks],
        }


def doctor_cluster(path: Path) -> ClusterDiagnosis:
    """Judge the cluster of a file: its hosts over ssh, and by short tests between them.

    Raises RecipeErrors with every fault of the file, UserError where ssh is not installed.
    """
    cluster = read_cluster(path)
    say(f"look at {len(cluster.hosts)} hosts together")
    seen = look(cluster)
    lost = {one.host: one.error for one in seen if one.error is not None}
    hosts = [
        HostDiagnosis(host.name, error=lost[host]) if host in lost else _diagnosed(host)
        for host in cluster.hosts
    ]
    return ClusterDiagnosis(hosts, check_cluster(cluster, seen))


def _diagnosed(host: Host) -> HostDiagnosis:
    say(f"look at {host.name}")
    try:
        facts = gather_remote(target_of(host))
    except TunesmithError as error:
        return HostDiagnosis(host.name, error=error.what)
    return HostDiagnosis(host.name, Diagnosis(read_distro(facts).name, run_checks(facts)))

"""Every check of `doctor`, in the order in which its fixes are to be made."""

from __future__ import annotations

from tunesmith.core.checks import Check
from tunesmith.host.checks_containers import abi, docker_shm, image_recipe, jupyter_token
from tunesmith.host.checks_docker import (
    docker,
    docker_cgroup,
    docker_gpu,
    docker_network,
    docker_snap,
    docker_version,
)
from tunesmith.host.checks_driver import driver, driver_cuda, driver_library
from tunesmith.host.checks_host import Host
from tunesmith.host.checks_system import (
    cpu,
    disk,
    hub_mirror,
    memory,
    ownership,
    package_sources,
    selinux,
)
from tunesmith.host.facts import Facts

CHECKS = (
    driver, driver_library, driver_cuda,
    docker, docker_gpu, docker_snap, docker_cgroup, docker_shm, docker_version, docker_network,
    abi, ownership, selinux, hub_mirror, package_sources, jupyter_token, image_recipe, disk, cpu, memory,
)  # fmt: skip


def run_checks(facts: Facts) -> list[Check]:
    """Judge a host by its facts alone: one `Check` of each kind, none left out."""
    host = Host(facts)
    return [check(host) for check in CHECKS]

"""From the facts of a host and what is wanted: the steps that it still needs, in order.

Nothing here touches a machine. The order: packages first; then the proxy, whose systemd reload can cut GPUs
off running containers; then docker's settings and the nvidia runtime; then one restart for all of them.
"""

from __future__ import annotations

from tunesmith.core.errors import UserError
from tunesmith.host import steps_packages as packages
from tunesmith.host import steps_state as probes
from tunesmith.host.checks_docker import PROXY_FILE
from tunesmith.host.distro import Distro, read_distro
from tunesmith.host.facts import Facts
from tunesmith.host.steps_config import (
    daemon_step,
    group_step,
    proxy_step,
    restart_step,
    runtime_step,
    service_step,
)
from tunesmith.host.steps_state import HostState, read_state
from tunesmith.host.steps_types import Plan, SetupOptions, Step
from tunesmith.host.steps_warnings import warnings_of

# What a plan reads of a host beside the probes of `doctor`.
NEEDED_COMMANDS = (
    probes.HAS_SYSTEMD,
    probes.DOCKER_ENABLED,
    probes.DOCKER_GROUP,
    probes.USER_NAME,
    probes.COMPOSE,
    probes.COMPOSE_V1,
    probes.RUNTIMES,
    probes.TOOLKIT_VERSION,
    probes.DEAD_MIRRORLIST,
    probes.OLD_NVIDIA_SOURCES,
    probes.APT_DOCKER_CE,
)
NEEDED_FILES = (probes.DAEMON_JSON, PROXY_FILE)


def plan_setup(facts: Facts, options: SetupOptions) -> Plan:
    """The steps that this host needs, none when it has everything.

    Raises UserError for a distribution that setup does not know, a daemon.json that is broken, and a bundle
    without the packages that are needed.
    """
    distro, state = read_distro(facts), read_state(facts)
    if distro.family == "other":
        raise UserError(
            f"{distro.name}: setup knows no package tool for it",
            hint="it knows Ubuntu, Debian, CentOS, Rocky, RHEL and AlmaLinux; install docker by hand",
        )
    wants_toolkit = state.gpu if options.toolkit is None else options.toolkit
    toolkit = wants_toolkit and not state.toolkit
    steps: list[Step] = []
    if state.docker != "snap":
        steps = _packages(facts, distro, state, options, toolkit=toolkit)
        steps += _settings(facts, state, options, toolkit=toolkit, wants_runtime=wants_toolkit)
    env = dict(packages.APT_ENV) if distro.family == "apt" and steps else {}
    if options.proxy and steps:
        env |= dict.fromkeys(("http_proxy", "https_proxy"), options.proxy) | {"no_proxy": options.no_proxy}
    secret = options.proxy_password
    secrets = (secret, secret.replace("%", "%%")) if secret else ()
    return Plan(
        tuple(steps),
        warnings_of(distro, state, options, steps),
        env,
        tuple(sorted(set(secrets), key=len)[::-1]),
    )


def _packages(
    facts: Facts, distro: Distro, state: HostState, options: SetupOptions, *, toolkit: bool
) -> list[Step]:
    docker, replace = state.docker in ("missing", "old"), state.docker == "old"
    if options.bundle is not None:
        if not (docker or toolkit):
            return []
        return packages.bundled_steps(distro, options, docker=docker, toolkit=toolkit)
    source = packages.docker_source(distro, options)
    if replace and options.docker is None:
        source = "docker-ce"  # the distribution's own is the one that is too old
    compose = not docker and not state.compose
    if not (docker or compose or toolkit):
        return []
    steps: list[Step] = []
    if packages.is_end_of_life_centos(distro) and _vault_needed(facts):
        steps.append(packages.vault_step())
    if state.old_nvidia_sources and distro.family == "apt":
        steps.append(packages.old_sources_step(state.old_nvidia_sources))
    repositories = toolkit or (docker and source == "docker-ce")
    if repositories and distro.family == "apt":
        steps.append(packages.prerequisites_step(distro))
    if docker:
        if source == "docker-ce":
            steps.append(packages.docker_repository_step(distro, options.docker_mirror))
        steps.append(packages.docker_step(distro, source, refresh=not repositories, replace=replace))
    elif compose:
        there = "docker-ce" if distro.is_rpm or state.docker_ce else source
        steps.append(packages.compose_step(distro, there))
    if toolkit:
        steps += [
            packages.toolkit_repository_step(distro, options.toolkit_mirror),
            packages.toolkit_step(distro),
        ]
    return steps


def _vault_needed(facts: Facts) -> bool:
    answer = facts.answer(probes.DEAD_MIRRORLIST)
    return not facts.has(probes.DEAD_MIRRORLIST) or bool(answer.stdout.strip())


def _settings(
    facts: Facts, state: HostState, options: SetupOptions, *, toolkit: bool, wants_runtime: bool
) -> list[Step]:
    fresh = state.docker in ("missing", "old")
    runtime = wants_runtime and (toolkit or not state.runtime)
    changes = [
        proxy_step(facts, options) if state.systemd else None,
        daemon_step(facts, state, options),
        runtime_step(facts) if runtime else None,
    ]
    steps = [step for step in changes if step is not None]
    group = group_step(state, options, fresh=fresh)
    if group:
        steps.append(group)
    if state.systemd and (fresh or not state.enabled):
        steps.append(service_step())
    if not options.running:
        return steps
    if any(changes) or state.stale or state.docker == "old":
        steps.append(restart_step(state, restart=True))
    elif fresh or state.docker == "down":
        steps.append(restart_step(state, restart=False))
    return steps

"""What a plan has to say beside its steps: honest limits, and what a restart costs."""

from __future__ import annotations

from tunesmith.host.distro import Distro
from tunesmith.host.packages import TOOLKIT_VERSION
from tunesmith.host.steps_config import CALLING_USER
from tunesmith.host.steps_packages import is_end_of_life_centos, toolkit_version
from tunesmith.host.steps_state import SAFE_TOOLKIT, HostState
from tunesmith.host.steps_types import SetupOptions, Step


def warnings_of(
    distro: Distro, state: HostState, options: SetupOptions, steps: list[Step]
) -> tuple[str, ...]:
    ids = {step.id for step in steps}
    found = [
        _snap(state),
        _distribution(distro, ids, options),
        _gpu(state, options),
        _old_toolkit(state),
        _containers(state, ids),
        _data_root(state, options, ids),
        _mirrors(options, ids),
        _systemd(state, options, ids),
        _user(steps),
    ]
    return tuple(text for text in found if text)


def _snap(state: HostState) -> str | None:
    if state.docker != "snap":
        return None
    return (
        "docker is a snap here: it cannot hand GPUs to containers, and a second docker beside it would fight "
        "for the same socket. Removing it deletes its images and volumes, so setup does not: save what you "
        "need, run 'snap remove docker', then setup again"
    )


def _distribution(distro: Distro, ids: set[str], options: SetupOptions) -> str | None:
    parts = []
    if is_end_of_life_centos(distro) and ids & {"docker", "nvidia-toolkit", "docker-compose"}:
        parts.append(
            f"{distro.name} gets no security fixes any more: plan to move to Rocky 9 or Ubuntu 24.04"
        )
    if "nvidia-toolkit" in ids and not distro.supported_by_toolkit:
        version = toolkit_version(distro)
        if version != TOOLKIT_VERSION and options.bundle is None:
            parts.append(
                f"NVIDIA's Container Toolkit {TOOLKIT_VERSION} does not support {distro.name}; {version}, "
                "the last release of the time when it did, is installed in its place"
            )
        else:
            parts.append(f"NVIDIA does not list {distro.name} for its Container Toolkit: it may not work")
    return "; ".join(parts) or None


def _gpu(state: HostState, options: SetupOptions) -> str | None:
    if not state.gpu and options.toolkit is None:
        return "no NVIDIA GPU was found: docker is set up for CPU work, without NVIDIA's toolkit"
    if state.gpu and not state.driver:
        return (
            "there is an NVIDIA GPU, but its driver does not answer. setup installs no drivers: the fix that "
            "follows is yours to run, and needs a reboot. docker and the toolkit do not have to wait for it"
        )
    return None


def _old_toolkit(state: HostState) -> str | None:
    if not state.toolkit_version or state.toolkit_version >= SAFE_TOOLKIT:
        return None
    version = ".".join(map(str, state.toolkit_version))
    return (
        f"the NVIDIA Container Toolkit here is {version}: before 1.17.8 a container can become root on "
        "the host (CVE-2025-23266). It works, so setup leaves it; upgrade it with the package tool"
    )


def _containers(state: HostState, ids: set[str]) -> str | None:
    disturbing = ids & {"docker-restart", "docker-proxy", "docker"}
    if not state.containers or not disturbing:
        return None
    reload = " The systemd reload before it can cut GPUs off them." if "docker-proxy" in ids else ""
    return (
        f"containers are running ({', '.join(state.containers)}): the restart of docker stops them, unless "
        f"live-restore is on; those that use GPUs have to be created anew.{reload}"
    )


def _data_root(state: HostState, options: SetupOptions, ids: set[str]) -> str | None:
    if options.data_root is None or "docker-config" not in ids or state.docker == "missing":
        return None
    if state.daemon.get("data-root") == options.data_root:
        return None
    old = state.daemon.get("data-root", "/var/lib/docker")
    return f"images and volumes under {old} stay there: docker begins anew in {options.data_root}"


def _mirrors(options: SetupOptions, ids: set[str]) -> str | None:
    if not options.registry_mirrors or "docker-config" not in ids:
        return None
    return "registry mirrors serve images of docker.io only; nvcr.io and others are pulled directly"


def _systemd(state: HostState, options: SetupOptions, ids: set[str]) -> str | None:
    if state.systemd or not (ids or options.proxy):
        return None
    proxy = " The proxy of dockerd has to be exported in /etc/default/docker." if options.proxy else ""
    if not options.running:
        return f"this is a folder, not a running host: docker is installed in it, but not started.{proxy}"
    return (
        "systemd does not run here: docker is started with 'service docker', and nothing starts it at boot."
        + proxy
    )


def _user(steps: list[Step]) -> str | None:
    if not any(CALLING_USER in command for step in steps for command in step.commands):
        return None
    return "the facts do not tell who will use docker: name the user with --user"

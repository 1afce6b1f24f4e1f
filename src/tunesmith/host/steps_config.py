"""Steps that set docker up: proxy, daemon.json, the nvidia runtime, the service, and who may use it."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.host.checks_docker import PROXY_FILE
from tunesmith.host.checks_host import DOCKER_ENVIRONMENT
from tunesmith.host.facts import Facts
from tunesmith.host.steps_state import CONFIGURE, DAEMON_JSON, HostState
from tunesmith.host.steps_types import Action, Command, SetupOptions, Step, Write

MASK = "***"  # what `doctor --record` writes in place of a secret
# Stands for the calling user where the facts of another host do not name one.
CALLING_USER = "$SUDO_USER"


def proxy_step(facts: Facts, options: SetupOptions) -> Step | None:
    """dockerd's proxy, as a systemd drop-in that only root can read; None when it is there already."""
    if options.proxy is None:
        return None
    names = {"HTTP_PROXY": options.proxy, "HTTPS_PROXY": options.proxy, "NO_PROXY": options.no_proxy}
    # '%' starts a specifier in a unit file; a password in a URL is full of them.
    lines = [f'Environment="{name}={value.replace("%", "%%")}"' for name, value in names.items()]
    text = "[Service]\n" + "\n".join(lines) + "\n"
    # The drop-in is for root's eyes only; systemd tells its variables to everyone.
    told = facts.answer(DOCKER_ENVIRONMENT).stdout.removeprefix("Environment=").split()
    if facts.file(PROXY_FILE) == text or {f"{n}={v}" for n, v in names.items()} <= set(told):
        return None
    backup = _backup(PROXY_FILE) if facts.file(PROXY_FILE) is not None else ()
    return Step(
        "docker-proxy",
        "Tell dockerd about the proxy",
        "dockerd does not see the proxy of a shell: without this, pulls end in a timeout.",
        (*backup, Write(PROXY_FILE, text, "0600"), ("systemctl", "daemon-reload")),
    )


def _backup(path: str) -> tuple[Command, ...]:
    return (("cp", "-p", "--backup=numbered", path, f"{path}.before-tunesmith"),)


def merged_daemon(daemon: dict[str, Any], options: SetupOptions) -> dict[str, Any]:
    """daemon.json with what is wanted; every other key stays, mirrors that were there come last."""
    merged = dict(daemon)
    if options.data_root is not None and daemon.get("data-root") != options.data_root:
        merged["data-root"] = options.data_root
    if options.registry_mirrors:
        old = daemon.get("registry-mirrors")
        others = [m for m in old if isinstance(m, str)] if isinstance(old, list) else []
        wanted = [m.rstrip("/") for m in options.registry_mirrors]
        rest = [m for m in others if m.rstrip("/") not in wanted]
        if [m.rstrip("/") for m in others[: len(wanted)]] != wanted:
            merged["registry-mirrors"] = [*dict.fromkeys(wanted), *rest]
    return merged


def daemon_step(facts: Facts, state: HostState, options: SetupOptions) -> Step | None:
    merged = merged_daemon(state.daemon, options)
    if merged == state.daemon:
        return None
    text = facts.file(DAEMON_JSON) or ""
    if MASK in text:
        raise UserError(
            f"{DAEMON_JSON}: its secrets are masked in these facts, and would be lost by the merge",
            hint="run setup on the host itself, or with --target",
        )
    changed = [key for key in merged if merged[key] != state.daemon.get(key)]
    there = facts.file(DAEMON_JSON) is not None
    folder: tuple[Command, ...] = ()
    if options.data_root is not None and "data-root" in changed:
        folder = (("mkdir", "-p", options.data_root),)
    actions: tuple[Action, ...] = (
        *folder,
        *(_backup(DAEMON_JSON) if there else ()),
        Write(DAEMON_JSON, json.dumps(merged, indent=2, ensure_ascii=False) + "\n"),
    )
    kept = "; the other keys stay, and the file as it was is kept beside it" if there else ""
    return Step("docker-config", f"Set {', '.join(changed)} of docker", f"As asked for{kept}.", actions)


def runtime_step(facts: Facts) -> Step:
    backup = _backup(DAEMON_JSON) if facts.file(DAEMON_JSON) is not None else ()
    return Step(
        "nvidia-runtime",
        "Make docker know the nvidia runtime",
        "It adds the runtime to /etc/docker/daemon.json and leaves the other keys.",
        (*backup, tuple(CONFIGURE.split())),
    )


def service_step() -> Step:
    return Step(
        "docker-service",
        "Start docker at boot",
        "Containers with a restart policy come back after a reboot.",
        (("systemctl", "enable", "docker"),),
    )


def restart_step(state: HostState, *, restart: bool) -> Step:
    verb = "restart" if restart else "start"
    command = ("systemctl", verb, "docker") if state.systemd else ("service", "docker", verb)
    why = "dockerd reads its settings, and looks for NVIDIA's hook, only when it starts."
    if not restart:
        why = "Nothing works until dockerd runs."
    return Step(f"docker-{verb}", f"{verb.capitalize()} docker", why, (command,))


def group_step(state: HostState, options: SetupOptions, *, fresh: bool) -> Step | None:
    """The user in the group docker; None for root, for a member, and where nobody looked."""
    user = options.user or state.user
    if user == "root" or (state.members is None and not fresh):
        return None
    if user is not None and state.members is not None and user in state.members:
        return None
    name = user or CALLING_USER
    return Step(
        "docker-group",
        f"Let {name} use docker without sudo",
        "Members of the group docker are as good as root on this host. It counts from the next login on.",
        (("usermod", "-aG", "docker", name),),
    )

"""Checks of docker: does it answer, hand out GPUs and keep them, is it new enough, does it reach out."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime

from tunesmith.core.checks import Check, Topic
from tunesmith.host.checks_fixes import (
    RESTART,
    install_docker,
    install_toolkit,
    restart_warning,
    write_line,
)
from tunesmith.host.checks_host import (
    CDI_LIST,
    DOCKER_CGROUP,
    DOCKER_ENVIRONMENT,
    DOCKER_NETWORK,
    DOCKER_ROOT,
    HOOKS,
    SNAP,
    Host,
    dotted,
    first_line,
)
from tunesmith.host.steps_packages import toolkit_version

DOCKER = Topic(
    "docker", "Docker", "Images are built with it, and training and serving run in its containers."
)
GPU = Topic(
    "docker-gpu",
    "GPUs in docker",
    "dockerd looks for NVIDIA's hook when it starts, and only then; without it `--gpus` is refused.",
)
SNAP_DOCKER = Topic(
    "docker-snap",
    "Docker from snap",
    "The snap is confined: it finds neither NVIDIA's hook nor folders outside /home, and hands out no GPU.",
)
CGROUP = Topic(
    "docker-cgroup",
    "GPUs stay in containers",
    "With the systemd cgroup driver, a `systemctl daemon-reload` takes GPUs that the hook has put in from "
    "containers that run: 'Failed to initialize NVML: Unknown Error', in the midst of a training.",
)
VERSION = Topic(
    "docker-version",
    "Docker version",
    "docker before 20.10.10 forbids clone3, with which newer images (Ubuntu 22.04 and later) start threads.",
)
NETWORK = Topic(
    "docker-network",
    "Network of docker",
    "dockerd pulls images itself, and does not see the proxy of your shell.",
)

OLDEST_DOCKER = (20, 10, 10)
PROXY_FILE = "/etc/systemd/system/docker.service.d/http-proxy.conf"
PROXY_NAMES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
# Probes ask in UTC; facts recorded by hand may not. CST is read as China's.
ZONES = {
    "CST": "+0800", "HKT": "+0800", "SGT": "+0800", "JST": "+0900", "KST": "+0900", "IST": "+0530",
    "MSK": "+0300", "CEST": "+0200", "CET": "+0100", "BST": "+0100", "EDT": "-0400", "EST": "-0500",
    "CDT": "-0500", "MDT": "-0600", "MST": "-0700", "PDT": "-0700", "PST": "-0800",
}  # fmt: skip
NO_DRIVER = r"could not select device driver"
NO_NVML = r"Failed to initialize NVML: Unknown Error"
NO_THREAD = r"can't start new thread|pthread_create failed: Operation not permitted"
NO_PULL = r"i/o timeout|Client\.Timeout exceeded|TLS handshake timeout|context deadline exceeded"


def docker(host: Host) -> Check:
    state, distro = host.docker, host.distro
    if state == "ok":
        version = f"docker {dotted(host.docker_version)} answers" if host.docker_version else "docker is here"
        return DOCKER.ok(version)
    if state == "missing":
        return DOCKER.fail("docker is not installed", install_docker(distro), _support(host))
    if state == "podman":
        remove = f"{distro.tool} remove -y podman-docker"
        return DOCKER.fail("the command docker is podman in disguise", [remove, *install_docker(distro)])
    if state == "denied":
        fix = ['usermod -aG docker "$SUDO_USER"', "# then log out and in again"]
        return DOCKER.fail(
            "dockerd runs, but this user may not ask it",
            fix,
            "Members of the group docker are as good as root.",
        )
    if state == "hung":
        return DOCKER.fail("docker does not answer in time", [*restart_warning(host), RESTART])
    fix = ["systemctl enable --now docker", "journalctl -u docker -n 50 --no-pager"]
    return DOCKER.fail("docker is installed, but dockerd does not run", fix)


def docker_gpu(host: Host) -> Check:
    refused = host.saying(NO_DRIVER)
    if refused is None and host.gpu != "ok":
        return GPU.skip(host.without_gpu)
    if refused is None and host.docker != "ok":
        return GPU.skip(host.without_docker)
    asked = host.facts.answer(HOOKS)
    hooks = asked.stdout.split()
    said = "`docker run --gpus` is refused: could not select device driver; " if refused else ""
    if not hooks:
        found = f"{said}NVIDIA's container toolkit is not installed"
        *install, restart = install_toolkit(host.distro)
        return GPU.fail(found, [*install, *restart_warning(host), restart], _support(host))
    if _newer_than_dockerd(host):
        found = f"{said}the toolkit was installed after dockerd had started"
        return GPU.fail(found, [*restart_warning(host), RESTART])
    if refused:
        fix = ["nvidia-ctk runtime configure --runtime=docker", *restart_warning(host), RESTART]
        return GPU.fail(f"{said}the toolkit is here ({hooks[0]}), dockerd does not know it", fix)
    old = f"; NVIDIA no longer lists {host.distro.name} for it" if host.distro.toolkit == "dropped" else ""
    return GPU.ok(f"{hooks[0]}, older than the running dockerd{old}")


def _support(host: Host) -> str:
    """What there is to say where NVIDIA has dropped the distribution."""
    if host.distro.toolkit != "dropped" or host.gpu == "none":
        return ""
    last = toolkit_version(host.distro)
    return (
        f"NVIDIA no longer lists {host.distro.name} for its container toolkit: {last} is "
        "the last release of the time when it did; a newer distribution is the better way."
    )


def _newer_than_dockerd(host: Host) -> bool:
    """Whether one of the hook's files changed after dockerd started."""
    changed = [
        moment
        for answer in host.facts.matching(r"^stat\b.*nvidia-(container-runtime-hook|cdi-hook)").values()
        if answer.ok
        for moment in _moments(answer.stdout)
    ]
    started = _moments(host.dockerd_started)
    return bool(changed and started) and max(changed) > started[0]


def _moments(text: str) -> list[datetime]:
    """Points in time as `stat` and systemd print them: seconds, or a date with an offset or a zone."""
    change = re.search(r"(?m)^\s*Change: (.*)$", text)
    pattern = r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(?:\.\d+)?(?: ([+-]\d{4}|[A-Z]{3,5}))?|\b(\d{9,11})\b"
    found = []
    for day, time, zone, seconds in re.findall(pattern, change[1] if change else text):
        if seconds:
            found.append(datetime.fromtimestamp(int(seconds), UTC))
        else:
            offset = ZONES.get(zone, zone if zone[:1] in ("+", "-") else "+0000")
            found.append(datetime.strptime(f"{day} {time} {offset}", "%Y-%m-%d %H:%M:%S %z"))
    return found


def docker_snap(host: Host) -> Check:
    root = first_line(host.facts.answer(DOCKER_ROOT).stdout)
    if host.facts.answer(SNAP).ok or root.startswith("/var/snap/"):
        data = root if root.startswith("/var/snap/") else "/var/snap/docker/common/var-lib-docker"
        return SNAP_DOCKER.fail(
            "docker comes from snap",
            [
                "# keep what you need: removing the snap deletes its images, containers and volumes",
                "snap stop docker",
                f"cp -a {shlex.quote(data)} /var/backups/docker-snap",
                "snap remove docker",
                *install_docker(host.distro),
            ],
        )
    if host.docker != "ok":
        return SNAP_DOCKER.skip(host.without_docker)
    return SNAP_DOCKER.ok("docker is no snap")


def docker_cgroup(host: Host) -> Check:
    lost = host.saying(NO_NVML, commands=r"^(?!nvidia-smi)")
    driver = first_line(host.facts.answer(DOCKER_CGROUP).stdout)
    if lost:
        return CGROUP.warn(f"a container has lost its GPUs: {lost[1]}", _keep_gpus(host))
    if host.gpu != "ok":
        return CGROUP.skip(host.without_gpu)
    if host.docker != "ok" or not driver:
        return CGROUP.skip(host.without_docker)
    if driver != "systemd":
        return CGROUP.ok(f"cgroup driver {driver}")
    if _has_cdi(host):
        return CGROUP.ok("cgroup driver systemd, GPUs by CDI (--device nvidia.com/gpu=all)")
    return CGROUP.warn("cgroup driver systemd, and GPUs are put in by the hook (--gpus)", _keep_gpus(host))


def _has_cdi(host: Host) -> bool:
    listed = host.facts.matching(r"^nvidia-ctk\b.*\bcdi list|^docker info\b.*(CDI|Devices)").values()
    specs = ("/var/run/cdi/nvidia.yaml", "/run/cdi/nvidia.yaml", "/etc/cdi/nvidia.yaml")
    return any(a.ok and "nvidia.com/gpu" in a.text for a in listed) or any(map(host.facts.file, specs))


def _keep_gpus(host: Host) -> list[str]:
    """CDI where docker has it, else the other cgroup driver; containers are made anew in both cases."""
    exec_opts = '"exec-opts": ["native.cgroupdriver=cgroupfs"]'
    if host.docker_version and host.docker_version < (25,):
        return [
            f"# in /etc/docker/daemon.json: {exec_opts}",
            *restart_warning(host),
            RESTART,
            "# then create the containers that use GPUs anew",
            "# or docker 25 or newer, and CDI: docker run --device nvidia.com/gpu=all IMAGE nvidia-smi",
        ]
    return [
        *restart_warning(host),
        "nvidia-ctk runtime configure --runtime=docker --enable-cdi",
        RESTART,
        "nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml",
        CDI_LIST,
        "# then create the containers anew, with CDI in place of --gpus:",
        "docker run --device nvidia.com/gpu=all IMAGE nvidia-smi",
        f"# or, without CDI: {exec_opts} in /etc/docker/daemon.json,",
        f"# {RESTART}, and the containers created anew",
    ]


def docker_version(host: Host) -> Check:
    failed = host.saying(NO_THREAD)
    version = host.docker_version
    old = bool(version) and version < OLDEST_DOCKER
    if not failed and not old:
        if not version:
            return VERSION.skip(host.without_docker)
        return VERSION.ok(dotted(version))
    found = (
        f"docker {dotted(version)} is older than {dotted(OLDEST_DOCKER)}" if old else "docker is new enough"
    )
    if failed:
        found = f"{found if version else 'a container'}; a program could not start a thread: {failed[1]}"
    more = []
    if failed and not old:
        name = "libseccomp" if host.distro.is_rpm else "libseccomp2"
        more = ["# an old libseccomp, or a limit of processes (--pids-limit), does the same:"]
        more += [" ".join(host.distro.install(name))]
    return VERSION.fail(found, [*restart_warning(host), *install_docker(host.distro), RESTART, *more])


def docker_network(host: Host) -> Check:
    timeout = host.saying(NO_PULL, commands=r"^docker (pull|run|build|compose|buildx|create|logs|login)\b")
    shell = next((host.facts.env[name] for name in PROXY_NAMES if host.facts.env.get(name)), "")
    if host.docker != "ok" and not timeout and not (shell and host.facts.has(DOCKER_ENVIRONMENT)):
        return NETWORK.skip(host.without_docker)
    daemon = _daemon_proxy(host)
    if shell and not daemon:
        found = "your shell has a proxy, dockerd has none" + (f"; {timeout[1]}" if timeout else "")
        return NETWORK.warn(found, _proxy_fix(host, shell), _reload_note(host))
    if timeout:
        return _pull_fails(host, timeout[1], daemon)
    mirrors = _mirrors(host)
    found = f"dockerd has the proxy {without_secret(daemon)}" if daemon else "no proxy is needed"
    return NETWORK.ok(found + (f"; mirrors {', '.join(mirrors)} (for docker.io only)" if mirrors else ""))


def _daemon_proxy(host: Host) -> str:
    """dockerd's proxy: from its unit, from what it says itself, or from daemon.json."""
    unit = re.search(r"(?i)\bhttps?_proxy=([^\s\"']+)", host.facts.answer(DOCKER_ENVIRONMENT).stdout)
    if unit:
        return unit[1]
    said = re.search(r"^\S+://\S+", host.facts.answer(DOCKER_NETWORK).stdout.strip())
    if said:
        return said[0]
    config = re.search(
        r'"https?-proxy"\s*:\s*"([^"]+)"', host.facts.file("/etc/docker/daemon.json") or "", re.IGNORECASE
    )
    return config[1] if config else ""


def _mirrors(host: Host) -> list[str]:
    return re.findall(r'"(https?://[^"]+)"', host.facts.answer(DOCKER_NETWORK).stdout)


def _pull_fails(host: Host, said: str, daemon: str) -> Check:
    mirrors = _mirrors(host)
    if mirrors or daemon:
        found = f"pulls time out though dockerd has {'mirrors' if mirrors else 'a proxy'}: {said}"
    else:
        found = f"pulls time out: {said}"
    fix = _proxy_fix(host, "http://YOUR.PROXY:3128")
    if not mirrors:
        mirror = '"registry-mirrors": ["https://your.mirror"]'
        fix += [f"# or, for images of docker.io only, in /etc/docker/daemon.json: {mirror}", RESTART]
    fix += ["# or, without network: 'tunesmith image save' elsewhere, 'tunesmith image load' here"]
    return NETWORK.warn(
        found, fix, "Mirrors serve images of docker.io only, never those of nvcr.io. " + _reload_note(host)
    )


def _reload_note(host: Host) -> str:
    if host.gpu == "none":
        return ""
    return (
        "The fix reloads systemd, which can take the GPUs from containers that run (see 'docker-cgroup'; its "
        "fix comes first): let them end before it."
    )


def _proxy_fix(host: Host, proxy: str) -> list[str]:
    # '%' starts a specifier in a unit file.
    shown = without_secret(proxy).replace("%", "%%")
    skip = "localhost,127.0.0.1,::1"
    text = f'[Service]\nEnvironment="HTTP_PROXY={shown}" "HTTPS_PROXY={shown}" "NO_PROXY={skip}"\n'
    masked = ["# put the user and the password of the proxy in place of ***"] if "***" in shown else []
    return [
        *restart_warning(host),
        "mkdir -p /etc/systemd/system/docker.service.d",
        *masked,
        write_line(PROXY_FILE, text),
        "systemctl daemon-reload",
        RESTART,
    ]


def without_secret(url: str) -> str:
    """The URL with `***` in place of the user and password in it."""
    return re.sub(r"^(\w+://)?[^/@]*@", r"\1***@", url)

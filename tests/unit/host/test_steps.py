"""Which steps a host still needs, from recorded facts: in order, and with the exact commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.host.checks_docker import PROXY_FILE
from tunesmith.host.checks_host import (
    CONTAINER_GPUS,
    CONTAINERS,
    DOCKER_ENVIRONMENT,
    DOCKER_STARTED,
    DOCKER_VERSION,
    HOOKS,
    NOUVEAU,
    SMI,
    SNAP,
)
from tunesmith.host.facts import TIMED_OUT, Answer, Facts, load_facts
from tunesmith.host.steps import plan_setup
from tunesmith.host.steps_state import (
    APT_DOCKER_CE,
    COMPOSE,
    COMPOSE_V1,
    DAEMON_JSON,
    DEAD_MIRRORLIST,
    DOCKER_ENABLED,
    DOCKER_GROUP,
    HAS_SYSTEMD,
    OLD_NVIDIA_SOURCES,
    RUNTIMES,
    TOOLKIT_VERSION,
    USER_NAME,
)
from tunesmith.host.steps_types import Plan, SetupOptions, Write

RELEASES = {
    "ubuntu-20.04": 'ID=ubuntu\nVERSION_ID="20.04"\nVERSION_CODENAME=focal\nPRETTY_NAME="Ubuntu 20.04.6 LTS"\n',
    "ubuntu-22.04": 'ID=ubuntu\nVERSION_ID="22.04"\nVERSION_CODENAME=jammy\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "ubuntu-24.04": 'ID=ubuntu\nVERSION_ID="24.04"\nVERSION_CODENAME=noble\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n',
    "debian-11": 'ID=debian\nVERSION_ID="11"\nVERSION_CODENAME=bullseye\nPRETTY_NAME="Debian GNU/Linux 11"\n',
    "debian-12": 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian GNU/Linux 12"\n',
    "debian-13": 'ID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie\nPRETTY_NAME="Debian GNU/Linux 13"\n',
    "centos-7": 'ID="centos"\nVERSION_ID="7"\nPRETTY_NAME="CentOS Linux 7 (Core)"\n',
    "centos-8": 'ID="centos"\nVERSION_ID="8"\nPRETTY_NAME="CentOS Linux 8"\n',
    "rocky-9": 'ID="rocky"\nVERSION_ID="9.4"\nID_LIKE="rhel centos fedora"\nPRETTY_NAME="Rocky Linux 9.4"\n',
    "rhel-9": 'ID="rhel"\nVERSION_ID="9.4"\nPRETTY_NAME="Red Hat Enterprise Linux 9.4"\n',
}
GPU = {SMI: Answer(0, "NVIDIA GeForce RTX 3090, 550.54.14, 8.6, 24576 MiB\n")}
DOCKER = {DOCKER_VERSION: Answer(0, "27.5.1\n")}
TOOLKIT = {HOOKS: Answer(0, "/usr/bin/nvidia-container-runtime-hook\n/usr/bin/nvidia-cdi-hook\n")}
ADA = {USER_NAME: Answer(0, "ada\n")}
SETTLED = {
    **GPU, **DOCKER, **TOOLKIT, **ADA,
    HAS_SYSTEMD: Answer(0), DOCKER_ENABLED: Answer(0, "enabled\n"), COMPOSE: Answer(0, "2.32.4\n"),
    COMPOSE_V1: Answer(127), DOCKER_GROUP: Answer(0, "docker:x:998:bob,ada\n"),
    RUNTIMES: Answer(0, '{"nvidia":{"path":"nvidia-container-runtime"},"runc":{"path":"runc"}}\n'),
    TOOLKIT_VERSION: Answer(0, "NVIDIA Container Toolkit CLI version 1.20.0\n"),
}  # fmt: skip
WAIT = "-o DPkg::Lock::Timeout=300"


def host(release: str, *parts: dict[str, Answer], files: dict[str, str] | None = None) -> Facts:
    commands = {command: answer for part in parts for command, answer in part.items()}
    return Facts(commands, {"/etc/os-release": RELEASES[release], **(files or {})})


def plan(facts: Facts, **options: object) -> Plan:
    return plan_setup(facts, SetupOptions(**options))  # type: ignore[arg-type]


def ids(found: Plan) -> list[str]:
    return [step.id for step in found.steps]


def lines(found: Plan, step: str) -> list[str]:
    return [" ".join(command) for s in found.steps if s.id == step for command in s.commands]


def written(found: Plan) -> dict[str, Write]:
    return {
        action.path: action for step in found.steps for action in step.actions if isinstance(action, Write)
    }


APT_IDS = [
    "prerequisites", "docker", "nvidia-repository", "nvidia-toolkit", "nvidia-runtime", "docker-group",
    "docker-service", "docker-restart",
]  # fmt: skip
RPM_IDS = ["docker-repository", *APT_IDS[1:]]


@pytest.mark.parametrize(
    ("release", "steps", "docker"),
    [
        ("ubuntu-22.04", APT_IDS, "docker.io docker-compose-v2 docker-buildx apparmor ca-certificates"),
        ("ubuntu-24.04", APT_IDS, "docker.io docker-compose-v2 docker-buildx apparmor ca-certificates"),
        ("debian-12", APT_IDS, "docker.io docker-compose apparmor ca-certificates"),
        ("debian-13", APT_IDS, "docker.io docker-cli docker-compose docker-buildx apparmor ca-certificates"),
    ],
)
def test_bare_apt_host_with_a_gpu(release: str, steps: list[str], docker: str) -> None:
    found = plan(host(release, GPU, ADA))
    assert ids(found) == steps
    assert found.warnings == ()
    assert found.env == {"DEBIAN_FRONTEND": "noninteractive"}
    assert lines(found, "prerequisites") == [
        f"apt-get update {WAIT}",
        f"apt-get install -y --no-install-recommends {WAIT} ca-certificates curl gnupg",
    ]
    assert lines(found, "docker") == [f"apt-get install -y --no-install-recommends {WAIT} {docker}"]
    key = "/usr/share/keyrings/nvidia-container-toolkit-keyring"
    assert lines(found, "nvidia-repository")[:2] == [
        f"curl -fsSL --retry 3 https://nvidia.github.io/libnvidia-container/gpgkey -o {key}.asc",
        f"gpg --batch --yes --dearmor -o {key}.gpg {key}.asc",
    ]
    assert written(found)["/etc/apt/sources.list.d/nvidia-container-toolkit.list"].text == (
        f"deb [signed-by={key}.gpg] https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH) /\n"
    )
    assert lines(found, "nvidia-toolkit") == [
        f"apt-get install -y --no-install-recommends {WAIT} nvidia-container-toolkit=1.20.0-1 "
        "nvidia-container-toolkit-base=1.20.0-1 libnvidia-container-tools=1.20.0-1 libnvidia-container1=1.20.0-1"
    ]
    assert lines(found, "nvidia-runtime") == ["nvidia-ctk runtime configure --runtime=docker"]
    assert lines(found, "docker-group") == ["usermod -aG docker ada"]
    assert lines(found, "docker-service") == ["systemctl enable docker"]
    assert lines(found, "docker-restart") == ["systemctl restart docker"]


@pytest.mark.parametrize(
    ("release", "tool", "linux", "sources"),
    [
        ("centos-8", "dnf", "centos/8", True),
        ("rocky-9", "dnf", "centos/9", False),
        ("rhel-9", "dnf", "rhel/9", False),
        ("centos-7", "yum", "centos/7", True),
    ],
)
def test_bare_rpm_host_with_a_gpu(release: str, tool: str, linux: str, sources: bool) -> None:
    found = plan(host(release, GPU, ADA))
    assert ids(found) == (["package-sources"] if sources else []) + RPM_IDS
    repository = written(found)["/etc/yum.repos.d/docker-ce.repo"].text
    assert f"baseurl=https://download.docker.com/linux/{linux}/$basearch/stable\n" in repository
    assert "gpgcheck=1\n" in repository
    erase = " --allowerasing" if tool == "dnf" else ""
    docker = "docker-ce docker-ce-cli containerd.io docker-buildx-plugin docker-compose-plugin"
    assert lines(found, "docker") == [f"{tool} install -y{erase} {docker}"]
    assert lines(found, "nvidia-repository") == [
        "curl -fsSL --retry 3 https://nvidia.github.io/libnvidia-container/stable/rpm/nvidia-container-toolkit.repo "
        "-o /etc/yum.repos.d/nvidia-container-toolkit.repo"
    ]
    version = "1.17.8-1" if release == "centos-7" else "1.20.0-1"
    assert lines(found, "nvidia-toolkit") == [
        f"{tool} install -y nvidia-container-toolkit-{version} nvidia-container-toolkit-base-{version} "
        f"libnvidia-container-tools-{version} libnvidia-container1-{version}"
    ]


def test_centos_7_and_ubuntu_20_04_are_told_the_truth() -> None:
    centos, ubuntu = plan(host("centos-7", GPU, ADA)), plan(host("ubuntu-20.04", GPU, ADA))
    assert any("does not support CentOS Linux 7" in w and "1.17.8-1" in w for w in centos.warnings)
    assert any("no security fixes" in w for w in centos.warnings)
    assert any("does not support Ubuntu 20.04" in w and "1.19.1-1" in w for w in ubuntu.warnings)
    assert "nvidia-container-toolkit=1.19.1-1" in lines(ubuntu, "nvidia-toolkit")[0]


def test_old_centos_sources_are_left_alone_once_they_are_right() -> None:
    assert "package-sources" in ids(
        plan(host("centos-8", GPU, {DEAD_MIRRORLIST: Answer(0, "/etc/x.repo\n")}))
    )
    assert "package-sources" not in ids(plan(host("centos-8", GPU, {DEAD_MIRRORLIST: Answer(1)})))


def test_debian_11_gets_docker_ce_because_its_own_is_too_old() -> None:
    found = plan(host("debian-11", ADA))
    assert ids(found)[:3] == ["prerequisites", "docker-repository", "docker"]
    assert written(found)["/etc/apt/sources.list.d/docker.list"].text == (
        "deb [signed-by=/etc/apt/keyrings/docker.asc] https://download.docker.com/linux/debian bullseye stable\n"
    )


@pytest.mark.parametrize("release", RELEASES)
def test_a_host_that_has_everything_needs_nothing(release: str) -> None:
    assert plan(host(release, SETTLED)).steps == ()


RECORDED = Path(__file__).parents[2] / "facts"


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_hosts_need_what_they_lack(path: Path) -> None:
    """Hosts as `doctor --record` writes them: whole ones need nothing, bare ones all, others what is broken."""
    found = ids(plan(load_facts(path)))
    if "healthy" in path.stem:
        assert found == []
    elif path.stem.startswith("bare-"):
        assert {"docker", "nvidia-toolkit", "nvidia-runtime", "docker-restart"} <= set(found)
    elif "no-toolkit" in path.stem:
        assert found[-3:] == ["nvidia-toolkit", "nvidia-runtime", "docker-restart"]
    elif "toolkit-newer" in path.stem:
        assert found == ["docker-restart"]
    elif not re.search("docker|thread", path.stem):
        assert found == []  # nothing that packages and settings of docker could mend


def test_probes_of_doctor_alone_are_enough_to_see_that_nothing_is_needed() -> None:
    found = plan(host("ubuntu-22.04", GPU, DOCKER, TOOLKIT))
    assert found.steps == () and found.warnings == ()


def test_without_a_gpu_there_is_docker_without_toolkit_and_it_says_so() -> None:
    found = plan(host("ubuntu-22.04", ADA))
    assert ids(found) == ["docker", "docker-group", "docker-service", "docker-start"]
    assert lines(found, "docker")[0] == f"apt-get update {WAIT}"
    assert any("no NVIDIA GPU" in warning for warning in found.warnings)
    assert "nvidia-toolkit" in ids(plan(host("ubuntu-22.04", ADA), toolkit=True))
    assert "nvidia-toolkit" not in ids(plan(host("ubuntu-22.04", ADA, GPU), toolkit=False))


@pytest.mark.parametrize(
    "answers",
    [
        {SMI: Answer(9, "", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")},
        {NOUVEAU: Answer(0, "nouveau 2306048 0\n")},
    ],
)
def test_a_dead_driver_is_said_and_the_rest_goes_on(answers: dict[str, Answer]) -> None:
    found = plan(host("ubuntu-22.04", answers, ADA))
    assert ids(found) == APT_IDS
    assert any("its driver does not answer" in warning for warning in found.warnings)
    assert not any("nvidia-driver" in " ".join(c) for step in found.steps for c in step.commands)


def test_docker_that_refuses_this_user_counts_as_docker() -> None:
    denied = Answer(1, "", "permission denied while trying to connect to the Docker daemon socket")
    found = plan(
        host("ubuntu-22.04", {**SETTLED, DOCKER_VERSION: denied, DOCKER_GROUP: Answer(0, "docker:x:9:\n")})
    )
    assert ids(found) == ["docker-group"]


def test_docker_that_does_not_run_is_started() -> None:
    down = Answer(1, "", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
    stopped = {**SETTLED, DOCKER_VERSION: down, RUNTIMES: down}
    found = plan(host("ubuntu-22.04", {**stopped, DOCKER_ENABLED: Answer(1, "disabled\n")}))
    assert ids(found) == ["docker-service", "docker-start"]
    found = plan(host("debian-12", {**stopped, HAS_SYSTEMD: Answer(1)}))
    assert lines(found, "docker-start") == ["service docker start"]
    assert any("systemd does not run here" in warning for warning in found.warnings)


def test_old_docker_is_replaced_by_docker_ce_and_running_containers_are_warned_of() -> None:
    old = {**SETTLED, DOCKER_VERSION: Answer(0, "20.10.7\n"), CONTAINERS: Answer(0, "train\nweb\n")}
    old[CONTAINER_GPUS + "train"] = Answer(0, '[{"Driver":"","Capabilities":[["gpu"]]}] runc\n')
    found = plan(host("ubuntu-22.04", old))
    assert ids(found) == ["prerequisites", "docker-repository", "docker", "docker-service", "docker-restart"]
    assert any("train" in warning and "restart" in warning for warning in found.warnings)


def test_snap_docker_is_not_touched() -> None:
    found = plan(host("ubuntu-22.04", GPU, {SNAP: Answer(0, "docker 27.2.0\n"), **DOCKER}))
    assert found.steps == ()
    assert any("snap remove docker" in warning for warning in found.warnings)


def test_missing_compose_and_missing_runtime_are_added_alone() -> None:
    lacking = {**SETTLED, COMPOSE: Answer(1), RUNTIMES: Answer(0, '{"runc":{"path":"runc"}}\n')}
    found = plan(host("ubuntu-22.04", lacking))
    assert ids(found) == ["docker-compose", "nvidia-runtime", "docker-restart"]
    assert "docker-compose-v2" in lines(found, "docker-compose")[1]
    named, there = (
        {APT_DOCKER_CE: Answer(0, "docker-ce\t\n")},
        {APT_DOCKER_CE: Answer(0, "docker-ce\t5:27.5.1-1\n")},
    )
    assert "docker-compose-v2" in lines(plan(host("ubuntu-22.04", lacking, named)), "docker-compose")[1]
    assert "docker-compose-plugin" in lines(plan(host("ubuntu-22.04", lacking, there)), "docker-compose")[1]


def test_a_compose_that_answers_too_late_is_there() -> None:
    late = {**SETTLED, COMPOSE: Answer(1), COMPOSE_V1: Answer(TIMED_OUT)}
    assert "docker-compose" not in ids(plan(host("debian-12", late)))


def test_docker_that_is_new_beside_an_old_toolkit_is_told_of_it() -> None:
    assert "nvidia-runtime" in ids(plan(host("ubuntu-22.04", GPU, TOOLKIT, ADA)))


def test_a_toolkit_newer_than_dockerd_asks_for_a_restart() -> None:
    late = {
        **SETTLED,
        DOCKER_STARTED: Answer(0, "ActiveEnterTimestamp=Mon 2026-03-02 08:00:00 UTC\n"),
        "stat -c %z /usr/bin/nvidia-container-runtime-hook": Answer(
            0, "2026-03-02 09:30:00.000000000 +0000\n"
        ),
    }
    assert ids(plan(host("ubuntu-22.04", late))) == ["docker-restart"]


def test_a_toolkit_with_a_known_hole_is_named() -> None:
    old = {**SETTLED, TOOLKIT_VERSION: Answer(0, "NVIDIA Container Toolkit CLI version 1.17.4\n")}
    found = plan(host("ubuntu-22.04", old))
    assert found.steps == () and any("CVE-2025-23266" in warning for warning in found.warnings)


def test_old_nvidia_sources_are_switched_off_before_apt_reads_them() -> None:
    old = {OLD_NVIDIA_SOURCES: Answer(0, "/etc/apt/sources.list.d/nvidia-docker.list\n")}
    found = plan(host("ubuntu-22.04", GPU, ADA, old))
    assert ids(found)[:2] == ["old-nvidia-sources", "prerequisites"]


def test_user_root_needs_no_group_and_a_member_neither() -> None:
    assert "docker-group" not in ids(plan(host("ubuntu-22.04", {USER_NAME: Answer(0, "root\n")})))
    assert "docker-group" not in ids(plan(host("ubuntu-22.04", SETTLED)))
    assert lines(plan(host("ubuntu-22.04", SETTLED), user="eve"), "docker-group") == [
        "usermod -aG docker eve"
    ]
    unknown = plan(host("ubuntu-22.04"))
    assert "docker-group" in ids(unknown) and any("--user" in warning for warning in unknown.warnings)


DAEMON = {
    "log-driver": "local",
    "registry-mirrors": ["https://old.mirror"],
    "runtimes": {"nvidia": {"path": "x"}},
}


def test_daemon_json_is_merged_and_a_backup_kept() -> None:
    files = {DAEMON_JSON: json.dumps(DAEMON)}
    wanted = {"data_root": "/data/docker", "registry_mirrors": ("https://your.mirror/", "https://old.mirror")}
    found = plan(host("ubuntu-22.04", SETTLED, files=files), **wanted)
    assert ids(found) == ["docker-config", "docker-restart"]
    merged = json.loads(written(found)[DAEMON_JSON].text)
    assert merged == {
        **DAEMON,
        "data-root": "/data/docker",
        "registry-mirrors": ["https://your.mirror", "https://old.mirror"],
    }
    backup = f"cp -p --backup=numbered {DAEMON_JSON} {DAEMON_JSON}.before-tunesmith"
    steps = lines(found, "docker-config")
    assert steps.index(backup) < steps.index(f"mv -f {DAEMON_JSON}.tunesmith-new {DAEMON_JSON}")
    assert any("/var/lib/docker stay there" in warning for warning in found.warnings)
    again = host("ubuntu-22.04", SETTLED, files={DAEMON_JSON: written(found)[DAEMON_JSON].text})
    assert plan(again, **wanted).steps == ()


@pytest.mark.parametrize(("text", "fault"), [('{"a": 1,}', "is not JSON"), ("[1]", "holds a list")])
def test_a_broken_daemon_json_is_named(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=f"{DAEMON_JSON}: {fault}"):
        plan(host("ubuntu-22.04", SETTLED, files={DAEMON_JSON: text}), data_root="/data")


def test_proxy_comes_before_the_runtime_and_one_restart_does() -> None:
    found = plan(host("ubuntu-22.04", GPU, ADA), proxy="http://ada:p%40ss@10.0.0.1:3128", data_root="/data")
    order = [
        "docker-proxy",
        "docker-config",
        "nvidia-runtime",
        "docker-group",
        "docker-service",
        "docker-restart",
    ]
    assert ids(found)[-6:] == order
    drop_in = written(found)[PROXY_FILE]
    assert drop_in.mode == "0600"  # it holds a password
    assert 'Environment="HTTPS_PROXY=http://ada:p%%40ss@10.0.0.1:3128"\n' in drop_in.text
    assert lines(found, "docker-proxy")[-1] == "systemctl daemon-reload"
    assert found.env["https_proxy"] == "http://ada:p%40ss@10.0.0.1:3128"
    shown = found.hide(drop_in.text)
    assert "p%%40ss" not in shown and "***@10.0.0.1" in shown


def test_a_proxy_that_is_there_is_not_written_again() -> None:
    first = plan(host("ubuntu-22.04", SETTLED), proxy="http://10.0.0.1:3128")
    assert ids(first) == ["docker-proxy", "docker-restart"]
    files = {PROXY_FILE: written(first)[PROXY_FILE].text}
    assert plan(host("ubuntu-22.04", SETTLED, files=files), proxy="http://10.0.0.1:3128").steps == ()
    told = "Environment=HTTP_PROXY=http://10.0.0.1:3128 HTTPS_PROXY=http://10.0.0.1:3128 NO_PROXY=localhost,127.0.0.1,::1"
    facts = host("ubuntu-22.04", {**SETTLED, DOCKER_ENVIRONMENT: Answer(0, told + "\n")})
    assert plan(facts, proxy="http://10.0.0.1:3128").steps == ()


def test_docker_mirror_serves_packages_and_key() -> None:
    rocky = plan(host("rocky-9", ADA), docker_mirror="https://your.mirror/docker-ce/")
    text = written(rocky)["/etc/yum.repos.d/docker-ce.repo"].text
    assert "baseurl=https://your.mirror/docker-ce/linux/centos/9/$basearch/stable\n" in text
    assert "download.docker.com" not in text
    ubuntu = plan(
        host("ubuntu-24.04", ADA), docker="docker-ce", docker_mirror="https://your.mirror/docker-ce"
    )
    assert "https://your.mirror/docker-ce/linux/ubuntu noble stable" in str(written(ubuntu))


def test_toolkit_mirror_serves_packages_and_key() -> None:
    mirror = "https://your.mirror/libnvidia-container"
    ubuntu = plan(host("ubuntu-24.04", GPU, ADA), toolkit_mirror=mirror + "/")
    assert f"{mirror}/gpgkey" in lines(ubuntu, "nvidia-repository")[0]
    assert f"{mirror}/stable/deb/$(ARCH) /" in str(written(ubuntu))
    rocky = plan(host("rocky-9", GPU, ADA), toolkit_mirror=mirror)
    repository = written(rocky)["/etc/yum.repos.d/nvidia-container-toolkit.repo"].text
    assert f"baseurl={mirror}/stable/rpm/$basearch\n" in repository and "repo_gpgcheck=1\n" in repository
    for found in (ubuntu, rocky):
        assert not any("nvidia.github.io" in word for s in found.steps for c in s.commands for word in c)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"user": "ada; rm -rf /"}, "is not a user name"),
        ({"data_root": "data"}, "is not the full path"),
        ({"data_root": "/a/../b"}, "is not the full path"),
        ({"data_root": "/"}, "whole disk"),
        ({"registry_mirrors": ("your.mirror",)}, "is not a URL"),
        ({"registry_mirrors": ("https://your.mirror/hub",)}, "has a path"),
        ({"registry_mirrors": ('https://x"y',)}, "is not a URL"),
        ({"proxy": "ftp://10.0.0.1"}, "is not a URL"),
        ({"proxy": "http://10.0.0.1:99999"}, "is not a URL"),
        ({"proxy": "http://10.0.0.1\n:1"}, "is not a URL"),
        ({"no_proxy": 'a"b'}, "is not a list of hosts"),
        ({"docker_mirror": "file:///etc"}, "is not a URL"),
        ({"toolkit_mirror": "your.mirror"}, "is not a URL"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        SetupOptions(**options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_a_bad_proxy_is_named_without_its_password() -> None:
    with pytest.raises(UserError) as caught:
        SetupOptions(proxy="http://ada:secret@10.0.0.1:3128/path?x")
    assert "secret" not in str(caught.value)


def test_docker_io_is_not_for_rpm_and_other_systems_are_refused() -> None:
    with pytest.raises(UserError, match="has no such package"):
        plan(host("rocky-9"), docker="docker.io")
    with pytest.raises(UserError, match="knows no package tool"):
        plan(Facts(files={"/etc/os-release": 'ID=arch\nPRETTY_NAME="Arch Linux"\n'}))


TOOLKIT_FILES = ("libnvidia-container1", "libnvidia-container-tools", "nvidia-container-toolkit-base", "nvidia-container-toolkit")  # fmt: skip


def bundle(folder: Path, label: str, names: list[str]) -> Path:
    place = folder / "packages" / label
    place.mkdir(parents=True)
    for name in names:
        (place / name).write_bytes(b"")
    (place / "order.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def test_from_a_bundle_dpkg_takes_the_files_in_order_and_no_network_is_used(tmp_path: Path) -> None:
    others = ["runc_1.1_amd64.deb", "containerd_1.7_amd64.deb", "docker.io_24.0_amd64.deb"]
    nvidia = [f"{name}_1.20.0-1_amd64.deb" for name in TOOLKIT_FILES]
    made = bundle(tmp_path / "my bundle", "ubuntu-22.04", [*others, *nvidia])
    found = plan(host("ubuntu-22.04", GPU, ADA), bundle=made)
    assert ids(found) == ["docker", "nvidia-toolkit", *APT_IDS[4:]]
    place = made / "packages" / "ubuntu-22.04"
    options = ("--skip-same-version", "--refuse-downgrade")
    docker, toolkit = found.steps[0].commands, found.steps[1].commands
    assert docker == (("dpkg", "-i", *options, *(str(place / name) for name in others)),)
    assert toolkit == (("dpkg", "-i", *options, *(str(place / name) for name in nvidia)),)
    words = {word for step in found.steps for command in step.commands for word in command}
    assert not words & {"apt-get", "curl"} and not any("://" in word for word in words)


def test_from_a_bundle_rpm_and_only_what_is_missing(tmp_path: Path) -> None:
    nvidia = [f"{name}-1.20.0-1.x86_64.rpm" for name in TOOLKIT_FILES]
    made = bundle(tmp_path, "rocky-9", ["containerd.io-1.7.rpm", "docker-ce-27.rpm", *nvidia])
    place = made / "packages" / "rocky-9"
    bare = plan(host("rocky-9", GPU, ADA), bundle=made)
    assert bare.steps[0].commands[0][:3] == ("rpm", "-Uvh", "--replacepkgs")
    assert bare.steps[1].commands == (
        ("rpm", "-ivh", "--replacepkgs", *(str(place / name) for name in nvidia)),
    )
    with_docker = plan(host("rocky-9", GPU, DOCKER), bundle=made)
    assert ids(with_docker) == ["nvidia-toolkit", "nvidia-runtime", "docker-restart"]


def test_packages_are_brought_to_another_host_first(tmp_path: Path) -> None:
    made = bundle(tmp_path, "debian-12", ["docker.io_20.10.24_amd64.deb"])
    found = plan(host("debian-12", ADA), bundle=made, upload=True)
    step = found.steps[0].as_dict()
    assert step["copies"] == [
        {
            "from": str(made / "packages/debian-12/docker.io_20.10.24_amd64.deb"),
            "to": "/var/tmp/tunesmith-packages/docker.io_20.10.24_amd64.deb",
        }
    ]
    assert step["commands"][1][-1] == "/var/tmp/tunesmith-packages/docker.io_20.10.24_amd64.deb"


def test_a_bundle_for_another_system_names_what_it_has(tmp_path: Path) -> None:
    made = bundle(tmp_path, "ubuntu-22.04", ["docker.io_24.0_amd64.deb"])
    with pytest.raises(UserError, match=r"no host packages for rocky-9; it has ubuntu-22\.04"):
        plan(host("rocky-9", GPU), bundle=made)
    with pytest.raises(UserError, match="lack the NVIDIA Container Toolkit"):
        plan(host("ubuntu-22.04", GPU), bundle=made)
    assert plan(host("rocky-9", SETTLED), bundle=made).steps == ()

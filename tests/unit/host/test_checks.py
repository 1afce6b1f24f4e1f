"""Recorded hosts: which check speaks up, how, and what it says to do, for each family of distributions.

Every file of `tests/facts` is named here. Checks that are not named for a file have to be ok.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tunesmith.core.checks import Check
from tunesmith.host.checks import run_checks
from tunesmith.host.facts import Answer, Facts, load_facts

FACTS = ROOT / "tests" / "facts"
IDS = [
    "driver",
    "driver-library",
    "driver-cuda",
    "docker",
    "docker-gpu",
    "docker-snap",
    "docker-cgroup",
    "docker-shm",
    "docker-version",
    "docker-network",
    "abi",
    "ownership",
    "selinux",
    "hub-mirror",
    "package-sources",
    "jupyter-token",
    "image-recipe",
    "disk",
    "cpu",
    "memory",
]
# Without a driver these cannot be judged, without a docker those.
NEED_DRIVER = ("driver-library", "driver-cuda", "docker-gpu", "docker-cgroup")
NEED_DOCKER = (
    "docker-gpu", "docker-snap", "docker-cgroup", "docker-shm", "docker-version", "docker-network", "abi",
    "image-recipe", "disk",
)  # fmt: skip

# file: (check, status, parts of its fix in order)
BROKEN: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # 1: the driver is dead
    "ubuntu2204-nouveau": ("driver", "fail", ("blacklist nouveau", "update-initramfs -u", "ubuntu-drivers install", "reboot")),
    "rocky9-nouveau": ("driver", "fail", ("blacklist nouveau", "dracut --force", "dnf module install nvidia-driver:latest-dkms", "reboot")),
    "ubuntu2204-secure-boot": ("driver", "fail", ("ubuntu-drivers install", "mokutil --import /var/lib/shim-signed/mok/MOK.der", "reboot")),
    "rocky9-secure-boot": ("driver", "fail", ("dnf module install", "mokutil --import /var/lib/dkms/mok.pub", "reboot")),
    "ubuntu2204-no-module": ("driver", "fail", ("linux-headers-$(uname -r)", "ubuntu-drivers install", "reboot")),
    "rocky9-no-module": ("driver", "fail", ("cuda-rhel9.repo", "dnf module install", "reboot")),
    "ubuntu2204-no-driver": ("driver", "fail", ("ubuntu-drivers install", "reboot")),
    "rocky9-no-driver": ("driver", "fail", ("dnf module install", "reboot")),
    # 2: the library was upgraded under the driver
    "ubuntu2204-library-mismatch": ("driver-library", "fail", ("reboot", "apt-mark hold")),
    "rocky9-library-mismatch": ("driver-library", "fail", ("reboot", "dnf versionlock add")),
    # 3: the driver is older than the CUDA of an image
    "ubuntu2204-old-driver": ("driver-cuda", "fail", ("ubuntu-drivers install", "reboot", "tunesmith image build")),
    "rocky9-old-driver": ("driver-cuda", "fail", ("dnf module install", "reboot", "tunesmith image build")),
    "ubuntu2204-newer-minor": ("driver-cuda", "warn", ("ubuntu-drivers install", "NVIDIA_DISABLE_REQUIRE=true")),
    "rocky9-newer-minor": ("driver-cuda", "warn", ("dnf module install", "NVIDIA_DISABLE_REQUIRE=true")),
    "ubuntu2204-unsatisfied-cuda": ("driver-cuda", "fail", ("ubuntu-drivers install", "reboot")),
    "rocky9-unsatisfied-cuda": ("driver-cuda", "fail", ("dnf module install", "reboot")),
    "ubuntu2204-error-804": ("driver-cuda", "fail", ("ubuntu-drivers install", "reboot")),
    "rocky9-error-804": ("driver-cuda", "fail", ("dnf module install", "reboot")),
    "ubuntu2204-compat-geforce": ("driver-cuda", "fail", ("ubuntu-drivers install", "reboot")),
    # 4: docker cannot hand out GPUs
    "ubuntu2204-no-toolkit": ("docker-gpu", "fail", ("nvidia.github.io/libnvidia-container/gpgkey", "apt-get install", "nvidia-container-toolkit=1.20.0-1", "nvidia-ctk runtime configure --runtime=docker", "systemctl restart docker")),
    "rocky9-no-toolkit": ("docker-gpu", "fail", ("stable/rpm/nvidia-container-toolkit.repo", "dnf install", "nvidia-container-toolkit-1.20.0-1", "nvidia-ctk runtime configure --runtime=docker", "systemctl restart docker")),
    "centos7-no-toolkit": ("docker-gpu", "fail", ("no longer lists", "vault.centos.org", "yum install", "-1.17.8-1", "systemctl restart docker")),
    "ubuntu2004-no-toolkit": ("docker-gpu", "fail", ("no longer lists", "apt-get install", "=1.19.1-1", "systemctl restart docker")),
    "ubuntu2204-toolkit-newer": ("docker-gpu", "fail", ("docker stop tunesmith-lab-1", "systemctl restart docker")),
    "rocky9-toolkit-newer": ("docker-gpu", "fail", ("docker stop tunesmith-lab-1", "systemctl restart docker")),
    # 5: docker is a snap
    "ubuntu2204-snap-docker": ("docker-snap", "fail", ("cp -a /var/snap/docker/common/var-lib-docker", "snap remove docker", "docker-ce")),
    # 6: GPUs vanish from containers
    "ubuntu2204-systemd-cgroup": ("docker-cgroup", "warn", ("--enable-cdi", "systemctl restart docker", "--device nvidia.com/gpu=all", "native.cgroupdriver=cgroupfs")),
    "rocky9-systemd-cgroup": ("docker-cgroup", "warn", ("--enable-cdi", "systemctl restart docker", "--device nvidia.com/gpu=all", "native.cgroupdriver=cgroupfs")),
    "ubuntu2204-gpu-lost": ("docker-cgroup", "warn", ("--device nvidia.com/gpu=all",)),
    "rocky9-gpu-lost": ("docker-cgroup", "warn", ("--device nvidia.com/gpu=all",)),
    # 7: shared memory
    "ubuntu2204-small-shm": ("docker-shm", "warn", ("--shm-size=16g", "--ipc=host")),
    "rocky9-small-shm": ("docker-shm", "warn", ("--shm-size=16g", "--ipc=host")),
    "ubuntu2204-bus-error": ("docker-shm", "warn", ("--shm-size=16g", "--ipc=host")),
    "rocky9-bus-error": ("docker-shm", "warn", ("--shm-size=16g", "--ipc=host")),
    # 8: docker is old
    "ubuntu2204-old-docker": ("docker-version", "fail", ("download.docker.com/linux/ubuntu", "apt-get install", "docker-ce", "systemctl restart docker")),
    "rocky9-old-docker": ("docker-version", "fail", ("docker-ce.repo", "dnf install", "docker-ce", "systemctl restart docker")),
    "ubuntu2204-no-thread": ("docker-version", "fail", ("docker-ce",)),
    "rocky9-no-thread": ("docker-version", "fail", ("docker-ce",)),
    # 9: extensions that do not fit
    "ubuntu2204-flash-attn": ("abi", "fail", ("pip uninstall -y flash-attn", "--no-build-isolation")),
    "rocky9-flash-attn": ("abi", "fail", ("pip uninstall -y flash-attn", "--no-build-isolation")),
    # 10: root's files
    "ubuntu2204-root-files": ("ownership", "warn", ("chown -R", "--user $(id -u):$(id -g)")),
    "rocky9-root-files": ("ownership", "warn", ("chown -R", "--user $(id -u):$(id -g)")),
    # 11: SELinux
    "rocky9-selinux": ("selinux", "warn", (":Z", "label=disable")),
    "rocky9-selinux-mount": ("selinux", "warn", (":Z", "label=disable")),
    # 12: network of docker
    "ubuntu2204-proxy": ("docker-network", "warn", ("docker stop tunesmith-lab-1", "http-proxy.conf", "systemctl daemon-reload", "systemctl restart docker")),
    "rocky9-proxy": ("docker-network", "warn", ("docker stop tunesmith-lab-1", "http-proxy.conf", "systemctl daemon-reload", "systemctl restart docker")),
    "ubuntu2204-pull-timeout": ("docker-network", "warn", ("http-proxy.conf", "systemctl daemon-reload", "systemctl restart docker")),
    "rocky9-pull-timeout": ("docker-network", "warn", ("http-proxy.conf", "systemctl daemon-reload", "systemctl restart docker")),
    # 13: hub mirror
    "ubuntu2204-xet": ("hub-mirror", "warn", ("export HF_HUB_DISABLE_XET=1",)),
    "rocky9-xet": ("hub-mirror", "warn", ("export HF_HUB_DISABLE_XET=1",)),
    # 14: package sources
    "ubuntu2204-signed-by": ("package-sources", "fail", ("grep -l nvidia.github.io", "rm --", "apt-get update")),
    "centos8-mirrorlist": ("package-sources", "fail", ("vault.centos.org", "dnf makecache")),
    "centos7-mirrorlist": ("package-sources", "fail", ("vault.centos.org", "yum makecache")),
    "ubuntu2204-offline": ("package-sources", "fail", ("dpkg -i libnvidia-container1_1.20.0-1_amd64.deb libnvidia-container-tools_1.20.0-1_amd64.deb nvidia-container-toolkit-base_1.20.0-1_amd64.deb nvidia-container-toolkit_1.20.0-1_amd64.deb", "nvidia-ctk runtime configure")),
    "rocky9-offline": ("package-sources", "fail", ("rpm -ivh libnvidia-container1-1.20.0-1.x86_64.rpm libnvidia-container-tools-1.20.0-1.x86_64.rpm nvidia-container-toolkit-base-1.20.0-1.x86_64.rpm nvidia-container-toolkit-1.20.0-1.x86_64.rpm", "nvidia-ctk runtime configure")),
    # policy
    "ubuntu2204-open-notebook": ("jupyter-token", "fail", ("tunesmith lab", "--ip=127.0.0.1")),
    "rocky9-open-notebook": ("jupyter-token", "fail", ("tunesmith lab", "--ip=127.0.0.1")),
    "ubuntu2204-committed-image": ("image-recipe", "warn", ("docker history", "tunesmith image build")),
    "rocky9-committed-image": ("image-recipe", "warn", ("docker history", "tunesmith image build")),
    "ubuntu2204-full-disk": ("disk", "warn", ("docker system prune", "--data-root")),
    "rocky9-full-disk": ("disk", "warn", ("docker system prune", "--data-root")),
}  # fmt: skip
HEALTHY = ("ubuntu2204-3090-healthy", "rocky9-a100-healthy")
BARE = {
    "bare-ubuntu2204": ("apt-get install", "download.docker.com/linux/ubuntu jammy stable"),
    "bare-ubuntu2404": ("apt-get install", "download.docker.com/linux/ubuntu noble stable"),
    "bare-debian12": ("apt-get install", "download.docker.com/linux/debian bookworm stable"),
    "bare-rocky9": ("dnf install", "download.docker.com/linux/centos/9/"),
    "bare-centos8": ("dnf install", "vault.centos.org"),
    "bare-centos7": ("yum install", "vault.centos.org"),
}
WITHOUT_GPU = ("debian12-cpu-healthy", "debian12-no-gpu-no-docker")


def checks_of(name: str) -> dict[str, Check]:
    return {check.id: check for check in run_checks(load_facts(FACTS / f"{name}.json"))}


def in_order(parts: tuple[str, ...], fix: list[str]) -> None:
    text = "\n".join(fix)
    place = 0
    for part in parts:
        found = text.find(part, place)
        assert found >= 0, f"{part!r} is not (in this order) in:\n{text}"
        place = found


def test_every_recorded_host_is_judged_here() -> None:
    named = {*BROKEN, *HEALTHY, *BARE, *WITHOUT_GPU}
    assert named == {path.stem for path in FACTS.glob("*.json")}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_host_is_all_ok(name: str) -> None:
    checks = checks_of(name)
    assert list(checks) == IDS
    assert {c.id: c.found for c in checks.values() if c.status != "ok"} == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_host(name: str) -> None:
    ident, status, parts = BROKEN[name]
    checks = checks_of(name)
    assert list(checks) == IDS
    check = checks[ident]
    assert check.status == status, check
    assert check.found and check.why
    in_order(parts, check.fix)
    others = {c.id: c.status for c in checks.values() if c.status != "ok" and c.id != ident}
    expected = dict.fromkeys(NEED_DRIVER, "skip") if ident == "driver" else {}
    if ident == "driver-library":
        expected = {"driver": "skip", "docker-gpu": "skip", "docker-cgroup": "skip"}
    assert others == expected


@pytest.mark.parametrize("name", BROKEN)
def test_fixes_are_those_of_the_distribution(name: str) -> None:
    text = "\n".join(line for check in checks_of(name).values() for line in check.fix)
    foreign = {"ubuntu": ("dnf ", "yum ", "rpm "), "rocky": ("apt", "dpkg", "yum install", "ubuntu"),
               "centos8": ("apt-", "dpkg", "yum install"), "centos7": ("apt-", "dpkg", "dnf ")}  # fmt: skip
    for start, words in foreign.items():
        if name.startswith(start):
            assert not [word for word in words if word in text], text


@pytest.mark.parametrize("name", BARE)
def test_a_bare_host_lacks_docker_and_says_so_once(name: str) -> None:
    checks = checks_of(name)
    assert checks["docker"].status == "fail"
    in_order(("docker-ce",), checks["docker"].fix)
    assert all(part in "\n".join(checks["docker"].fix) for part in BARE[name])
    assert {c.id for c in checks.values() if c.status == "skip"} == set(NEED_DOCKER)
    failed = {c.id for c in checks.values() if c.status == "fail"}
    gone = {"package-sources"} if "centos" in name else set()
    assert failed == {"docker"} | gone


@pytest.mark.parametrize("name", WITHOUT_GPU)
def test_a_host_without_gpu_says_so_once_and_serves_the_cpu(name: str) -> None:
    checks = checks_of(name)
    assert [c.id for c in checks.values() if "no NVIDIA GPU" in c.found] == ["driver"]
    assert checks["driver"].status == "warn" and "CPU" in checks["driver"].why and not checks["driver"].fix
    assert {checks[ident].status for ident in NEED_DRIVER} == {"skip"}
    failed = [c.id for c in checks.values() if c.status == "fail"]
    assert failed == ([] if name.endswith("healthy") else ["docker"])


def test_nothing_known_is_no_error() -> None:
    checks = run_checks(Facts())
    assert [check.id for check in checks] == IDS
    assert {c.id for c in checks if c.status == "fail"} == {"docker"}


UBUNTU = {"/etc/os-release": "ID=ubuntu\nVERSION_ID=22.04\nVERSION_CODENAME=jammy\n"}
SMI = "nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader"
RTX = Answer(0, "NVIDIA GeForce RTX 3090, 550.54.14, 8.6, 24576 MiB\n")
SERVER = "docker version -f '{{.Server.Version}}'"
HOOKS = "command -v nvidia-container-runtime-hook nvidia-cdi-hook"


def judge(ident: str, commands: dict[str, Answer], files: dict[str, str] | None = None, **env: str) -> Check:
    """The verdict on a host of which little is recorded."""
    facts = Facts(commands, UBUNTU | (files or {}), env)
    return next(check for check in run_checks(facts) if check.id == ident)


@pytest.mark.parametrize(
    ("ident", "status", "commands"),
    [
        ("driver", "fail", {SMI: Answer(9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")}),
        ("driver", "fail", {"lspci | grep -i nvidia": Answer(0, "01:00.0 VGA compatible controller: NVIDIA Corporation GA102\n")}),
        ("driver", "fail", {"lsmod": Answer(0, "Module  Size\nnouveau  2306048  4\n")}),
        ("driver", "fail", {SMI: Answer(124, "", "timed out")}),
        ("driver", "fail", {SMI: Answer(6, "No devices were found\n")}),
        ("driver", "fail", {SMI: Answer(0, "No devices were found\n"), "nvidia-smi": Answer(0, "No devices were found\n")}),
        ("driver", "ok", {"nvidia-smi": Answer(0, "| NVIDIA-SMI 550.54.14  Driver Version: 550.54.14  CUDA Version: 12.4 |\n")}),
        ("driver", "ok", {SMI: Answer(0, "WARNING: infoROM is corrupted\nTesla T4, 535.183.01, 7.5, 15360 MiB\n")}),
        ("driver", "warn", {"lspci": Answer(0, "01:00.1 Audio device: NVIDIA Corporation\n")}),
        ("driver-library", "fail", {"nvidia-smi -L": Answer(18, "Failed to initialize NVML: Driver/library version mismatch\n")}),
        ("driver-cuda", "fail", {SMI: Answer(0, "Tesla T4, 520.61.05, 7.5, 15360 MiB\n"), "docker image inspect -f '{{json .Config.Env}}' IMG": Answer(0, '["CUDA_VERSION=12.1.1"]')}),
        ("driver-cuda", "fail", {SMI: RTX, "docker image inspect --format='{{json .Config.Env}}' a/b:c": Answer(0, '["CUDA_VERSION=13.0.1"]')}),
        ("driver-cuda", "warn", {SMI: RTX, 'docker image inspect -f "{{json .Config.Env}}" IMG': Answer(0, '["CUDA_VERSION=12.6.0"]')}),
        ("driver-cuda", "ok", {SMI: RTX, "docker image inspect -f '{{json .Config.Env}}' IMG": Answer(0, '["CUDA_VERSION=12.4.0"]')}),
        ("driver-cuda", "fail", {SMI: RTX, "docker logs C": Answer(0, "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.6\n")}),
        ("docker", "fail", {SERVER: Answer(1, "", "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")}),
        ("docker", "fail", {SERVER: Answer(1, "", "permission denied while trying to connect to the Docker daemon socket")}),
        ("docker", "fail", {SERVER: Answer(124, "", "no answer")}),
        ("docker", "fail", {SERVER: Answer(0, "4.9.4\n", "Emulate Docker CLI using podman. Create /etc/containers/nodocker to quiet msg.\n")}),
        ("docker-gpu", "fail", {SMI: RTX, SERVER: Answer(0, "24.0.7\n"), HOOKS: Answer(127)}),
        ("docker-gpu", "ok", {SMI: RTX, SERVER: Answer(0, "24.0.7\n"), HOOKS: Answer(0, "/usr/bin/nvidia-container-runtime-hook\n")}),
        ("docker-gpu", "fail", {SMI: RTX, SERVER: Answer(0, "24.0.7\n"), HOOKS: Answer(0, "/usr/bin/nvidia-container-runtime-hook\n"),
            "systemctl show docker -p ActiveEnterTimestamp": Answer(0, "ActiveEnterTimestamp=Mon 2024-05-06 10:11:12 CST\n"),
            "stat -c %z /usr/bin/nvidia-container-runtime-hook": Answer(0, "2024-05-06 12:00:00.123456789 +0800\n")}),
        ("docker-gpu", "ok", {SMI: RTX, SERVER: Answer(0, "24.0.7\n"), HOOKS: Answer(0, "/usr/bin/nvidia-container-runtime-hook\n"),
            "systemctl show docker -p ActiveEnterTimestamp": Answer(0, "ActiveEnterTimestamp=Mon 2024-05-06 10:11:12 CST\n"),
            "stat /usr/bin/nvidia-container-runtime-hook": Answer(0, "Access: 2025-01-01 00:00:00.0 +0000\nModify: 2024-01-01 00:00:00.0 +0000\nChange: 2024-05-06 02:00:00.123456789 +0000\n")}),
        ("docker-gpu", "fail", {"docker run --gpus all x": Answer(125, "", 'could not select device driver "nvidia" with capabilities: [[gpu]]')}),
        ("driver", "warn", {SMI: Answer(9, "couldn't communicate with the NVIDIA driver"), "lspci": Answer(0, "00:02.0 VGA compatible controller: Cirrus Logic\n")}),
        # An image that brings libcuda for a CUDA which the driver has anyway breaks nothing.
        ("driver-cuda", "ok", {SMI: RTX, "docker image inspect -f '{{json .Config.Env}}' IMG": Answer(0, '["CUDA_VERSION=12.4.0"]'),
            "docker run --rm IMG ls /usr/local/cuda/compat": Answer(0, "libcuda.so.1\n")}),
        ("docker-shm", "ok", {"docker inspect -f '{{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}}' web": Answer(0, "67108864 private\n"),
            "docker inspect -f '{{json .HostConfig.DeviceRequests}} {{.HostConfig.Runtime}}' web": Answer(0, "null runc\n")}),
        ("image-recipe", "ok", {"docker image inspect -f '{{json .Config.Labels}}' IMG": Answer(0, '{"maintainer":"x"}\n'),
            "docker image inspect -f '{{json .RepoDigests}}' IMG": Answer(0, '["nvcr.io/x@sha256:00"]\n')}),
        ("docker-snap", "fail", {"docker info -f '{{.DockerRootDir}}'": Answer(0, "/var/snap/docker/common/var-lib-docker\n")}),
        ("docker-snap", "fail", {"snap list docker": Answer(0, "docker 24.0.5\n")}),
        ("docker-cgroup", "warn", {SMI: RTX, "docker info -f '{{.CgroupDriver}}'": Answer(0, "systemd\n")}),
        ("docker-cgroup", "ok", {SMI: RTX, "docker info -f '{{.CgroupDriver}}'": Answer(0, "cgroupfs\n")}),
        ("docker-cgroup", "ok", {SMI: RTX, "docker info -f '{{.CgroupDriver}}'": Answer(0, "systemd\n"), "nvidia-ctk cdi list": Answer(0, "nvidia.com/gpu=all\n")}),
        ("docker-shm", "warn", {"docker inspect -f '{{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}}' C": Answer(0, "67108864 private\n")}),
        ("docker-shm", "ok", {"docker inspect -f '{{.HostConfig.ShmSize}} {{.HostConfig.IpcMode}}' C": Answer(0, "67108864 host\n")}),
        ("docker-version", "fail", {SERVER: Answer(0, "20.10.9\n")}),
        ("docker-version", "ok", {SERVER: Answer(0, "20.10.10\n")}),
        ("docker-version", "fail", {SERVER: Answer(0, "20.10.24+dfsg1\n"), "docker logs C": Answer(0, "", "pthread_create failed: Operation not permitted")}),
        ("abi", "fail", {"docker logs C": Answer(0, "", "transformer_engine_torch.so: undefined symbol: _ZN2at4_ops5zeros4callE")}),
        ("ownership", "warn", {"find WORK -maxdepth 2 -uid 0 -print -quit": Answer(0, "WORK/runs\n")}),
        ("ownership", "ok", {"find WORK -maxdepth 2 -uid 0 -print -quit": Answer(0, "WORK/runs\n"), "id -u": Answer(0, "0\n")}),
        ("selinux", "ok", {"getenforce": Answer(0, "Permissive\n"), "docker run x": Answer(1, "", "Failed to initialize NVML: Insufficient Permissions")}),
        ("selinux", "warn", {"getenforce": Answer(0, "Enforcing\n"), "nvidia-smi": Answer(4, "Failed to initialize NVML: Insufficient Permissions")}),
        ("package-sources", "fail", {"apt-get update": Answer(100, "", "E: Could not connect to your.mirror:80, connection timed out. Network is unreachable")}),
        ("package-sources", "fail", {"dnf makecache": Answer(1, "", "Could not resolve host: mirrorlist.centos.org")}),
        ("package-sources", "fail", {"ip route": Answer(0, "")}),
        ("package-sources", "fail", {"ip route show default": Answer(0, "")}),
        ("package-sources", "fail", {"ip route get 1.1.1.1": Answer(2, "", "RTNETLINK answers: Network is unreachable")}),
        ("package-sources", "fail", {"curl -sSI https://nvidia.github.io": Answer(6, "", "curl: (6) Could not resolve host: nvidia.github.io")}),
        ("package-sources", "ok", {"curl -sSI https://huggingface.co": Answer(6, "", "curl: (6) Could not resolve host: huggingface.co")}),
        ("disk", "warn", {"df -h /var/lib/docker": Answer(0, "Filesystem Size Used Avail Use% Mounted on\n/dev/sda1 40G 30G 8.0G 80% /\n"), SMI: RTX}),
        ("disk", "ok", {"df -k /var/lib/docker": Answer(0, "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/sda1 976762584 1 900000000 1% /\n"), SMI: RTX}),
        ("cpu", "warn", {"lscpu": Answer(0, "CPU(s): 4\nFlags: fpu sse4_2\n")}),
        ("memory", "warn", {"free -b": Answer(0, "      total used free shared buff/cache available\nMem: 4000000000 1 2 3 4 3000000000\n")}),
        ("image-recipe", "warn", {"docker image inspect -f '{{json .Config.Labels}}' IMG": Answer(0, "null\n")}),
        ("image-recipe", "ok", {"docker image inspect -f '{{json .Config.Labels}}' IMG": Answer(0, '{"org.tunesmith.recipe":"a.yaml"}\n')}),
    ],
)  # fmt: skip
def test_sparse_facts(ident: str, status: str, commands: dict[str, Answer]) -> None:
    check = judge(ident, commands)
    assert check.status == status, check


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("fail", "jupyter-lab --ip=0.0.0.0 --ServerApp.token="),
        ("fail", "jupyter lab --NotebookApp.token='' --ip 0.0.0.0 --allow-root"),
        ("fail", "jupyter lab --ip=10.0.0.5 --IdentityProvider.token=''"),
        ("warn", "jupyter lab --ip=127.0.0.1 --ServerApp.token=''"),
        ("ok", "jupyter lab --ip=0.0.0.0 --ServerApp.token=abc"),
        ("ok", "jupyter lab --ip=0.0.0.0 --ServerApp.token='abc'"),
        (
            "ok",
            "jupyter lab --ip=0.0.0.0 --ServerApp.token= --PasswordIdentityProvider.hashed_password=argon2:x",
        ),
        ("ok", "jupyter lab --ip=0.0.0.0"),
    ],
)
def test_notebooks_by_their_command(status: str, text: str) -> None:
    assert judge("jupyter-token", {"ps -eo args": Answer(0, f"bash\n{text}\n")}).status == status


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("fail", "c.ServerApp.token = ''\nc.ServerApp.ip = '0.0.0.0'\n"),
        ("fail", 'c.NotebookApp.token = ""\nc.NotebookApp.ip = "*"\n'),
        ("warn", "c.ServerApp.token = ''\n"),
        ("ok", "# c.ServerApp.token = ''\n# c.ServerApp.ip = '0.0.0.0'\n"),
        ("ok", "c.ServerApp.token = 'abc'\nc.ServerApp.ip = '0.0.0.0'\n"),
    ],
)
def test_notebooks_by_their_configuration(status: str, text: str) -> None:
    assert judge("jupyter-token", {}, {"~/.jupyter/jupyter_server_config.py": text}).status == status


def test_a_notebook_in_the_network_of_the_host() -> None:
    inspect = "docker inspect -f '{{json .Config.Cmd}}' C"
    network = "docker inspect -f '{{.HostConfig.NetworkMode}}' C"
    command = Answer(0, '["bash","-c","jupyter lab --ServerApp.token=\'\'"]\n')
    assert judge("jupyter-token", {inspect: command, network: Answer(0, "host\n")}).status == "fail"
    assert judge("jupyter-token", {inspect: command, network: Answer(0, "bridge\n")}).status == "warn"


def test_the_proxy_of_the_shell_and_its_password() -> None:
    commands = {
        SERVER: Answer(0, "27.0.1\n"),
        "systemctl show docker -p Environment": Answer(0, "Environment=\n"),
    }
    check = judge("docker-network", commands, https_proxy="http://me:s3cret@10.0.0.9:3128")
    assert check.status == "warn"
    assert "s3cret" not in str(check) and "http://***@10.0.0.9:3128" in "\n".join(check.fix)
    known = commands | {
        "systemctl show docker -p Environment": Answer(0, "Environment=HTTPS_PROXY=http://p:1\n")
    }
    assert judge("docker-network", known, https_proxy="http://p:1").status == "ok"


@pytest.mark.parametrize("proxy", ["http://[::1", "%%%", "10.0.0.9:3128", "me:s3cret@10.0.0.9:3128"])
def test_a_proxy_of_any_shape(proxy: str) -> None:
    check = judge("docker-network", {SERVER: Answer(0, "27.0.1\n")}, HTTPS_PROXY=proxy)
    assert check.status == "warn" and "s3cret" not in str(check)


def test_the_proxy_fix_says_what_it_does_to_gpus() -> None:
    check = checks_of("ubuntu2204-proxy")["docker-network"]
    assert "GPUs" in check.why and "docker-cgroup" in check.why
    ids = IDS.index("docker-cgroup"), IDS.index("docker-network")
    assert ids[0] < ids[1]


@pytest.mark.parametrize(
    ("status", "env", "commands"),
    [
        ("ok", {}, {"python3 -c 'import hf_xet'": Answer(0)}),
        ("ok", {"HF_ENDPOINT": "https://hf-mirror.com"}, {}),
        ("ok", {"HF_ENDPOINT": "https://hf-mirror.com", "HF_HUB_DISABLE_XET": "1"}, {"python3 -c 'import hf_xet'": Answer(0)}),
        ("ok", {"HF_ENDPOINT": "https://hf-mirror.com"}, {"python3 -c 'import hf_xet'": Answer(0), "curl https://cas-server.xethub.hf.co": Answer(0)}),
        ("warn", {"HF_ENDPOINT": "https://hf-mirror.com"}, {"python3 -c 'import hf_xet'": Answer(0)}),
        ("warn", {"HF_ENDPOINT": "https://hf-mirror.com"}, {"pip show hf_xet": Answer(0), "getent hosts cas-server.xethub.hf.co": Answer(2)}),
    ],
)  # fmt: skip
def test_the_hub_mirror(status: str, env: dict[str, str], commands: dict[str, Answer]) -> None:
    assert judge("hub-mirror", commands, **env).status == status


def test_what_nvidia_has_dropped_is_said() -> None:
    for name, ident in (("bare-centos7", "docker"), ("centos7-no-toolkit", "docker-gpu")):
        why = checks_of(name)[ident].why
        assert "no longer lists CentOS Linux 7" in why and "1.17.8-1" in why
    assert "no longer lists" in checks_of("centos7-mirrorlist")["docker-gpu"].found
    assert "no longer lists" not in str(checks_of("bare-rocky9"))


def test_an_offline_host_that_has_everything_is_well(tmp_path: Path) -> None:
    facts = load_facts(FACTS / "ubuntu2204-3090-healthy.json")
    offline = Facts(
        facts.commands | {"ip route": Answer(0, "10.0.0.0/24 dev eno1\n")}, facts.files, facts.env
    )
    assert [c.id for c in run_checks(offline) if c.status != "ok"] == []

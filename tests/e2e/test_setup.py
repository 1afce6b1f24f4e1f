"""tunesmith setup for real: docker installed and configured in a Debian root, over ssh, and without network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests import imports
from tests.conftest import Cli
from tests.docker_daemon import cache_folder, daemon_of, skip_or_fail

DAEMON = {
    "bridge": "none",
    "iptables": False,
    "ip6tables": False,
    "log-level": "warn",
    "storage-driver": "vfs",
}
WANTED = ("--user", "ada", "--data-root", "/data/docker", "--registry-mirror", "https://your.mirror")
# In a mount namespace of its own: when dockerd ends, the mounts are gone with it.
START = """
mount --make-rprivate / && mount -t proc proc "$1/proc" && mount --rbind /sys "$1/sys" \
&& mount --rbind /dev "$1/dev" && exec chroot "$1" dockerd
"""


def run(*args: str | Path) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def missing() -> str | None:
    """Why there can be no Debian root here; None when there can."""
    if os.geteuid() != 0:
        return "a root file system needs root"
    if not re.search(r"(?m)^ID=debian$", Path("/etc/os-release").read_text()):
        return "the machine is not Debian"
    if shutil.which("debootstrap") is None:
        return "debootstrap is not installed"
    return None


def apt_mirror(codename: str) -> str:
    """The mirror that this machine's own apt uses for its main suite."""
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for part in path.read_text().split("\n\n"):
            suites, uris = re.search(r"(?m)^Suites:(.*)", part), re.search(r"(?m)^URIs:\s*(\S+)", part)
            if suites and uris and codename in suites[1].split():
                return uris[1]
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))):
        text = path.read_text() if path.is_file() else ""
        line = re.search(rf"(?m)^deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+{codename}\s", text)
        if line:
            return line[1]
    pytest.skip(f"apt has no source of {codename}")


def base_tar() -> Path:
    """A minimal Debian, made once and kept between test runs."""
    found = re.search(r"(?m)^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    assert found
    tar = cache_folder() / f"debian-{found[1]}-minbase-1.tar"
    with FileLock(f"{tar}.lock"):
        if not tar.is_file():
            root = tar.with_suffix(".root")
            run("rm", "-rf", "--one-file-system", root)
            run("debootstrap", "--variant=minbase", found[1], root, apt_mirror(found[1]))
            run("tar", "-C", root, "-cf", f"{tar}.part", ".")
            run("rm", "-rf", "--one-file-system", root)
            Path(f"{tar}.part").rename(tar)
    return tar


def make_root(folder: Path) -> Path:
    """A bare Debian with a user ada, and a daemon.json that lets dockerd run inside a container."""
    folder.mkdir(parents=True)
    run("tar", "-C", folder, "-xf", base_tar())
    shutil.copy("/etc/resolv.conf", folder / "etc/resolv.conf")
    for path in Path("/etc/apt/apt.conf.d").glob("*proxy*"):
        shutil.copy(path, folder / "etc/apt/apt.conf.d")
    policy = folder / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")  # packages start nothing while they are installed
    policy.chmod(0o755)
    quick = "force-unsafe-io\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\n"
    (folder / "etc/dpkg/dpkg.cfg.d/quick").write_text(quick)  # no fsync after every file
    run("chroot", folder, "useradd", "-m", "ada")
    (folder / "etc/docker").mkdir()
    (folder / "etc/docker/daemon.json").write_text(json.dumps(DAEMON))
    return folder


def remove_root(folder: Path) -> None:
    """Never through a mount: what is mounted there belongs to this machine."""
    assert f" {folder}/" not in Path("/proc/self/mountinfo").read_text()
    run("rm", "-rf", "--one-file-system", folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    skip_or_fail(missing())
    folder = make_root(tmp_path_factory.mktemp("setup") / "root")
    yield folder
    remove_root(folder)


@pytest.mark.docker
def test_docker_is_installed_and_configured_and_a_second_run_has_nothing_to_do(cli: Cli, root: Path) -> None:
    target = ("--target", f"@chroot/{root}", *WANTED)
    assert not (root / "usr/sbin/dockerd").exists()
    asked = cli("setup", *target)
    assert asked.returncode == 2 and "--yes" in asked.stderr
    assert not (root / "usr/sbin/dockerd").exists()

    done = cli("setup", *target, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)["hosts"]
    assert found["applied"] == ["docker", "docker-config", "docker-group"]
    assert found["failed"] is None and found["left"] == []
    assert (root / "usr/sbin/dockerd").exists()
    assert run("chroot", root, "dpkg-query", "-W", "-f", "${Status}", "docker.io") == "install ok installed"
    settings = json.loads((root / "etc/docker/daemon.json").read_text())
    wanted = {"data-root": "/data/docker", "registry-mirrors": ["https://your.mirror"]}
    assert settings == {**DAEMON, **wanted}
    assert json.loads((root / "etc/docker/daemon.json.before-tunesmith").read_text()) == DAEMON
    assert "docker" in run("chroot", root, "id", "-nG", "ada").split()
    [change] = [c for c in found["changed"] if c["id"] == "docker"]
    assert change["before"]["found"] == "docker is not installed"

    again = cli("setup", *target)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert run("chroot", root, "sh", "-c", "ls /etc/docker").split() == [
        "daemon.json",
        "daemon.json.before-tunesmith",
    ]


@pytest.mark.docker
def test_the_dockerd_that_was_installed_runs_with_these_settings(
    cli: Cli, root: Path, tmp_path: Path
) -> None:
    command = ["unshare", "-m", "sh", "-c", START, "sh", str(root)]
    with daemon_of(command, tmp_path / "log", ["chroot", str(root), "docker", "version"]) as daemon:
        assert daemon, (tmp_path / "log").read_text()[-2000:]
        info = run(
            "chroot", root, "docker", "info", "-f", "{{.DockerRootDir}} {{json .RegistryConfig.Mirrors}}"
        )
        assert info.strip() == '/data/docker ["https://your.mirror/"]'
        found = cli.json("setup", "--target", f"@chroot/{root}", *WANTED, "--dry-run")
        assert found["hosts"][0]["steps"] == []  # type: ignore[index]


@pytest.mark.docker
def test_a_failed_step_says_what_was_done_and_how_to_go_on(cli: Cli, root: Path) -> None:
    options = (
        "--target",
        f"@chroot/{root}",
        "--user",
        "nobody-here",
        "--registry-mirror",
        "https://other.mirror",
    )
    done = cli("setup", *options, "--yes", "--json")
    assert done.returncode == 1
    [found] = json.loads(done.stdout)["hosts"]
    assert found["applied"] == ["docker-config"]
    assert found["failed"]["step"] == "docker-group"
    assert found["failed"]["command"] == ["usermod", "-aG", "docker", "nobody-here"]
    assert "does not exist" in found["failed"]["output"]
    assert "done:    docker-config" in done.stderr and "run the same setup again" in done.stderr
    mended = cli("setup", *options[:2], "--user", "ada", *options[4:])
    assert mended.returncode == 0 and "nothing to do" in mended.stdout
    kept = json.loads((root / "etc/docker/daemon.json").read_text())["registry-mirrors"]
    assert kept == ["https://other.mirror", "https://your.mirror"]


# Only docker-compose of Debian 12 needs them; without, the test takes half the time.
PYTHON = re.compile(r"(lib)?python3|docker-compose|media-types|tzdata")


def brought(root: Path, bare: Path) -> list[Path]:
    """The package files that apt brought for docker, in the order in which it unpacked them."""
    there = set(run("chroot", bare, "dpkg-query", "-W", "-f", "${Package}\n").split())
    log = (root / "var/log/dpkg.log").read_text()
    names = [name for name in re.findall(r"(?m) install ([^:]+):", log) if name not in there]
    files = [next((root / "var/cache/apt/archives").glob(f"{name}_*.deb")) for name in names]
    return [path for path in files if not PYTHON.match(path.name)]


@pytest.mark.docker
def test_from_a_bundle_with_the_network_cut(root: Path, tmp_path: Path) -> None:
    """The packages that apt brought for the first root install docker on a second one without network."""
    bare = make_root(tmp_path / "bare")
    try:
        packages = brought(root, bare)
        assert any(path.name.startswith("docker.io_") for path in packages)
        version = re.search(r'(?m)^VERSION_ID="(.*)"', Path("/etc/os-release").read_text())
        assert version
        place = tmp_path / "bundle" / "packages" / f"debian-{version[1]}"
        place.mkdir(parents=True)
        for path in packages:
            shutil.copy(path, place)
        (place / "order.txt").write_text("".join(f"{path.name}\n" for path in packages))
        command = [sys.executable, "-m", "tunesmith", "setup", "--target", f"@chroot/{bare}", "--user", "ada"]
        options = ["--bundle", str(tmp_path / "bundle"), "--yes", "--json"]
        done = subprocess.run(["unshare", "-n", *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["hosts"][0]["applied"] == ["docker", "docker-group"]
        assert (
            run("chroot", bare, "dpkg-query", "-W", "-f", "${Status}", "docker.io") == "install ok installed"
        )
        assert not (bare / "var/tmp/tunesmith-packages").exists()
    finally:
        remove_root(bare)


def test_over_ssh_the_plan_is_that_of_the_host_itself(
    cli: Cli, ssh_server: tuple[str, Path], tmp_path: Path
) -> None:
    target, key = ssh_server
    home = {"HOME": str(tmp_path), "SSH_AUTH_SOCK": ""}
    options = ("--user", "ada", "--no-toolkit", "--dry-run", "--json")
    remote = cli("setup", "--target", target, "--ssh-key", key, *options, env=home)
    assert remote.returncode == 0, remote.stderr
    local = cli.json("setup", *options[:-1])
    [there], [here] = json.loads(remote.stdout)["hosts"], local["hosts"]  # type: ignore[misc]
    assert there["host"] == target
    assert (there["distro"], [s["id"] for s in there["steps"]]) == (
        here["distro"],
        [s["id"] for s in here["steps"]],
    )


def test_a_host_that_cannot_be_reached_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    done = cli("setup", "--target", "ada@127.0.0.1:1", "--dry-run", env={"HOME": str(tmp_path)})
    assert done.returncode == 1
    assert "ada@127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr


def test_of_several_hosts_one_that_fails_does_not_hide_the_others(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").write_text("hosts:\n  - {host: 127.0.0.1, user: ada, port: 1}\n")
    options = ("--inventory", tmp_path / "hosts.yaml", "--target", "@local", "--dry-run", "--json")
    done = cli("setup", *options, env={"HOME": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    there, here = sorted(json.loads(done.stdout)["hosts"], key=lambda host: host["error"] is None)
    assert there["host"] == "ada@127.0.0.1:1" and there["error"] and there["steps"] == []
    assert here["host"] == "@local" and here["distro"] and here["error"] is None


BARE = {
    "commands": {
        "nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader": {
            "rc": 0, "stdout": "NVIDIA GeForce RTX 3090, 550.54.14, 8.6, 24576 MiB\n", "stderr": "",
        }
    },
    "files": {"/etc/os-release": 'ID=ubuntu\nVERSION_ID="22.04"\nVERSION_CODENAME=jammy\n'},
    "env": {"SUDO_USER": "ada"},
}  # fmt: skip


def test_recorded_facts_are_planned_for_and_exported(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(BARE))
    shown = cli(
        "setup", "--dry-run", "--facts", tmp_path / "facts.json", "--proxy", "http://a:hunter2@10.0.0.1:3128"
    )
    assert shown.returncode == 0, shown.stderr
    assert "nvidia-container-toolkit=1.20.0-1" in shown.stdout and "hunter2" not in shown.stdout
    script = tmp_path / "setup.sh"
    found = cli.json("setup", "--facts", tmp_path / "facts.json", "--script", script)
    assert found["hosts"][0]["steps"][-1]["commands"] == [["systemctl", "restart", "docker"]]  # type: ignore[index]
    assert "usermod -aG docker ada" in script.read_text() and script.stat().st_mode & 0o111
    secret = ("--proxy", "http://a:hunter2@10.0.0.1:3128", "--script", script)
    assert "hunter2" not in json.dumps(cli.json("setup", "--facts", tmp_path / "facts.json", *secret))
    assert "hunter2" in script.read_text() and script.stat().st_mode & 0o777 == 0o700
    refused = cli("setup", "--facts", tmp_path / "facts.json", "--yes")
    assert refused.returncode == 2 and "--dry-run" in refused.stderr


def test_bad_input_is_one_clear_error(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").write_text("hosts: {}")
    for args, fault in (
        (["--target", "a b"], "is not a host"),
        (["--inventory", tmp_path / "hosts.yaml"], "no list of hosts"),
        (["--inventory", tmp_path / "none.yaml"], "No such file"),
        (["--data-root", "data"], "full path"),
        (["--facts", tmp_path / "none.json"], "No such file"),
        (["--bundle", tmp_path / "none"], "there is no such folder"),
    ):
        done = cli("setup", "--dry-run", *args)
        assert done.returncode in (1, 2) and fault in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )


def test_pyinfra_is_loaded_only_to_apply(tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(BARE))
    heavy = {"pyinfra", "gevent", "paramiko", "torch", "transformers", "httpx", "numpy"}
    imports.without(heavy, "setup", "--dry-run", "--facts", str(tmp_path / "facts.json"))

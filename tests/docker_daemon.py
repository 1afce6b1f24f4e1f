"""A real docker daemon for the tests, and images for it made from Debian packages.

Fixtures (tests/conftest.py imports them, so any test may ask for them):

docker_host     the DOCKER_HOST of a daemon of its own, one for each test process; nothing of the machine's
                own docker is seen or changed
use_docker      sets DOCKER_HOST for one test, and removes its containers at the end; yields the same string
busybox_image   name of an image with busybox as shell and commands
python_image    name of an image with Python 3.11+ (venv, pip), bash, useradd: a base to build on

The daemon has no bridge network: containers run with `--network=host`, builds with `--network host`.
It needs root and dockerd (the package docker.io): without them its tests are skipped, or fail where
TUNESMITH_REQUIRE_DOCKER is set. TUNESMITH_TEST_CACHE names the folder where the Python image is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
BUSYBOX = "tunesmith-test/busybox:1"
PYTHON = "tunesmith-test/python:1"
PYTHON_TAR = "python-root-2.tar"
PYTHON_PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "libgomp1", "libstdc++6",
    "passwd", "procps", "python3-pip", "python3-venv", "sed", "tar",
)  # fmt: skip
MEMORY_FOR_TMPFS = 6 << 30
APPLETS = ("sh", "cat", "echo", "env", "id", "ls", "mkdir", "sleep", "stat", "touch", "true")


def _run(*args: str | Path, **options: object) -> str:
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{args}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return str(done.stdout)


def missing() -> str | None:
    """Why no daemon can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a docker daemon needs root"
    lacking = [name for name in ("dockerd", "docker") if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)} (Debian: apt-get install docker.io)" if lacking else None


def _command(root: Path, driver: str | None) -> list[str]:
    return [
        "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none",
        "--data-root", str(root / "data"), "--exec-root", str(root / "exec"), "--pidfile", str(root / "pid"),
        "--config-file", str(root / "daemon.json"), "-H", f"unix://{root / 's'}",
        *(["--storage-driver", driver] if driver else []),
    ]  # fmt: skip


def skip_or_fail(reason: str | None) -> None:
    if reason and os.environ.get("TUNESMITH_REQUIRE_DOCKER"):
        pytest.fail(f"TUNESMITH_REQUIRE_DOCKER is set, but {reason}")
    if reason:
        pytest.skip(reason)


def _started(
    command: list[str], log: Path, ask: list[str], timeout_s: float
) -> subprocess.Popen[bytes] | None:
    with log.open("ab") as out:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and daemon.poll() is None:
        if subprocess.run(ask, capture_output=True).returncode == 0:
            return daemon
        time.sleep(0.1)
    _stop(daemon)
    return None


@contextmanager
def daemon_of(
    command: list[str], log: Path, ask: list[str], *, timeout_s: float = 60
) -> Iterator[subprocess.Popen[bytes] | None]:
    """A dockerd that `command` starts, once the command `ask` has an answer; ended at the end of the block.

    None when it ended, or has no answer within `timeout_s`. Its output goes to `log`.
    """
    daemon = _started(command, log, ask, timeout_s)
    try:
        yield daemon
    finally:
        if daemon:
            _stop(daemon)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    """End the daemon and what it started (its containerd and shims are in its session's group)."""
    if daemon.poll() is None:
        daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()


def _unmount(root: Path) -> None:
    """Unmount the folder and all that is mounted below it."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if f"{m}/".startswith(f"{root}/")), reverse=True):
        subprocess.run(["umount", "-l", mount], capture_output=True)


def _in_memory(root: Path) -> None:
    """Put the daemon's data into memory where there is plenty: images are written much faster."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if int(fields["MemAvailable"].split()[0]) * 1024 >= 2 * MEMORY_FOR_TMPFS:
        options = f"size={MEMORY_FOR_TMPFS},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root)], capture_output=True)


def remove_containers(host: str) -> None:
    found = _run("docker", "-H", host, "ps", "-aq").split()
    if found:
        _run("docker", "-H", host, "rm", "-f", "-v", *found)


@pytest.fixture(scope="session")
def docker_host() -> Iterator[str]:
    """DOCKER_HOST of a daemon that only this test process uses."""
    skip_or_fail(missing())
    # The path of a unix socket has at most 107 characters, which pytest's own folders may exceed.
    root = Path(tempfile.mkdtemp(prefix="tsd-", dir="/tmp"))
    _in_memory(root)
    (root / "daemon.json").write_text("{}")
    host, log = f"unix://{root / 's'}", root / "log"
    ask = ["docker", "-H", host, "version"]
    try:
        with ExitStack() as stack:
            daemons = (
                stack.enter_context(daemon_of(_command(root, driver), log, ask)) for driver in (None, "vfs")
            )
            assert any(daemons), f"dockerd did not start:\n{log.read_text(errors='replace')[-3000:]}"
            yield host
            remove_containers(host)
    finally:
        _unmount(root)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def use_docker(docker_host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """This test's docker commands reach the test daemon, with a docker configuration of their own."""
    monkeypatch.setenv("DOCKER_HOST", docker_host)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker-config"))
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    yield docker_host
    remove_containers(docker_host)


@pytest.fixture(scope="session")
def busybox_image(docker_host: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("bin", "tmp", "etc", "proc"):
            (root / folder).mkdir()
        busybox = shutil.which("busybox")
        assert busybox, "busybox is not installed (Debian: apt-get install busybox-static)"
        shutil.copy2(busybox, root / "bin" / "busybox")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")
        _import(docker_host, root, BUSYBOX)
    return BUSYBOX


@pytest.fixture(scope="session")
def python_image(docker_host: str) -> str:
    _run("docker", "-H", docker_host, "import", python_tar(), PYTHON)
    return PYTHON


def _import(host: str, root: Path, name: str) -> None:
    tar = subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE)
    _run("docker", "-H", host, "import", "-", name, stdin=tar.stdout)
    assert tar.wait() == 0


def cache_folder() -> Path:
    given = os.environ.get("TUNESMITH_TEST_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"tunesmith-test-cache-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def python_tar() -> Path:
    """A root file system with Python as a tar file: from this machine's apt sources, made once and kept."""
    tar = cache_folder() / PYTHON_TAR
    with FileLock(f"{tar}.lock"):
        if not tar.exists():
            with tempfile.TemporaryDirectory(dir=tar.parent) as folder:
                _make_python_root(Path(folder))
                made = Path(folder) / "made.tar"
                _run("tar", "-C", Path(folder) / "root", "-cf", made, ".")
                made.replace(tar)
    return tar


def python_version_in(host: str, image: str) -> str:
    """`3.11` of an image of this daemon."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    run = ["docker", "-H", host, "run", "--rm", "--network=host", image, "python3", "-c", code]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def wheels_for(python_version: str, *extras: str) -> Path:
    """Wheels of the base install, and of extras, for an image's Python, kept between test runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(n for e in extras for n in project["optional-dependencies"][e])]
    key = json.dumps([wanted, (ROOT / "constraints.txt").read_text(), python_version])
    folder = cache_folder() / f"wheels-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    other = python_version != f"{sys.version_info.major}.{sys.version_info.minor}"
    target = ["--python-version", python_version, "--platform", "manylinux_2_28_x86_64"] if other else []
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            subprocess.run(
                [
                    sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", *target,
                    "-c", ROOT / "constraints.txt", "-d", partial, *wanted,
                ],
                check=True,
            )  # fmt: skip
            partial.rename(folder)
    return folder


def _make_python_root(folder: Path) -> None:
    """Unpack the packages and all they depend on; their scripts are not run, which takes most of the time."""
    root = folder / "root"
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in _packages(folder):
        part = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
        _run("tar", "-x", "--keep-directory-symlink", "-C", root, stdin=part.stdout)
        assert part.wait() == 0, package
    for name in ("doc", "man", "locale", "info"):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    if not (root / "usr/bin/sh").exists():
        (root / "usr/bin/sh").symlink_to("dash")
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)


def _packages(folder: Path) -> list[Path]:
    """Download the packages into `folder` as for a machine that has none."""
    (folder / "archives/partial").mkdir(parents=True)
    (folder / "status").touch()
    options = {
        "Dir::State::status": folder / "status",
        "Dir::Cache::archives": folder / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": "1",
        "APT::Sandbox::User": "root",
    }
    settings = [text for key, value in options.items() for text in ("-o", f"{key}={value}")]
    _run(
        "apt-get", "-q", "-y", *settings, "--no-install-recommends", "--download-only", "install",
        *PYTHON_PACKAGES, timeout=300,
    )  # fmt: skip
    return sorted((folder / "archives").glob("*.deb"))

"""doctor and setup on a cluster: hosts of their own on this machine, over real ssh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_hosts import ClusterHost, cluster_hosts
from tests.conftest import Cli
from tunesmith.cluster.checks import check_cluster
from tunesmith.cluster.inventory import read_cluster
from tunesmith.cluster.probe import look
from tunesmith.core.checks import Check

pytestmark = pytest.mark.hosts
PORT = 29777


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[list[ClusterHost]]:
    """Three, of which the last does not have the shared folder but an empty one."""
    with cluster_hosts(tmp_path_factory.mktemp("hosts"), 3, own=shared) as found:
        yield found


def write(path: Path, hosts: list[dict[str, object]], shared: Path) -> Path:
    path.write_text(
        json.dumps({"hosts": hosts, "shared": str(shared), "interface": "eth0", "port": PORT})
    )  # JSON is YAML
    return path


def checked(file: Path) -> dict[str, Check]:
    cluster = read_cluster(file)
    return {check.id.removeprefix("cluster-"): check for check in check_cluster(cluster, look(cluster))}


def test_two_hosts_that_are_well(cli: Cli, hosts: list[ClusterHost], shared: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "cluster.yaml", [host.entry for host in hosts[:2]], shared)
    done = cli("doctor", "--cluster", file, "--json")
    found = json.loads(done.stdout)
    status = {check["id"].removeprefix("cluster-"): check["status"] for check in found["checks"]}
    assert status.pop("bandwidth") in ("ok", "warn"), done.stdout
    assert status.pop("driver") in ("ok", "skip")
    assert set(status.values()) == {"ok"}, done.stdout
    assert [host["host"] for host in found["hosts"]] == [f"root@{host.address}" for host in hosts[:2]]
    assert all(len(host["checks"]) == 20 and host["error"] is None for host in found["hosts"])
    assert found["ok"] is all(host["ok"] for host in found["hosts"])
    assert done.returncode == (0 if found["ok"] else 1)
    assert not list(shared.iterdir())


def test_each_fault_is_found_where_it_is(hosts: list[ClusterHost], shared: Path, tmp_path: Path) -> None:
    first, second, third = (host.entry for host in hosts)
    entries = [first, second | {"gpus": 64, "python": "/nowhere/python"}, third]
    listener = (
        f"import socket; s = socket.create_server(('', {PORT})); print(flush=True)\nwhile s.accept(): pass"
    )
    taken = ["ip", "netns", "exec", hosts[0].namespace, sys.executable, "-c", listener]
    with subprocess.Popen(taken, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            found = checked(write(tmp_path / "cluster.yaml", entries, shared))
        finally:
            process.kill()
    failed = {name: check.found for name, check in found.items() if check.status == "fail"}
    names = [f"root@{host.address}" for host in hosts]
    assert failed.keys() >= {"python", "gpus", "port", "shared"}, failed
    assert failed["python"].startswith(f"{names[1]}: /nowhere/python: ") and names[2] not in failed["python"]
    assert f"{names[1]}: 64 listed" in failed["gpus"]
    assert failed["port"] == f"{names[0]} cannot listen on {PORT}: Address already in use"
    assert failed["shared"] == f"{names[2]}: {shared}: No such file or directory"
    assert not list(shared.iterdir())


def test_a_host_that_is_cut_off(hosts: list[ClusterHost], shared: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "cluster.yaml", [host.entry for host in hosts[:2]], shared)
    hosts[1].cut()
    try:
        found = checked(file)
    finally:
        hosts[1].heal()
    assert found["ssh"].status == "fail" and found["ssh"].found.startswith(f"root@{hosts[1].address}: ")
    assert found["port"].status == found["bandwidth"].status == "skip"
    assert found["python"].status == "ok"


def test_setup_takes_the_hosts_of_the_file(
    cli: Cli, hosts: list[ClusterHost], shared: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "cluster.yaml", [hosts[0].entry], shared)
    done = cli("setup", "--cluster", file, "--dry-run", "--json")
    found = json.loads(done.stdout)
    assert [host["host"] for host in found["hosts"]] == [f"root@{hosts[0].address}"], done.stdout
    assert found["dry_run"] is True


@pytest.mark.parametrize("option", ["--target=a", "--facts=x.json", "--record=x.json", "--ssh-key=x"])
def test_a_cluster_names_its_hosts_itself(cli: Cli, option: str, tmp_path: Path) -> None:
    done = cli("doctor", "--cluster", tmp_path / "cluster.yaml", option)
    assert done.returncode == 2 and option.partition("=")[0] in done.stderr


def test_a_file_with_faults(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("hosts: [{hots: a}]\nport: x")
    for command in ("doctor", "setup"):
        done = cli(command, "--cluster", file)
        assert done.returncode == 2 and "did you mean 'host'?" in done.stderr and "port: 'x'" in done.stderr

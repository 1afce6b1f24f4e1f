"""cluster.yaml: what it may hold, and every fault at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunesmith.cluster.inventory import EXAMPLE, Host, read_cluster
from tunesmith.core.errors import RecipeErrors, UserError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        read_cluster(write(tmp_path, text))
    return [f"{fault.what} | {fault.hint}" for fault in caught.value.faults]


def test_the_example_of_the_errors_and_short_hosts(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, EXAMPLE))
    assert [host.name for host in cluster.hosts] == ["ubuntu@10.0.0.5", "ubuntu@10.0.0.6"]
    assert cluster.shared_folder == Path("/mnt/shared") and cluster.interface == "eth0"
    assert (cluster.port, cluster.env, cluster.head) == (29500, {}, cluster.hosts[0])
    short = read_cluster(write(tmp_path, "hosts: [root@gpu1:2222, gpu2, 'root@[fe80::1]:22']"))
    assert [(h.user, h.host, h.port) for h in short.hosts] == [
        ("root", "gpu1", 2222),
        (None, "gpu2", 22),
        ("root", "fe80::1", 22),
    ]
    assert [h.name for h in short.hosts] == ["root@gpu1:2222", "gpu2", "root@[fe80::1]"]


def test_the_python_of_a_host_comes_from_it_the_file_or_here(tmp_path: Path) -> None:
    cluster = read_cluster(write(tmp_path, "hosts: [{host: a, python: /a/python}, b]\npython: /b/python"))
    assert [cluster.python_on(host) for host in cluster.hosts] == ["/a/python", "/b/python"]
    bare = read_cluster(write(tmp_path, "hosts: [a]"))
    assert bare.python_on(bare.head) == sys.executable


@pytest.mark.parametrize(
    ("text", "known"),
    [("{host: a}", None), ("{host: a, gpus: 0}", 1), ("{host: a, gpus: 4}", 4), ("{host: a, gpus: 4, processes: 2}", 2)],
)  # fmt: skip
def test_how_many_processes_a_host_runs(tmp_path: Path, text: str, known: int | None) -> None:
    assert read_cluster(write(tmp_path, f"hosts: [{text}]")).head.processes_known == known


def test_a_store_is_no_folder_and_an_address_is_where_others_reach_it(tmp_path: Path) -> None:
    cluster = read_cluster(
        write(tmp_path, "hosts: [{host: a, address: 10.1.0.1}, b]\nshared: s3://runs/here")
    )
    assert cluster.shared == "s3://runs/here" and cluster.shared_folder is None
    assert [host.reached_at for host in cluster.hosts] == ["10.1.0.1", "b"]


def test_all_faults_come_at_once_with_place_value_and_remedy(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        """
hosts:
  - {host: -oProxyCommand=id, prt: 3, gpus: -1, processes: many, key: /nope, python: bin/python}
  - a b c
  - {user: 3}
  - root@gpu9:99999
shared: runs
intreface: eth0
port: 0
env: {A-B: x}
""",
    )
    file = str(tmp_path / "cluster.yaml")
    expected = [
        "hosts.0.host: '-oProxyCommand=id' is not the name or address of a host",
        "hosts.0.key: '/nope' is not a file on this machine",
        "hosts.0.gpus: -1 is less than 0",
        "hosts.0.processes: 'many' is not a whole number",
        "hosts.0.python: 'bin/python' is not an absolute path",
        "hosts.0.prt: there is no such key | did you mean 'port'?",
        "hosts.1: 'a b c' is not a host, written short as user@host:port",
        "hosts.2.host: is missing",
        "hosts.2.user: 3 is not text",
        "hosts.3.port: '99999' is not less than 65536",
        "shared: 'runs' is neither an absolute path nor a URL",
        "intreface: there is no such key | did you mean 'interface'?",
        "port: 0 is not greater than 0",
        "holds 'A-B', which is not the name of a variable",
    ]
    assert len(found) == len(expected)
    for text in expected:
        assert any(fault.startswith(file) and text in fault for fault in found), (text, found)
    assert all(not fault.endswith("| None") for fault in found), found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hosts: []", "hosts: a list names no host"),
        ("hosts: [a, root@a]", "hosts: a list names root@a twice|hosts: a list names a twice"),
        ("hosts: [a]\nenv: {NCCL_DEBUG: 1}", "env.NCCL_DEBUG: 1 is not text"),
        ("hosts: [a]\ninterface: 'eth0; id'", "interface: 'eth0; id' may hold only letters"),
    ],
)
def test_single_faults(tmp_path: Path, text: str, fault: str) -> None:
    (found,) = faults(tmp_path, text)
    assert any(part in found for part in fault.split("|")), found


def test_files_that_are_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such cluster file") as caught:
        read_cluster(tmp_path / "none.yaml")
    assert "hosts:" in str(caught.value.hint)
    for text in ("", "- a", "hosts: ["):
        with pytest.raises(UserError, match=r"cluster file|line 1"):
            read_cluster(write(tmp_path, text))


def test_a_key_is_found_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "id").touch()
    assert Host(host="a", key="~/id").key == str(tmp_path / "id")

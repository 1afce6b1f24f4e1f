"""The checks of a cluster, judged by what was seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunesmith.cluster.checks import check_cluster
from tunesmith.cluster.inventory import Host, Inventory
from tunesmith.cluster.probe import Seen, targets_of
from tunesmith.core.checks import Check

HOSTS = tuple(Host(host=name, gpus=2) for name in ("a", "b", "c"))
CLUSTER = Inventory(hosts=HOSTS, shared="/mnt/shared", interface="eth0", python="/opt/python")
GBIT = 1e9 / 8


def seen_of(host: Host) -> Seen:
    return Seen(
        host=host,
        clock_s=(-0.2, 0.1),
        python="3.11.7",
        packages={"tunesmith": "0.1.0", "torch": "2.13.0", "numpy": "2.1.0"},
        drivers=("580.1", "580.1"),
        addresses={"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{host.host}"]},
        sent={other.host: 10 * GBIT for other in HOSTS if other != host},
        shared_error="",
    )


def judged(cluster: Inventory = CLUSTER, **changes: Any) -> dict[str, Check]:
    """The checks by their names, where the second host is seen with `changes`."""
    seen = [seen_of(host) for host in cluster.hosts]
    seen[1] = replace(seen[1], **changes)
    return {check.id.removeprefix("cluster-"): check for check in check_cluster(cluster, seen)}


def test_a_cluster_that_is_well() -> None:
    checks = judged()
    assert {check.status for check in checks.values()} == {"ok"}, checks
    assert checks["bandwidth"].found.startswith("slowest") and "10.00 Gbit/s" in checks["bandwidth"].found
    assert checks["port"].found == "a:29500 is reached by 2 hosts"


@pytest.mark.parametrize(
    ("name", "status", "changes", "found"),
    [
        ("ssh", "fail", {"error": "No route to host"}, "b: No route to host"),
        ("python", "fail", {"python_error": "No such file"}, "b: /opt/python: No such file"),
        ("python", "fail", {"packages": {}}, "b: /opt/python has no tunesmith"),
        ("versions", "fail", {"python": "3.12.1"}, "python: 3.11.7 on a, c; 3.12.1 on b"),
        ("packages", "warn", {"packages": {"tunesmith": "0.1.0", "torch": "2.13.0"}}, "numpy (2.1.0 on a, c; none on b)"),
        ("driver", "warn", {"drivers": ("570.2", "570.2")}, "580.1 on a, c; 570.2 on b"),
        ("gpus", "fail", {"drivers": ("580.1",)}, "b: 2 listed, 1 there"),
        ("clocks", "fail", {"clock_s": (3.0, 3.2)}, "b: at least 2.9 s ahead of a"),
        ("clocks", "fail", {"clock_s": (-3.2, -3.0)}, "b: at least 2.8 s behind a"),
        ("interface", "fail", {"addresses": {"ib0": ["10.1.0.1"]}}, "b: has no eth0, but ib0"),
        ("interface", "fail", {"addresses": {"eth0": []}}, "b: eth0 is down or has no address"),
        ("port", "fail", {"sent": {"a": "timed out"}}, "b: does not reach a:29500: timed out"),
        ("bandwidth", "fail", {"sent": {"c": "timed out"}}, "b to c: timed out"),
        ("bandwidth", "warn", {"sent": {"c": 2 * GBIT}}, "slowest b to c: 2.00 Gbit/s, fastest 10.00"),
        ("shared", "fail", {"shared_error": "No such file"}, "b: /mnt/shared: No such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_host(name: str, status: str, changes: dict[str, Any], found: str) -> None:
    check = judged(**changes)[name]
    assert check.status == status and found in check.found and check.fix, check


@pytest.mark.parametrize("clock_s", [(-0.3, 1.05), (0.6, 1.9), (-2.0, -0.9)])
def test_a_clock_is_only_wrong_where_the_way_there_cannot_explain_it(clock_s: tuple[float, float]) -> None:
    assert judged(clock_s=clock_s)["clocks"].status == "ok"


def test_the_port_is_taken_on_the_first_host() -> None:
    seen = [seen_of(host) for host in HOSTS]
    seen[0] = replace(seen[0], port_error="Address already in use")
    found = next(check for check in check_cluster(CLUSTER, seen) if check.id == "cluster-port")
    assert found.status == "fail" and found.found == "a cannot listen on 29500: Address already in use"


def test_what_cannot_be_judged_is_left_out() -> None:
    alone = Inventory(hosts=HOSTS[:1])
    (one,) = (replace(seen_of(host), sent={}, shared_error=None) for host in alone.hosts)
    skipped = {
        check.id.removeprefix("cluster-") for check in check_cluster(alone, [one]) if check.status == "skip"
    }
    assert skipped == {"versions", "packages", "driver", "clocks", "interface", "port", "bandwidth", "shared"}
    nobody = [Seen(host, error="lost") for host in HOSTS]
    statuses = {check.id: check.status for check in check_cluster(CLUSTER, nobody)}
    assert statuses.pop("cluster-ssh") == "fail" and set(statuses.values()) == {"skip"}


def test_every_host_sends_to_its_neighbours_and_the_first() -> None:
    hosts = [Host(host=f"h{number}") for number in range(40)]
    targets = targets_of(hosts)
    assert [len(targets[hosts[n]]) for n in (0, 1, 23, 24, 39)] == [16, 17, 17, 16, 16]
    for host, to in targets.items():
        assert host not in to and len(set(to)) == len(to) and (host == hosts[0] or hosts[0] in to)
    assert targets_of(HOSTS)[HOSTS[1]] == [HOSTS[2], HOSTS[0]]

"""Every check of `doctor --cluster`, judged by what was seen of the hosts; fixes tell where they belong."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

from tunesmith.cluster.inventory import Host, Inventory
from tunesmith.cluster.probe import Seen
from tunesmith.core.checks import Check, Topic

MOST_SECONDS = 1.0
LEAST_BITS = 1e9  # of one connection a second: below it, networks of a cluster are something else
UNEVEN = 3.0
# Other versions of these make other numbers, or processes that cannot talk to each other.
SAME = ("python", "tunesmith", "torch")
MOST_NAMED = 6

SSH = Topic("cluster-ssh", "Hosts by ssh", "Training is started on every host over ssh, which must not ask.")
PYTHON = Topic(
    "cluster-python", "Python", "Every host runs tunesmith by its own Python, at the path that is named."
)
VERSIONS = Topic(
    "cluster-versions", "Same versions", "Processes of different versions compute, or say, different things."
)
PACKAGES = Topic(
    "cluster-packages", "Same packages", "Hosts that were not installed from one lock differ in small ways."
)
DRIVER = Topic("cluster-driver", "Same GPU driver", "NCCL is only tried between drivers of one version.")
GPUS = Topic("cluster-gpus", "GPUs as listed", "Training starts one process for each GPU that is listed.")
CLOCKS = Topic("cluster-clocks", "Clocks", "Checkpoints and events of several hosts are told apart by time.")
INTERFACE = Topic(
    "cluster-interface", "Network interface", "NCCL and gloo bind to it, and wait in vain on a wrong one."
)
PORT = Topic(
    "cluster-port", "Rendezvous port", "The processes find each other at this port of the first host."
)
BANDWIDTH = Topic(
    "cluster-bandwidth", "Bandwidth", "Gradients go from every host to every other in each step."
)
SHARED = Topic(
    "cluster-shared", "Shared folder", "What one host saves must be there for all when it goes on."
)


def check_cluster(cluster: Inventory, seen: Sequence[Seen]) -> list[Check]:
    """Judge a cluster by what was seen of each of its hosts: one `Check` of each kind, none left out."""
    return [check(cluster, seen) for check in CHECKS]


def ssh(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    lost = {one.host: one.error for one in seen if one.error is not None}
    if not lost:
        return SSH.ok(f"{_hosts(len(seen))} answer" if len(seen) > 1 else "the host answers")
    fix = [shlex.join(["ssh", *_login(host), "true"]) for host in lost]
    return SSH.fail(_each(lost), ["# must end without a question:", *fix])


def python(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    able = _reached(seen)
    if not able:
        return PYTHON.skip("no host is reached")
    faults = {
        one.host: f"{cluster.python_on(one.host)}: {one.python_error}" for one in able if one.python_error
    }
    bare = [one.host for one in able if not one.python_error and "tunesmith" not in one.packages]
    faults |= {host: f"{cluster.python_on(host)} has no tunesmith" for host in bare}
    if faults:
        return PYTHON.fail(
            _each(faults), ["# install tunesmith on these hosts, or name its Python as 'python' in the file"]
        )
    return PYTHON.ok(", ".join(dict.fromkeys(cluster.python_on(one.host) for one in able)))


def versions(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    able = _with_python(seen)
    if len(able) < 2:
        return VERSIONS.skip("fewer than two hosts can tell")
    found = {name: {one.host: _version(one, name) for one in able} for name in SAME}
    differing = {name: by_host for name, by_host in found.items() if len(set(by_host.values())) > 1}
    if differing:
        text = "; ".join(f"{name}: {_groups(by_host)}" for name, by_host in differing.items())
        return VERSIONS.fail(text, ["# install the same versions on every host, from one lock"])
    return VERSIONS.ok(", ".join(f"{name} {_version(able[0], name)}" for name in SAME))


def packages(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    able = _with_python(seen)
    if len(able) < 2:
        return PACKAGES.skip("fewer than two hosts can tell")
    names = sorted({name for one in able for name in one.packages} - set(SAME))
    other = [name for name in names if len({_version(one, name) for one in able}) > 1]
    if not other:
        return PACKAGES.ok(f"{len(names)} packages, the same everywhere")
    shown = [f"{name} ({_groups({one.host: _version(one, name) for one in able})})" for name in other]
    more = f" and {len(other) - MOST_NAMED} more" if len(other) > MOST_NAMED else ""
    return PACKAGES.warn(
        "; ".join(shown[:MOST_NAMED]) + more, ["# install every host from the same lock or bundle"]
    )


def driver(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    found = {one.host: one.drivers[0] for one in _reached(seen) if one.drivers}
    if len(found) < 2:
        return DRIVER.skip("fewer than two hosts show a GPU")
    if len(set(found.values())) > 1:
        return DRIVER.warn(_groups(found), ["# install one version of the driver on every host"])
    return DRIVER.ok(next(iter(found.values())))


def gpus(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    able = _reached(seen)
    if not able:
        return GPUS.skip("no host is reached")
    fewer = {
        one.host: f"{one.host.gpus} listed, {len(one.drivers)} there"
        for one in able
        if one.host.gpus is not None and one.host.gpus != len(one.drivers)
    }
    if fewer:
        return GPUS.fail(
            _each(fewer), ["# look with nvidia-smi on these hosts, or correct 'gpus' in the file"]
        )
    counts = {one.host: str(len(one.drivers)) for one in able}
    if len(set(counts.values())) > 1:
        return GPUS.warn(_groups(counts), ["# as many processes on every host go best together"])
    return GPUS.ok(f"{next(iter(counts.values()))} a host")


def clocks(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    """Of hosts it is known only within bounds how far their clocks are ahead: the way there takes time."""
    bounds = {one.host: one.clock_s for one in seen if one.clock_s is not None}
    if len(bounds) < 2:
        return CLOCKS.skip("fewer than two hosts are reached")
    head, (low, high) = next(iter(bounds.items()))
    ahead = {host: (first - high, last - low) for host, (first, last) in bounds.items() if host != head}
    off = {
        host: f"at least {max(least, -most):.1f} s {'ahead of' if least > 0 else 'behind'} {head.name}"
        for host, (least, most) in ahead.items()
        if least > MOST_SECONDS or most < -MOST_SECONDS
    }
    if off:
        return CLOCKS.fail(_each(off), ["timedatectl set-ntp true"])
    return CLOCKS.ok(f"none is known to be more than {MOST_SECONDS:g} s off")


def interface(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    name = cluster.interface
    if name is None:
        return INTERFACE.skip("the file names none: NCCL and gloo choose")
    able = {one.host: one.addresses for one in seen if one.addresses is not None}
    if not able:
        return INTERFACE.skip("no host tells its interfaces")
    faults = {host: f"{_no_interface(name, found)}" for host, found in able.items() if not found.get(name)}
    if faults:
        return INTERFACE.fail(_each(faults), ["ip -br addr", "# name one that every host has as 'interface'"])
    return INTERFACE.ok(_each({host: f"{name} {found[name][0]}" for host, found in able.items()}))


def port(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    """The first host listens there, and every other one reaches it."""
    head = seen[0]
    if len(_with_python(seen)) < 2 or head not in _with_python(seen):
        return PORT.skip("the first host, or every other one, is not there")
    address = f"{head.host.reached_at}:{cluster.port}"
    if head.port_error:
        return PORT.fail(
            f"{head.host.name} cannot listen on {cluster.port}: {head.port_error}",
            [f"ss -ltnp 'sport = :{cluster.port}'", "# end what has it, or name another 'port' in the file"],
        )
    ways = {one.host: one.sent.get(head.host.reached_at) for one in _with_python(seen)[1:]}
    faults = {host: f"does not reach {address}: {way}" for host, way in ways.items() if isinstance(way, str)}
    if faults:
        return PORT.fail(_each(faults), [f"# open {cluster.port}/tcp, and between hosts all ports, for them"])
    return PORT.ok(f"{address} is reached by {_hosts(sum(way is not None for way in ways.values()))}")


def bandwidth(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    names = {one.host.reached_at: one.host.name for one in seen}
    pairs = {f"{one.host.name} to {names[to]}": way for one in seen for to, way in one.sent.items()}
    if not pairs:
        return BANDWIDTH.skip("fewer than two hosts can send")
    cut = [f"{pair}: {way}" for pair, way in pairs.items() if isinstance(way, str)]
    if cut:
        return BANDWIDTH.fail("; ".join(cut[:MOST_NAMED]), ["# every host must reach every other one"])
    bits = {pair: 8 * way for pair, way in pairs.items() if not isinstance(way, str)}
    slow, fast = min(bits, key=bits.__getitem__), max(bits, key=bits.__getitem__)
    text = f"slowest {slow}: {bits[slow] / 1e9:.2f} Gbit/s, fastest {bits[fast] / 1e9:.2f} Gbit/s"
    if bits[slow] < LEAST_BITS or bits[slow] * UNEVEN < bits[fast]:
        return BANDWIDTH.warn(text, ["ethtool $(ip -o route get HOST | grep -oP 'dev \\K\\S+')"])
    return BANDWIDTH.ok(f"{text}, one connection, all hosts at once")


def shared(cluster: Inventory, seen: Sequence[Seen]) -> Check:
    if cluster.shared is None:
        return SHARED.skip("the file names none")
    if cluster.shared_folder is None:
        return SHARED.skip(f"{cluster.shared} is a store: its own errors tell")
    found = {one.host: one.shared_error for one in seen if one.shared_error is not None}
    faults = {host: f"{cluster.shared}: {text}" for host, text in found.items() if text}
    if not found:
        return SHARED.skip("no host can look")
    if faults:
        head = seen[0].host.reached_at
        return SHARED.fail(
            _each(faults), [f"# on these hosts: mount -t nfs {head}:{cluster.shared} {cluster.shared}"]
        )
    return SHARED.ok(f"{cluster.shared} is one folder on {_hosts(len(found))}")


CHECKS: tuple[Callable[[Inventory, Sequence[Seen]], Check], ...] = (
    ssh, python, versions, packages, driver, gpus, clocks, interface, port, bandwidth, shared,
)  # fmt: skip


def _hosts(count: int) -> str:
    return f"{count} host{'s' * (count != 1)}"


def _reached(seen: Sequence[Seen]) -> list[Seen]:
    return [one for one in seen if one.error is None]


def _with_python(seen: Sequence[Seen]) -> list[Seen]:
    return [one for one in _reached(seen) if not one.python_error]


def _version(one: Seen, name: str) -> str:
    return (one.python if name == "python" else one.packages.get(name)) or "none"


def _each(found: Mapping[Host, str]) -> str:
    """`10.0.0.5: this; 10.0.0.6: that`."""
    return "; ".join(f"{host.name}: {text}" for host, text in found.items())


def _groups(found: Mapping[Host, str]) -> str:
    """`2.13 on 10.0.0.5, 10.0.0.6; 2.12 on 10.0.0.7`."""
    values = dict.fromkeys(found.values())
    by_value = {value: [host.name for host, mine in found.items() if mine == value] for value in values}
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in by_value.items())


def _no_interface(name: str, found: Mapping[str, Sequence[str]]) -> str:
    if name in found:
        return f"{name} is down or has no address"
    others = [other for other, addresses in found.items() if addresses and other != "lo"]
    return f"has no {name}, but {', '.join(others) or 'none with an address'}"


def _login(host: Host) -> list[str]:
    key = ["-i", host.key] if host.key else []
    user = f"{host.user}@" if host.user else ""
    return [*key, "-p", str(host.port), f"{user}{host.host}"]

"""Look at the hosts of a cluster, each and between each other, over ssh: what `checks.py` judges.

Nothing stays behind: one small file in the shared folder is made and removed again, and the rendezvous port
is listened on for some seconds.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.cluster.host_probe import CONNECT_S, LISTEN_S, SEND_S
from tunesmith.cluster.inventory import Host, Inventory
from tunesmith.cluster.ssh import Reply, run_each, run_on

SCRIPT = Path(__file__).with_name("host_probe.py")
SMI = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
# A host sends to this many others, its neighbours in the list: of larger clusters not every pair is tried.
MOST_NEIGHBOURS = 16


@dataclass(frozen=True)
class Seen:
    """What is known of one host. A field is None where the host could not tell.

    error: why ssh does not reach it; clock_s: bounds of how far its clock is ahead of this machine's;
    python_error: why its interpreter does not run; drivers: version of the GPU driver, once a GPU;
    addresses: of each network interface that is up; port_error: why it cannot listen on the rendezvous port;
    sent: to the address of each other host bytes a second, or why nothing arrived; shared_error: why the file
    that the first host wrote into the shared folder is not read here, empty when it is.
    """

    host: Host
    error: str | None = None
    clock_s: tuple[float, float] | None = None
    python: str | None = None
    python_error: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    drivers: tuple[str, ...] = ()
    addresses: Mapping[str, Sequence[str]] | None = None
    port_error: str | None = None
    sent: Mapping[str, float | str] = field(default_factory=dict)
    shared_error: str | None = None


def look(cluster: Inventory) -> list[Seen]:
    """Every host of the cluster, in its order. Raises UserError where ssh is not installed here."""
    clocks = run_on(cluster.hosts, ("date", "+%s.%N"))
    reached = [reply.host for reply in clocks if reply.ok]
    told = _ask(cluster, [(host, ("facts",)) for host in reached])
    smi = _by_name(run_on(reached, SMI))
    links = _by_name(run_on(reached, ("ip", "-j", "addr")))
    able = [host for host in reached if "error" not in told[host.name]]
    sent, ports = _send_to_each_other(cluster, able)
    shared = _share(cluster, able)

    def seen(clock: Reply) -> Seen:
        name = clock.host.name
        if not clock.ok:
            return Seen(clock.host, error=clock.reason)
        facts = told[name]
        return Seen(
            host=clock.host,
            clock_s=(float(clock.stdout) - clock.ended, float(clock.stdout) - clock.began),
            python=facts.get("python"),
            python_error=facts.get("error"),
            packages=facts.get("packages", {}),
            drivers=tuple(smi[name].stdout.split()) if smi[name].ok else (),
            addresses=_addresses(links[name].stdout) if links[name].ok else None,
            port_error=ports.get(name),
            sent=sent.get(name, {}),
            shared_error=shared.get(name),
        )

    return [seen(clock) for clock in clocks]


def _ask(
    cluster: Inventory, actions: Sequence[tuple[Host, Sequence[str]]], timeout_s: float = 60.0
) -> dict[str, dict[str, Any]]:
    """What SCRIPT answers on each host, by the host's name; {"error": why} where it does not."""
    commands = [(host, (cluster.python_on(host), "-", *action)) for host, action in actions]
    replies = run_each(commands, input=SCRIPT.read_text(encoding="utf-8"), timeout_s=timeout_s)
    return {reply.host.name: _answer(reply) for reply in replies}


def _answer(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.stdout) if reply.ok else None
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"error": reply.reason}


def _by_name(replies: Sequence[Reply]) -> dict[str, Reply]:
    return {reply.host.name: reply for reply in replies}


def _addresses(links: str) -> dict[str, list[str]]:
    """The addresses of the interfaces that are up, from `ip -j addr`."""
    return {
        link["ifname"]: [entry["local"] for entry in link["addr_info"]] if "UP" in link["flags"] else []
        for link in json.loads(links)
    }


def _send_to_each_other(
    cluster: Inventory, hosts: Sequence[Host]
) -> tuple[dict[str, dict[str, float | str]], dict[str, str]]:
    """(what each host sent, why a host could not listen), by their names.

    All send at once.
    """
    if len(hosts) < 2:
        return {}, {}
    port, targets = str(cluster.port), targets_of(hosts)
    sends = [(host, ("send", port, *(to.reached_at for to in targets[host]))) for host in hosts]
    taken = Counter(to for found in targets.values() for to in found)
    listens = [(host, ("listen", port, str(taken[host]))) for host in hosts]
    most = max(map(len, targets.values()))
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(_ask, cluster, listens, LISTEN_S + CONNECT_S + 30)
        told = _ask(cluster, sends, most * (SEND_S + 2 * CONNECT_S) + 30)
        errors = {name: found["error"] for name, found in listening.result().items() if "error" in found}
    sent: dict[str, dict[str, float | str]] = {
        host.name: dict.fromkeys((to.reached_at for to in targets[host]), told[host.name]["error"])
        if "error" in told[host.name]
        else told[host.name]
        for host in hosts
    }
    return sent, errors


def targets_of(hosts: Sequence[Host]) -> dict[Host, list[Host]]:
    """Whom each host sends to: its next neighbours, as in a ring, and always the first host."""
    ring, count = [*hosts, *hosts], min(len(hosts) - 1, MOST_NEIGHBOURS)
    found = {host: ring[n + 1 : n + 1 + count] for n, host in enumerate(hosts)}
    return {h: to if h == hosts[0] or hosts[0] in to else [*to, hosts[0]] for h, to in found.items()}


def _share(cluster: Inventory, hosts: Sequence[Host]) -> dict[str, str]:
    """By host: why the file of the first one is not read there, empty where it is."""
    folder = cluster.shared_folder
    if folder is None or not hosts:
        return {}
    name = f".tunesmith-{secrets.token_hex(8)}"
    head, *others = hosts
    written = _ask(cluster, [(head, ("write", str(folder), name))])[head.name]["error"]
    if written:
        return {head.name: f"cannot be written: {written}"}
    try:
        found = _ask(cluster, [(host, ("read", str(folder), name)) for host in others])
    finally:
        _ask(cluster, [(head, ("remove", str(folder), name))])
    return {head.name: ""} | {host: told["error"] or "" for host, told in found.items()}

"""How fast processes on this machine send each other messages, and how much they slow each other down.

    python -m tunesmith.workflows.plan_link THREADS HIDDEN INTERMEDIATE

is one of several processes, started by `measured_network`; the first prints what was found, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tunesmith.core.errors import TunesmithError
from tunesmith.model.hardware import keep_freed_memory
from tunesmith.plan.scale import Collective, Link, MeasuredNetwork, link_through
from tunesmith.train.group import join_group, leave_group
from tunesmith.train.ranks import Ranks, ranks_from
from tunesmith.workflows.launch import Cluster, Crew, enter_worker

SMALL_BYTES, LARGE_BYTES = 1 << 16, 1 << 24
TIMES = 5
# Of the layers that are timed, and how many: long enough for what the system does meanwhile.
TOKENS, LAYERS = 256, 8
COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter")
# Two processes on two cores of a Xeon, where measuring would take more than the run is worth.
ASSUMED_LINK = Link(latency_s=2e-4, bytes_per_s=0.7e9)
ASSUMED_COPY_BYTES_PER_S = 5e9


def assumed_network(processes: int) -> MeasuredNetwork:
    """What processes on one machine mostly do. A whole message's bytes take longer among more of them."""
    turns = 2 * (processes - 1) / processes
    slower = Link(
        latency_s=ASSUMED_LINK.latency_s * (processes - 1), bytes_per_s=ASSUMED_LINK.bytes_per_s / turns
    )
    links: dict[Collective, Link] = dict.fromkeys(COLLECTIVES, slower)
    return MeasuredNetwork(processes=processes, links=links, copy_bytes_per_s=ASSUMED_COPY_BYTES_PER_S)


def measured_network(processes: int, *, threads: int, hidden: int, intermediate: int) -> MeasuredNetwork:
    """Start so many processes of `threads` each on this machine, and time their messages over gloo, and a
    layer of that size in one of them and in all at once; assumed where they cannot be started.

    It takes some seconds, most of them for Python and torch to begin.
    """
    if threading.current_thread() is not threading.main_thread():
        return assumed_network(processes)  # the crew's handlers of signals need it
    args = [sys.executable, "-m", "tunesmith.workflows.plan_link", *map(str, (threads, hidden, intermediate))]
    try:
        with Crew(args, processes, Cluster()) as crew:
            found = crew.wait().value
    except TunesmithError:
        return assumed_network(processes)
    return network_of(found, processes)


def network_of(found: dict[str, Any], processes: int) -> MeasuredNetwork:
    """What `measure` has found in the first process."""
    links: dict[Collective, Link] = {kind: Link(**found[kind]) for kind in COLLECTIVES}
    return MeasuredNetwork(
        processes=processes,
        links=links,
        copy_bytes_per_s=found["copy_bytes_per_s"],
        crowding=found["crowding"],
    )


# -- in each of the processes --------------------------------------------------------------------------------


def measure(ranks: Ranks, hidden: int, intermediate: int) -> dict[str, Any]:
    """What every process of the group takes part in; the figures of this one."""
    found: dict[str, Any] = {kind: _link(kind, ranks.size) for kind in COLLECTIVES}
    large = torch.randn(LARGE_BYTES // 4)
    found["copy_bytes_per_s"] = 2 * LARGE_BYTES / timed(lambda: torch.cat([large[:10], large[10:]]))
    work = _layer(hidden, intermediate)
    alone = timed(work if ranks.first else lambda: None)
    found["crowding"] = max(1.0, timed(work) / alone)
    return found


def _link(kind: Collective, processes: int) -> dict[str, float]:
    sizes = [size - size % (4 * processes) for size in (SMALL_BYTES, LARGE_BYTES)]
    small, large = ((float(size), timed(sending(kind, torch.zeros(size // 4), processes))) for size in sizes)
    link = link_through(small, large)
    return {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s}


def sending(kind: Collective, whole: Tensor, processes: int) -> Callable[[], object]:
    """One message of this kind; whole: what all processes have together."""
    part = torch.zeros(whole.numel() // processes)
    calls: dict[Collective, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    return calls[kind]


def timed(work: Callable[[], object]) -> float:
    """The quickest of a few times, all processes beginning together: what else runs only adds to it. The
    first is not counted."""
    found = []
    for _ in range(TIMES + 1):
        dist.barrier()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _layer(hidden: int, intermediate: int) -> Callable[[], object]:
    """Forward and backward passes of two products in each of LAYERS layers, and their update.

    Each has weights of its own: in a step they come from memory, where processes stand in each other's way
    more than in their cores.
    """
    layers = [
        nn.Sequential(nn.Linear(hidden, intermediate), nn.SiLU(), nn.Linear(intermediate, hidden))
        for _ in range(LAYERS)
    ]
    optimizer = torch.optim.AdamW([weight for layer in layers for weight in layer.parameters()], fused=True)
    tokens = torch.randn(TOKENS, hidden)

    def work() -> None:
        for layer in layers:
            layer(tokens).square().mean().backward()
        optimizer.step()

    return work


def main() -> None:
    enter_worker(os.environ)
    threads, hidden, intermediate = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    keep_freed_memory()
    ranks = ranks_from(os.environ)
    join_group(ranks, "cpu")
    try:
        found = measure(ranks, hidden, intermediate)
    finally:
        leave_group()
    if ranks.first:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

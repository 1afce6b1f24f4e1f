"""What several processes send each other in a step, how long it takes, and what of it computing hides.

A message of B bytes among n processes takes rounds of a fixed time each, and its bytes go over the slowest
link: the alpha-beta model (Hockney 1994, doi:10.1016/S0167-8191(06)80021-9). The rings are those of Thakur,
Rabenseifner and Gropp 2005 (doi:10.1177/1094342005051521), the tree that of Sanders, Speck and Träff 2009
(doi:10.1016/j.parco.2009.09.001), with the rounds as NCCL's own model counts them (`src/graph/tuning.cc`).

What is sent: gradients once (data parallel), weights twice and gradients once (ZeRO: Rajbhandari et al. 2020,
arXiv:1910.02054, section 7; FSDP is the same), activations (tensor parallel: Shoeybi et al. 2019,
arXiv:1909.08053, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunesmith.plan.cards import Card

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]

# Seconds of a round, and the share of a link's bandwidth that a ring fills: NCCL's `tuning.cc` has 3.4, 5.7
# and 9.6 us for its Simple protocol, and at most 235 of an A100's 300 GB/s.
NVLINK_ROUND_S, PCIE_ROUND_S, NETWORK_ROUND_S = 3.4e-6, 5.7e-6, 9.6e-6
LINK_SHARE = 235 / 300
# A tree fills so much of what a ring does (`tuning.cc`).
TREE_SHARE = 0.9
# Bytes read and written around a message, of each of its bytes: gradients are joined into a bucket and taken
# apart again, gathered weights are copied to where they are used, gradients to where they are sent from.
COPIED: dict[Collective, int] = {"all_reduce": 4, "all_gather": 2, "reduce_scatter": 2, "broadcast": 0}
# Of a micro-batch: the backward pass makes two products where the forward pass makes one.
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Messages of one kind. num_bytes: of all of them together, each counted whole: what every process has
    after an all-gather, before a reduce-scatter."""

    collective: Collective
    messages: float
    num_bytes: float

    def sent_bytes(self, processes: int) -> float:
        """Bytes that each process sends, over a ring."""
        if self.collective == "broadcast":
            return self.num_bytes if processes > 1 else 0.0
        return _turns(self.collective) * (processes - 1) / processes * self.num_bytes


def collective_of(name: str) -> Collective:
    """The kind of one of torch's operators, such as `c10d::_allgather_base_`. What gives one process's sum
    away, or waits, is counted as the all-reduce that it is no slower than."""
    kinds: dict[str, Collective] = {
        "allgather": "all_gather",
        "reduce_scatter": "reduce_scatter",
        "broadcast": "broadcast",
    }
    return next((kind for part, kind in kinds.items() if part in name), "all_reduce")


def _turns(collective: Collective) -> int:
    """How often the bytes go round: an all-reduce is a reduce-scatter and an all-gather."""
    return 2 if collective == "all_reduce" else 1


# -- links ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Link:
    """latency_s: of a round; bytes_per_s: in one direction."""

    latency_s: float
    bytes_per_s: float


class Sends(Protocol):
    """What knows how long messages take. processes: among which they go; crowding: what a process computes
    alone in a second takes so many beside the others."""

    @property
    def processes(self) -> int: ...

    @property
    def crowding(self) -> float: ...

    def seconds(self, traffic: Traffic) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Network:
    """`hosts` of `gpus` each. inner: from one GPU to the next in a host; outer: of a host to the next, all
    its network cards together; copy_bytes_per_s: of a GPU's own memory."""

    gpus: int
    inner: Link
    hosts: int = 1
    outer: Link | None = None
    copy_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.hosts < 1 or (self.hosts > 1 and self.outer is None):
            raise ValueError(f"{self.hosts} hosts of {self.gpus}, outer link {self.outer}")

    @property
    def processes(self) -> int:
        return self.gpus * self.hosts

    @property
    def crowding(self) -> float:
        """Every process has a GPU of its own."""
        return 1.0

    @property
    def bytes_per_s(self) -> float:
        """Of the slowest link on the way round."""
        used = [self.inner] * (self.gpus > 1) + ([self.outer] if self.outer and self.hosts > 1 else [])
        return min((link.bytes_per_s for link in used), default=math.inf)

    def seconds(self, traffic: Traffic) -> float:
        """Of the messages one after another, by the faster algorithm, and of the copies around them."""
        if self.processes == 1:
            return 0.0
        copies = COPIED[traffic.collective] * traffic.num_bytes / self.copy_bytes_per_s
        ways = [self.ring_s(traffic)]
        if traffic.collective == "all_reduce":
            ways.append(self.tree_s(traffic))
        return copies + min(ways)

    def ring_s(self, traffic: Traffic) -> float:
        """n - 1 rounds, twice for an all-reduce, those between hosts slower."""
        across = self.hosts - 1
        within = self.processes - 1 - across
        round_s = within * self.inner.latency_s + across * self._outer_s
        sent = traffic.sent_bytes(self.processes) / self.bytes_per_s
        return traffic.messages * _turns(traffic.collective) * round_s + sent

    def tree_s(self, traffic: Traffic) -> float:
        """Up and down a chain in each host and a binary tree of the hosts; the bytes go both ways."""
        depth = math.ceil(math.log2(self.hosts))
        round_s = (self.gpus - 1) * self.inner.latency_s + depth * self._outer_s
        return 2 * (traffic.messages * round_s + traffic.num_bytes / (TREE_SHARE * self.bytes_per_s))

    @property
    def _outer_s(self) -> float:
        return self.outer.latency_s if self.outer is not None else 0.0


def card_network(card: Card, gpus: int, *, hosts: int = 1, host_bytes_per_s: float = 0.0) -> Network:
    """`hosts` with `gpus` of a card each. host_bytes_per_s: of all network cards of a host together, at most
    as their data sheets say."""
    if card.link_gb_s:
        inner = Link(latency_s=NVLINK_ROUND_S, bytes_per_s=LINK_SHARE * card.link_gb_s * 1e9)
    else:
        inner = Link(latency_s=PCIE_ROUND_S, bytes_per_s=LINK_SHARE * card.pcie_gb_s * 1e9)
    outer = Link(latency_s=NETWORK_ROUND_S, bytes_per_s=LINK_SHARE * host_bytes_per_s) if hosts > 1 else None
    copies = card.memory_gb_s * 1e9
    return Network(gpus=gpus, inner=inner, hosts=hosts, outer=outer, copy_bytes_per_s=copies)


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """Processes whose messages were timed. links: of each kind, latency_s of a message and bytes_per_s of its
    whole bytes."""

    processes: int
    links: dict[Collective, Link]
    copy_bytes_per_s: float
    crowding: float = 1.0

    def seconds(self, traffic: Traffic) -> float:
        link = self.links.get(traffic.collective, self.links["all_reduce"])
        copies = COPIED[traffic.collective] * traffic.num_bytes / self.copy_bytes_per_s
        return traffic.messages * link.latency_s + traffic.num_bytes / link.bytes_per_s + copies


def link_through(few: tuple[float, float], many: tuple[float, float]) -> Link:
    """The link on which messages of two sizes take what was measured, each (bytes, seconds).

    Raises ValueError where the larger message is not the slower one.
    """
    (less, quick), (more, slow) = few, many
    if more <= less or slow <= quick:
        raise ValueError(f"{more} bytes in {slow} s beside {less} bytes in {quick} s")
    bytes_per_s = (more - less) / (slow - quick)
    return Link(latency_s=max(0.0, quick - less / bytes_per_s), bytes_per_s=bytes_per_s)


# -- what an engine sends in a step --------------------------------------------------------------------------


def data_parallel(gradient_bytes: float, *, bucket_bytes: float) -> list[Traffic]:
    """All gradients once a step, in buckets."""
    return [
        Traffic(
            collective="all_reduce",
            messages=math.ceil(gradient_bytes / bucket_bytes),
            num_bytes=gradient_bytes,
        )
    ]


def sharded(
    weight_bytes: float, gradient_bytes: float, *, units: int, stage: Literal[2, 3] = 3, passes: int = 1
) -> list[Traffic]:
    """FSDP2 and ZeRO-3. weight_bytes, gradient_bytes: of the model as they are sent; units: what is gathered
    at a time, a decoder layer each; passes: micro-batches of a process. Stage 3 gathers a unit for the
    forward pass and again for the backward pass, stage 2 once."""
    gathers = passes * (2 if stage == 3 else 1)
    return [
        Traffic(collective="all_gather", messages=gathers * units, num_bytes=gathers * weight_bytes),
        Traffic(collective="reduce_scatter", messages=passes * units, num_bytes=passes * gradient_bytes),
    ]


def tensor_parallel(
    *,
    layers: int,
    tokens: int,
    hidden: int,
    element_bytes: int = 2,
    passes: int = 1,
    recomputed: bool = False,
) -> list[Traffic]:
    """Two sums of [tokens, hidden] in the forward pass of each layer and two in its backward pass; two more
    where the forward pass is made again."""
    messages = passes * layers * (6 if recomputed else 4)
    return [
        Traffic(
            collective="all_reduce", messages=messages, num_bytes=messages * tokens * hidden * element_bytes
        )
    ]


def traffic_s(traffic: Sequence[Traffic], network: Sends) -> float:
    return sum((network.seconds(part) for part in traffic), 0.0)


# -- a step --------------------------------------------------------------------------------------------------


def overlapped_s(compute_s: float, sent_s: float, chunks: float) -> float:
    """Seconds of computing and sending in turns of `chunks` equal parts, the next part computed while one is
    sent: the longer of both, and one part of the shorter."""
    return max(compute_s, sent_s) + min(compute_s, sent_s) / max(1.0, chunks)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What the processes of a step send. pass_s: in every micro-batch; step_s: once a step, while the last
    micro-batch's backward pass goes on; pass_parts, step_parts: messages in them; overlaps: whether computing
    goes on meanwhile, which it does not where both need the same cores."""

    pass_s: float = 0.0
    step_s: float = 0.0
    pass_parts: float = 1.0
    step_parts: float = 1.0
    overlaps: bool = False

    def waited_s(self, passes: float, compute_s: float) -> float:
        """Seconds that a step of `passes` micro-batches, of compute_s each, takes more than its computing."""
        if not self.overlaps:
            return passes * self.pass_s + self.step_s
        each = overlapped_s(compute_s, self.pass_s, self.pass_parts) - compute_s
        backward = BACKWARD_SHARE * compute_s
        return passes * each + overlapped_s(backward, self.step_s, self.step_parts) - backward


NOTHING_SENT = Exchange()


# -- machines that fail --------------------------------------------------------------------------------------


def save_interval_s(save_s: float, failure_s: float) -> float:
    """Seconds from one checkpoint to the next that lose least, where a run fails every failure_s on the mean
    and a checkpoint takes save_s: sqrt(2 save_s failure_s) (Young 1974, doi:10.1145/361147.361115)."""
    return math.sqrt(2 * save_s * failure_s)


def lost_share(save_s: float, failure_s: float, restart_s: float) -> float:
    """Of the time: saving, what is computed again after a failure (half an interval), and restarting."""
    every = save_interval_s(save_s, failure_s)
    return save_s / every + (every / 2 + restart_s) / failure_s

"""The tables of docs/concepts/scale.md: up to 1,024 GPUs, checkpoints against failures, an endpoint.

    python bench/scale/tables.py

Formulas of `plan.scale` and `plan.endpoint` on data sheets; the queue beside a simulation of it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.plan.card_rates import card_rates
from tunesmith.plan.cards import Card, card_named
from tunesmith.plan.endpoint import Demand, Replica, replicas_for, waits_longer
from tunesmith.plan.scale import (
    Exchange,
    Network,
    Traffic,
    card_network,
    data_parallel,
    lost_share,
    save_interval_s,
    sharded,
    tensor_parallel,
    traffic_s,
)
from tunesmith.plan.sizes import SIZES
from tunesmith.train.parallel import BUCKET_BYTES

GPUS_PER_HOST = 8
COUNTS = (8, 16, 64, 1024)
# Tokens of a micro-batch of each GPU; the forward pass is made again in the backward pass.
TOKENS = 8192
# Adam's two averages, weights and gradients in fp32.
STATE_BYTES = 16
# 419 interruptions that nobody planned in 54 days of 16,384 GPUs (Llama 3, arXiv:2407.21783, section 3.3.4).
GPU_FAILURE_S = 16_384 * 54 * 86_400 / 419


@dataclass(frozen=True)
class Fabric:
    """Network cards of a host together."""

    name: str
    card: str
    host_bytes_per_s: float

    def of(self, hosts: int) -> Network:
        return card_network(
            card_named(self.card), GPUS_PER_HOST, hosts=hosts, host_bytes_per_s=self.host_bytes_per_s
        )


FABRICS = (
    Fabric("8 x 400 Gbit/s", "h100", 400e9),
    Fabric("1 x 100 Gbit/s", "h100", 12.5e9),
    Fabric("1 x 25 Gbit/s", "rtx4090", 3.125e9),
)


def parameters(name: str) -> tuple[int, int, int]:
    """Weights in all, decoder layers, hidden size."""
    a = SIZES[name].arguments
    hidden, inner, layers = a["hidden_size"], a["intermediate_size"], a["num_hidden_layers"]
    keys = hidden * a["num_key_value_heads"] // a["num_attention_heads"]
    each = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return layers * each + 2 * a["vocab_size"] * hidden, layers, hidden


def compute_s(card: Card, weights: int) -> float:
    """Forward pass, again, and backward: eight operations a weight and token (Kaplan et al. 2020)."""
    return card_rates(card).product_s("matmul", "bf16", 8 * weights * TOKENS)


def step_s(
    traffic: list[Traffic], network: Network, computing: float, *, copies: bool
) -> tuple[float, float]:
    """Seconds of messages, and of a step of one micro-batch. copies: only gradients go, in its backward
    pass."""
    sent, parts = traffic_s(traffic, network), sum(part.messages for part in traffic)
    exchange = (
        Exchange(step_s=sent, step_parts=parts, overlaps=True)
        if copies
        else Exchange(pass_s=sent, pass_parts=parts, overlaps=True)
    )
    return sent, computing + exchange.waited_s(1, computing)


def training(model: str) -> Iterator[str]:
    weights, layers, _ = parameters(model)
    yield f"{model}, all weights, {TOKENS:,} tokens a GPU and step"
    yield "| network of a host | engine | GPUs | sent s | step s | of one host's pace | states GiB a GPU |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for fabric in FABRICS:
        computing = compute_s(card_named(fabric.card), weights)
        kinds = {
            "ddp": (data_parallel(4 * weights, bucket_bytes=BUCKET_BYTES), True),
            "fsdp 2": (sharded(4 * weights, 4 * weights, units=layers + 1, stage=2), False),
            "fsdp 3": (sharded(4 * weights, 4 * weights, units=layers + 1), False),
            "fsdp 3, 16 bits": (sharded(2 * weights, 2 * weights, units=layers + 1), False),
        }
        for engine, (traffic, copies) in kinds.items():
            alone = step_s(traffic, fabric.of(1), computing, copies=copies)[1]
            for count in COUNTS:
                sent, step = step_s(traffic, fabric.of(count // GPUS_PER_HOST), computing, copies=copies)
                held = STATE_BYTES * weights / (1 if copies else count) / 2**30
                yield (
                    f"| {fabric.card}, {fabric.name} | {engine} | {count} | {sent:.3f} | {step:.3f} | "
                    f"{alone / step:.0%} | {held:,.1f} |"
                )


def tensor(model: str) -> Iterator[str]:
    _, layers, hidden = parameters(model)
    (traffic,) = tensor_parallel(layers=layers, tokens=TOKENS, hidden=hidden, recomputed=True)
    yield f"{model}, tensor parallel over 8 and 16 GPUs, {TOKENS:,} tokens: not hidden by computing"
    yield "| over | sent s | computed s |"
    yield "|---|---:|---:|"
    weights = parameters(model)[0]
    for hosts in (1, 2):
        sent = FABRICS[0].of(hosts).seconds(traffic)
        computing = compute_s(card_named("h100"), weights) / (GPUS_PER_HOST * hosts)
        yield f"| {GPUS_PER_HOST * hosts} GPUs of {hosts} host(s) | {sent:.3f} | {computing:.3f} |"


def failures() -> Iterator[str]:
    yield "| GPUs | a failure every | save s | best interval | time lost |"
    yield "|---:|---:|---:|---:|---:|"
    for count in COUNTS:
        every = GPU_FAILURE_S / count
        for save_s in (10, 120):
            interval, lost = save_interval_s(save_s, every), lost_share(save_s, every, 600)
            yield f"| {count} | {every / 3600:,.0f} h | {save_s} | {interval / 60:,.0f} min | {lost:.1%} |"


# -- the endpoint --------------------------------------------------------------------------------------------


def simulated(servers: int, load: float, times: float, *, spread: bool) -> float:
    """Share of requests, of one second each on the mean, that waited longer than `times` seconds. spread:
    answers of very different lengths (log-normal, sigma 1), as people ask; else as the formula assumes."""
    draw, free = random.Random(0), [0.0] * servers
    now, late, total = 0.0, 0, 400_000
    for _ in range(total):
        now += draw.expovariate(load)
        began = max(now, heapq.heappop(free))
        late += began - now > times
        taken = draw.lognormvariate(-0.5, 1.0) if spread else draw.expovariate(1.0)
        heapq.heappush(free, began + taken)
    return late / total


def queue() -> Iterator[str]:
    yield "| places | taken | waits | simulated | long tail | waits > 1/10 | simulated | long tail |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    for servers in (8, 32, 128):
        for share in (0.8, 0.9, 0.95):
            load, cells = share * servers, []
            for times in (0.0, 0.1):
                cells.append(waits_longer(servers, load, times))
                cells += [simulated(servers, load, times, spread=spread) for spread in (False, True)]
            yield f"| {servers} | {share:.0%} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |"


# A 7B model in 16 bits under continuous batching, and a price an hour: assumed. Measure yours with
# `tunesmith bench serve`.
REPLICAS = {
    "rtx4090": (Replica(places=32, prompt_tokens_per_s=8_000, answer_tokens_per_s=1_200), 0.4),
    "h100": (Replica(places=128, prompt_tokens_per_s=30_000, answer_tokens_per_s=6_000), 2.5),
}
WAIT_S, LATE = 1.0, 0.01


def endpoint() -> Iterator[str]:
    yield "| users a day | card | requests/s | s a request | replicas | places taken | late | a day |"
    yield "|---:|---|---:|---:|---:|---:|---:|---:|"
    for users in (10_000, 100_000, 1_000_000):
        demand = Demand(requests_per_day=10 * users, prompt_tokens=600, answer_tokens=250)
        for card, (replica, price) in REPLICAS.items():
            count = replicas_for(demand, replica, wait_s=WAIT_S, late_share=LATE)
            taken = replica.seconds(demand)
            servers, load = count * replica.places, demand.per_s * taken
            late = waits_longer(servers, load, WAIT_S / taken)
            yield (
                f"| {users:,} | {card} | {demand.per_s:,.1f} | {taken:.1f} | {count} | "
                f"{load / servers:.0%} | {late:.2%} | ${24 * count * price:,.0f} |"
            )


def main() -> None:
    for part in (training("llama-3-8b"), tensor("llama-3.1-70b"), failures(), queue(), endpoint()):
        print("\n".join(part) + "\n")


if __name__ == "__main__":
    main()

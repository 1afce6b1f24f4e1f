"""Which replica answers: the one that has most likely seen the beginning of the prompt. Loaded by Ray Serve,
in the process that asks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

SLACK = 4
"""A replica may have this many more requests under way than the idlest one; then another is taken."""


def ranked(key: str, names: Sequence[str], load: Mapping[str, int]) -> list[str]:
    """The replicas in the order in which a request with this key should try them.

    The order of a key changes only by the replicas that come or go (rendezvous hashing: Thaler and
    Ravishankar, 1998); those with SLACK requests more than the least loaded come last. Without a key the
    least loaded is first, by chance among equals.
    """
    if not key:
        return sorted(names, key=lambda name: (load.get(name, 0), random.random()))
    least = min((load.get(name, 0) for name in names), default=0)
    busy = {name for name in names if load.get(name, 0) >= least + SLACK}
    return sorted(names, key=lambda name: (name in busy, blake2b(f"{key} {name}".encode()).digest()))


class PrefixRouter(RequestRouter):
    """Goes by the attribute `key` of a request's first argument, and by what this process has sent where."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._load: Counter[str] = Counter()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        args = pending_request.args if pending_request is not None else []
        key = getattr(args[0], "key", "") if args else ""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(key, list(by_name), self._load)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._load[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._load[replica_id.unique_id] -= 1

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._load.pop(replica_id.unique_id, None)

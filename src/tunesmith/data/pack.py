"""Orders and packs, both pure functions of their arguments on every machine and numpy version."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def shuffled(count: int, *key: int) -> Indices:
    """The numbers 0 … count-1 in an order that only `key` decides.

    Sorts by SplitMix64 (Steele, Lea, Flood 2014) of each number: numpy's own generators may change their
    streams between versions, and a run must be repeatable elsewhere.
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    for part in key:
        state = _mix(np.asarray([np.uint64(part) ^ state], dtype=np.uint64))[0]
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ state), kind="stable")


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Put documents into packs of at most `capacity` tokens: best-fit decreasing, no document split.

    lengths [D], each 1 … capacity. Documents of equal length are taken in the order given. Returns the
    packs as lists of document numbers. Needs at most 11/9 of the fewest possible packs, plus one
    (Johnson 1973). O(D log D): the packs are kept by the room they have left, and a bit mask of the rooms
    that occur gives the tightest one.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"document lengths must be 1 … {capacity}")
    packs: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(document)
        left = room - length
        by_room[left].append(pack)
        rooms |= 1 << left
    return packs

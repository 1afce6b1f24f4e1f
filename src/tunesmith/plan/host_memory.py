"""Host memory of one machine: what its processes load, keep there, and gather for a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

# Gradients that are on their way to the host while another weight is updated there
# (`train.offload.COPIES_AHEAD`), and the one that is used.
GRADIENTS_IN_FLIGHT = 3


def machine_bytes(first: Mapping[str, int], *, processes: int) -> dict[str, int]:
    """Host memory that the tensors of all processes of a machine take, by phase, in bytes.

    first: of rank 0, pinned memory included. The others take the same, but in a save no more than in an
    update: rank 0 alone gathers what is saved.
    """
    kept = first.get("update", 0)
    return {
        phase: mine + (processes - 1) * (min(mine, kept) if phase == "save" else mine)
        for phase, mine in first.items()
    }


def pinned_block(num_bytes: int) -> int:
    """Bytes that torch takes for a pinned tensor: the next power of two (`CachingHostAllocator.h`)."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


def staging_blocks(gradients: Sequence[int], weights: Sequence[int]) -> list[int]:
    """Sizes of the pinned blocks through which an optimizer in host memory takes gradients and gives weights
    back.

    gradients, weights: bytes of each trained parameter's, in the optimizer's order. A block is used again by
    what has its size, and none is given back, so of each size there are as many as were ever in use at once.
    """
    most: Counter[int] = Counter()
    for at, weight in enumerate(weights):
        window = [*gradients[at : at + GRADIENTS_IN_FLIGHT], weight]
        most |= Counter(pinned_block(size) for size in window if size)
    return sorted(most.elements(), reverse=True)

"""How the processes of a training speak to each other.

Numbers and texts go over gloo on the CPU whatever the device, gradients over nccl on GPUs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from tunesmith.core.errors import RunFailed, UserError
from tunesmith.train.ranks import Ranks, slurm_address

# A rank may wait as long as rank 0 saves or tokenises; a dead one is noticed by other means.
TIMEOUT = timedelta(hours=2)
LOST = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused",
    "socket closed", "remote process exited", "connection was likely closed", "timed out waiting",
)  # fmt: skip
T = TypeVar("T")


def join_group(ranks: Ranks, device: Literal["cpu", "cuda"]) -> None:
    """Meet the other processes. With GPUs each process takes the one of its local rank.

    Raises UserError when there are more processes than GPUs, RunFailed when the others cannot be reached.
    """
    if device == "cuda":
        if ranks.local_size > torch.cuda.device_count():
            raise UserError(
                f"hardware.processes: {ranks.local_size} processes on {torch.cuda.device_count()} GPUs",
                hint="give each process a GPU of its own: hardware.processes: auto",
            )
        torch.cuda.set_device(ranks.local_rank)
    # torch's own sharding and DeepSpeed call what torch is about to rename, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if ranks.size == 1:
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    if "MASTER_ADDR" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ.update(slurm_address(os.environ))
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(
            _backend(device),
            init_method=f"tcp://{place}",
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=TIMEOUT,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RunFailed(
            f"rank {ranks.rank} of {ranks.size} cannot meet the others at {place}: "
            f"{str(error).splitlines()[0]}",
            hint="is the first machine running, its name known here and its port open?",
        ) from error


def _backend(device: str) -> str:
    return "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share(value: T | None, ranks: Ranks) -> T:
    """Rank 0's `value` on every rank."""
    sent = [value if ranks.first else None]
    if ranks.size > 1:
        dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    assert sent[0] is not None
    return sent[0]


def wait_for_all(ranks: Ranks) -> None:
    if ranks.size > 1:
        sum_over(ranks, [0.0])


def sum_over(ranks: Ranks, values: Sequence[float]) -> list[float]:
    """Each value summed over the ranks in fp64 and in the ranks' order: the same bits on all, every time."""
    if not values:
        return []
    mine = torch.tensor([*values], dtype=torch.float64)
    found = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(found, mine)
    return [sum(column) for column in zip(*(row.tolist() for row in found), strict=True)]


def is_lost_peer(error: BaseException) -> bool:
    """True for what a collective raises when another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in LOST)

"""Which of several processes this one is, and which micro-batches it computes. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import UserError

GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """rank: of this process among `size`; local_rank: among the `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def ranks_from(env: Mapping[str, str]) -> Ranks:
    """This process's place as torchrun, Slurm's srun or tunesmith itself tells it; one process if none does.

    Raises UserError when it is told in part only.
    """
    if "RANK" in env:
        return _torchrun_ranks(env)
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return _slurm_ranks(env)
    return Ranks()


def _torchrun_ranks(env: Mapping[str, str]) -> Ranks:
    missing = [name for name in GIVEN if name not in env]
    if missing:
        raise UserError(
            f"the environment names a rank but not {', '.join(missing)}",
            hint="start with 'tunesmith train', torchrun or srun, or unset RANK",
        )
    local, size = int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])
    return Ranks(int(env["RANK"]), size, local, int(env.get("LOCAL_WORLD_SIZE", size)))


def _slurm_ranks(env: Mapping[str, str]) -> Ranks:
    tasks = int(env["SLURM_STEP_NUM_TASKS"])
    local = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(tasks)))
    return Ranks(int(env["SLURM_PROCID"]), tasks, int(env["SLURM_LOCALID"]), int(re.split(r"[(,]", local)[0]))


def slurm_address(env: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for torch: the step's first node, and a port that is the job's own."""
    first = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
    if found := re.match(r"([^,\[]+)\[(\d+)", first):
        first = found[1] + found[2]
    port = 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    return {"MASTER_ADDR": first.split(",")[0], "MASTER_PORT": str(port)}


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Which micro-batches each rank computes: the largest first, so that ranks compute like sizes together.

    Rounds go forth and back, which evens out the sums. Every number comes once.
    """
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for at, number in enumerate(order):
        turn, place = divmod(at, num_ranks)
        hands[place if turn % 2 == 0 else num_ranks - 1 - place].append(number)
    return hands

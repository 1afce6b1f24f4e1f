"""Which process this is, and what it computes."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.core.errors import UserError
from tunesmith.model.batch import Batch, join
from tunesmith.train.parallel import shares_of
from tunesmith.train.ranks import Ranks, deal, ranks_from, slurm_address

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
    "SLURM_JOB_ID": "123456",
}


def test_ranks_from_torchrun_and_slurm() -> None:
    assert ranks_from(TORCHRUN) == ranks_from(SLURM) == Ranks(5, 8, 1, 4)
    assert not ranks_from(SLURM).first


def test_one_process_without_either() -> None:
    assert ranks_from({}) == Ranks(0, 1, 0, 1)
    # A batch script that calls tunesmith without srun is one process, however many tasks the job has.
    assert ranks_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Ranks()


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(UserError, match="names a rank but not WORLD_SIZE, MASTER_PORT"):
        ranks_from({name: TORCHRUN[name] for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR")})


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-04,07]", "gpu03"), ("a1,b2", "a1"), ("solo", "solo"), ("n[5,7]", "n5")]
)
def test_slurm_address(nodes: str, first: str) -> None:
    found = slurm_address(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert found == {"MASTER_ADDR": first, "MASTER_PORT": str(20000 + 123456 % 20000)}


def test_deal_gives_every_micro_batch_once_and_evens_out() -> None:
    sizes = [100, 5, 90, 40, 35, 60, 7]
    hands = deal(sizes, 3)
    assert sorted(number for hand in hands for number in hand) == list(range(7))
    assert hands == [[0, 6, 1], [2, 4], [5, 3]]
    loads = [sum(sizes[number] for number in hand) for hand in hands]
    assert loads == [112, 125, 100]


def test_deal_with_more_ranks_than_micro_batches() -> None:
    assert deal([3, 9], 4) == [[1], [0], [], []]


def batch_of(tokens: int) -> Batch:
    ids = np.arange(tokens)
    return join([(ids, ids)])


def test_even_shares_fill_up_with_what_does_not_count() -> None:
    batches = [batch_of(30), batch_of(10), batch_of(20)]
    shares = [shares_of(batches, Ranks(rank, 2), even=True) for rank in range(2)]
    assert [len(mine) for mine in shares] == [2, 2]
    counted = sorted(share.number for mine in shares for share in mine if share.counts)
    assert counted == [0, 1, 2]
    fillers = [share for mine in shares for share in mine if not share.counts]
    assert [share.number for share in fillers] == [1], "the smallest is the cheapest to compute in vain"
    assert all(batches[share.number] is share.batch for mine in shares for share in mine)


def test_uneven_shares_have_no_fillers() -> None:
    shares = [shares_of([batch_of(9)], Ranks(rank, 2), even=False) for rank in range(2)]
    assert [len(mine) for mine in shares] == [1, 0]
    assert shares_of([], Ranks(1, 2), even=True) == []

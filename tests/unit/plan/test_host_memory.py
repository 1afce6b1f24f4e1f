"""Host memory of a machine, and the blocks that pinned memory comes in."""

from __future__ import annotations

import pytest

from tunesmith.plan.host_memory import machine_bytes, pinned_block, staging_blocks

MIB = 1 << 20


def test_only_rank_0_gathers_what_is_saved() -> None:
    found = machine_bytes({"load": 10, "update": 3, "save": 50}, processes=4)
    assert found == {"load": 40, "update": 12, "save": 50 + 3 * 3}


def test_a_save_without_anything_kept_is_rank_0s_alone() -> None:
    assert machine_bytes({"save": 50}, processes=8) == {"save": 50}


def test_nothing_in_host_memory_takes_nothing() -> None:
    assert machine_bytes({}, processes=2) == {}


@pytest.mark.parametrize(
    ("num_bytes", "block"), [(0, 0), (1, 1), (3, 4), (4, 4), (29 * MIB, 32 * MIB), (33 * MIB, 64 * MIB)]
)
def test_pinned_memory_comes_in_powers_of_two(num_bytes: int, block: int) -> None:
    assert pinned_block(num_bytes) == block


def test_three_gradients_and_a_weight_are_on_their_way() -> None:
    assert staging_blocks([5] * 10, [5] * 10) == [8] * 4


def test_blocks_of_a_size_are_used_again_and_others_come_beside_them() -> None:
    # In flight: 100, 1, 1 and the weight of 100; then small ones alone.
    assert staging_blocks([100, 1, 1, 1], [100, 1, 1, 1]) == [128, 128, 1, 1, 1, 1]


def test_one_small_weight_takes_its_gradient_and_itself() -> None:
    assert staging_blocks([3], [6]) == [8, 4]

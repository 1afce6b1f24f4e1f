from __future__ import annotations

from pathlib import Path

from tunesmith.core.paths import free_bytes
from tunesmith.plan.disk import SMALL_FILES_BYTES, checkpoint_bytes, plan_disk, state_bytes


def test_checkpoint_is_weights_and_what_the_optimizer_keeps_of_each() -> None:
    assert state_bytes("adamw", 4) == 8 and state_bytes("adamw", 2) == 4
    assert state_bytes("adamw-offload", 2) == 12
    assert checkpoint_bytes(20, 10 * state_bytes("adamw", 2)) == 60
    # 256 weights: 2 codes each, and a scale for each average.
    assert checkpoint_bytes(512, 256 * state_bytes("adamw-8bit", 2)) == 512 + 2 * 256 + 2 * 4


def test_the_fullest_moment_holds_one_more_than_is_kept(tmp_path: Path) -> None:
    plan = plan_disk(tmp_path, checkpoint=100, keep=2, saves=9, export=7)
    assert plan.checkpoints_held == 3 and plan.needed_bytes == 307 + SMALL_FILES_BYTES and plan.fits
    assert plan_disk(tmp_path, checkpoint=100, keep=5, saves=1, export=0).checkpoints_held == 1
    assert (
        plan_disk(tmp_path, checkpoint=100, keep=2, saves=9, export=7, present=300).needed_bytes
        == 7 + SMALL_FILES_BYTES
    )


def test_more_than_free_does_not_fit_and_missing_folders_count_as_their_parent(tmp_path: Path) -> None:
    plan = plan_disk(tmp_path / "a" / "b", checkpoint=free_bytes(tmp_path) * 2, keep=1, saves=1, export=0)
    assert not plan.fits and plan.as_dict()["fits"] is False

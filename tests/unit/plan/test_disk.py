from __future__ import annotations

from pathlib import Path

from tests.small_disk import mounted
from tunesmith.core.paths import free_bytes
from tunesmith.plan.disk import (
    SMALL_FILES_BYTES,
    DiskPart,
    checkpoint_bytes,
    plan_disk,
    state_bytes,
    stored_rows,
    write_rate,
)


def test_checkpoint_is_weights_and_what_the_optimizer_keeps_of_each() -> None:
    assert state_bytes("adamw", 4) == 8 and state_bytes("adamw", 2) == 4
    assert state_bytes("adamw-offload", 2) == 12
    assert checkpoint_bytes(20, 10 * state_bytes("adamw", 2)) == 60
    # 256 weights: 2 codes each, and a scale for each average.
    assert checkpoint_bytes(512, 256 * state_bytes("adamw-8bit", 2)) == 512 + 2 * 256 + 2 * 4


def test_the_fullest_moment_holds_one_more_than_is_kept(tmp_path: Path) -> None:
    exports = [
        DiskPart(what="adapter", folder=tmp_path, num_bytes=7),
        DiskPart(what="merged", folder=tmp_path, num_bytes=1000, kind="later"),
        DiskPart(what="rows", folder=tmp_path, num_bytes=500, kind="there"),
    ]
    plan = plan_disk(tmp_path, checkpoint=100, keep=2, saves=9, exports=exports)
    assert plan.checkpoints_held == 3 and plan.needed_bytes == 307 + SMALL_FILES_BYTES and plan.fits
    assert plan.systems[0].later_bytes == 1000 and len(plan.systems) == 1
    assert plan_disk(tmp_path, checkpoint=100, keep=5, saves=1).checkpoints_held == 1
    resumed = plan_disk(tmp_path, checkpoint=100, keep=2, saves=9, exports=exports, present=300)
    assert resumed.needed_bytes == 7 + SMALL_FILES_BYTES


def test_more_than_free_does_not_fit_and_missing_folders_count_as_their_parent(tmp_path: Path) -> None:
    plan = plan_disk(tmp_path / "a" / "b", checkpoint=free_bytes(tmp_path) * 2, keep=1, saves=1)
    assert not plan.fits and plan.as_dict()["fits"] is False
    assert plan.full is plan.systems[0] and plan.full.folder == tmp_path / "a" / "b"


def test_what_an_export_may_need_later_refuses_nothing(tmp_path: Path) -> None:
    later = DiskPart(what="merged", folder=tmp_path, num_bytes=free_bytes(tmp_path) * 2, kind="later")
    assert plan_disk(tmp_path, checkpoint=100, keep=1, saves=1, exports=[later]).fits


def test_every_file_system_is_held_against_its_own_room(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", mib=4) as disk:
        fetched = DiskPart(what="weights", folder=disk / "cache", num_bytes=8 << 20)
        plan = plan_disk(tmp_path / "runs", checkpoint=100, keep=1, saves=1, elsewhere=[fetched])
        assert [system.fits for system in plan.systems] == [True, False]
        assert plan.full is not None and plan.full.folder == disk / "cache"
        assert plan.full.needed_bytes == 8 << 20 and plan.needed_bytes == 100 + SMALL_FILES_BYTES


def test_tokenised_rows() -> None:
    assert stored_rows(1000, 10) == 1000 * 5 + 10 * 72


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    assert write_rate(tmp_path / "run", num_bytes=1 << 20) > 0
    assert list((tmp_path / "run").iterdir()) == []

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder, manifest_holds, open_run, write_manifest


def checkpoint(run: RunFolder, step: int) -> Path:
    folder = run.checkpoint(step)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(bytes(range(200)))
    (folder / "state.json").write_text("{}")
    write_manifest(folder, step=step)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("")
    return run


def test_the_newest_whole_checkpoint_is_taken(run: RunFolder) -> None:
    paths = [checkpoint(run, step) for step in (5, 10, 1_000_000)]
    assert run.complete_checkpoints() == paths
    assert run.latest_checkpoint() == paths[-1]


@pytest.mark.parametrize(
    "harm", ["missing manifest", "torn manifest", "missing file", "short file", "flipped bit"]
)
def test_a_harmed_checkpoint_is_passed_over(run: RunFolder, harm: str) -> None:
    good, bad = checkpoint(run, 5), checkpoint(run, 10)
    weights = bad / "adapter" / "weights"
    if harm == "missing manifest":
        (bad / "manifest.json").unlink()
    elif harm == "torn manifest":
        (bad / "manifest.json").write_text((bad / "manifest.json").read_text()[:-20])
    elif harm == "missing file":
        weights.unlink()
    elif harm == "short file":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.write_bytes(bytes([1]) + weights.read_bytes()[1:])
    assert not manifest_holds(bad)
    assert run.latest_checkpoint() == good


def test_open_run_refuses_what_is_no_run(run: RunFolder, tmp_path: Path) -> None:
    assert open_run(run.path) == run
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path)

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import (
    RunFolder,
    manifest_fault,
    manifest_holds,
    open_run,
    read_manifest,
    write_manifest,
)


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


def test_what_is_wrong_is_named(run: RunFolder) -> None:
    folder = checkpoint(run, 5)
    assert manifest_fault(folder) is None
    weights = folder / "adapter" / "weights"
    weights.write_bytes(bytes([1]) + weights.read_bytes()[1:])
    assert manifest_fault(folder) == "adapter/weights is not as it was written (its hash)"
    weights.unlink()
    assert manifest_fault(folder) == "adapter/weights is missing"


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_byte_anywhere_in_the_manifest_breaks_nothing_else(run: RunFolder, seed: int) -> None:
    folder = checkpoint(run, 5)
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    raw = bytearray((folder / "manifest.json").read_bytes())
    draw = random.Random(seed)
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    (folder / "manifest.json").write_bytes(raw)
    found = read_manifest(folder)
    assert manifest_holds(folder) == (found is not None and found.get("files") == files)

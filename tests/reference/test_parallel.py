"""Two processes make the same steps as one, by every engine; and each reads the others' checkpoints."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from tests.reference.parallel_runs import (
    METHODS,
    PREDICTED,
    SAVED,
    STEPS,
    curve,
    pairs,
    run_all,
    run_bf16,
    train,
    train_in_bf16,
)
from tunesmith.core.run_folder import RunFolder, manifest_holds
from tunesmith.train.metrics import loss_curve
from tunesmith.train.ranks import Ranks

pytestmark = pytest.mark.slow

SOME = pairs(whole=False)
each = pytest.mark.parametrize(
    ("engine", "method"),
    [pytest.param(*pair, marks=() if pair in SOME else pytest.mark.whole) for pair in pairs(whole=True)],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, whole: bool) -> Path:
    """The runs of one process, then those of two, in folders by engine and method."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("parallel")
    for method in METHODS:
        train(out / f"single-{method}", "single", method, Ranks())
    spawn(run_all, args=(out, free_port(), 2, pairs(whole=whole)), nprocs=2)
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def curves(folder: Path, engine: str, method: str) -> dict[str, dict[str, float]]:
    found: dict[str, Any] = json.loads((folder / "curves.json").read_text())
    return found[f"{engine} {method}"]


def assert_close(found: dict[str, float], wanted: dict[str, float]) -> None:
    worst = max(abs(found[key] - wanted[key]) for key in wanted)
    assert found.keys() == wanted.keys()
    assert worst < 1e-5, f"largest difference {worst:.2g}"


@each
def test_curve_is_that_of_one_process(folder: Path, engine: str, method: str) -> None:
    wanted = curve(RunFolder(folder / f"single-{method}"))
    assert len(wanted) == 2 * STEPS + 3
    assert abs(wanted["eval 0"] - wanted[f"eval {STEPS}"]) > 1e-4, "nothing was learnt"
    assert_close(curves(folder, engine, method)["whole"], wanted)


@each
def test_goes_on_from_a_checkpoint_of_one_process(folder: Path, engine: str, method: str) -> None:
    wanted = curve(RunFolder(folder / f"single-{method}"))
    rest = {key: value for key, value in wanted.items() if int(key.split()[1]) > SAVED}
    assert len(rest) == 2 * (STEPS - SAVED) + 1
    assert_close(curves(folder, engine, method)["resumed"], rest)


@each
def test_one_process_goes_on_from_its_checkpoint(
    folder: Path, engine: str, method: str, tmp_path: Path
) -> None:
    found = RunFolder(folder / f"{engine}-{method}").checkpoint(SAVED)
    run = train(tmp_path / "run", "single", method, Ranks(), found)
    wanted = curve(RunFolder(folder / f"single-{method}"))
    assert_close(curve(run), {key: value for key, value in wanted.items() if int(key.split()[1]) > SAVED})


@each
def test_checkpoint_has_the_files_of_one_process(folder: Path, engine: str, method: str) -> None:
    mine, single = (RunFolder(folder / f"{name}-{method}").checkpoint(SAVED) for name in (engine, "single"))
    assert manifest_holds(mine)
    names = sorted(str(path.relative_to(single)) for path in single.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file())
    for name in names:
        if name.endswith(".safetensors"):
            found, wanted = load_file(mine / name), load_file(single / name)
            assert found.keys() == wanted.keys()
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")
        elif name not in ("manifest.json", "state.json"):
            assert (mine / name).read_bytes() == (single / name).read_bytes(), name


@each
def test_every_engine_predicts_the_size_of_a_checkpoint(folder: Path, engine: str, method: str) -> None:
    found, single = (
        int((folder / f"{name}-{method}" / PREDICTED).read_text()) for name in (engine, "single")
    )
    assert found == pytest.approx(single, rel=0.01)


def test_in_bf16_too_every_loss_is_that_of_one_process(tmp_path: Path) -> None:
    """A product that is rounded elsewhere than in one process is off by 1e-4 here."""
    spawn(run_bf16, args=(tmp_path, free_port()), nprocs=2)
    for method in METHODS:
        wanted = loss_curve(train_in_bf16(tmp_path / "single", "single", method, Ranks()).events)
        assert len(wanted) == STEPS
        for engine in ("ddp", "fsdp-3"):
            assert loss_curve(RunFolder(tmp_path / f"{engine}-{method}").events) == wanted, engine
        shutil.rmtree(tmp_path / "single")

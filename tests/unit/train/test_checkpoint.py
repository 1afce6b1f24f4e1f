"""Checkpoints on disk: room, leftovers, what is kept, and exact restoring."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.reference.conftest import make_model
from tests.small_disk import mounted
from tunesmith.core.errors import RunFailed
from tunesmith.core.run_folder import MANIFEST, RunFolder, manifest_holds
from tunesmith.model.adapters import attach_lora
from tunesmith.recipe.schema import Recipe
from tunesmith.train.checkpoint import (
    SaveFailed,
    State,
    clear_leftovers,
    folder_bytes,
    prune,
    restore,
    save,
    write,
)
from tunesmith.train.engine import SingleEngine
from tunesmith.train.objective import Supervised
from tunesmith.train.precision import LossScale


def lora() -> Any:
    return attach_lora(
        make_model("llama-tied"), rank=2, alpha=4, dropout=0.0, targets="all-linear", rslora=False, seed=0
    )


def engine_of(model: Any) -> SingleEngine:
    recipe = Recipe.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"sources": [{"path": "unused"}]},
            "train": {"weight_decay": 0.1, "precision": "fp32"},
        }
    )
    return SingleEngine(model, Supervised(), recipe)


def stepped(model: Any, steps: int = 3) -> SingleEngine:
    """An engine whose optimizer has taken steps with made-up gradients."""
    engine = engine_of(model)
    optimizer = engine.optimizer
    torch.manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return engine


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = lora()
    engine = stepped(model)
    state = State(step=3, tokens=77, supervised_tokens=12, loss=0.1 + 0.2, scale=LossScale(True, 512.0, 4, 1))
    folder = write(RunFolder(tmp_path), state, engine)
    assert manifest_holds(folder)
    other = lora()
    other_engine = engine_of(other)
    assert restore(folder, other_engine) == state
    for one, opt in ((model, engine.optimizer), (other, other_engine.optimizer)):
        torch.manual_seed(2)
        for group in opt.param_groups:
            group["lr"] = 1e-3
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        opt.step()
        one.eval()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_full_checkpoint_keeps_tied_weights_and_every_bit(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model("llama-tied")
    engine = stepped(model)
    folder = write(RunFolder(tmp_path), State(step=1), engine)
    found = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for (name, a), (_, b) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = lora()
    folder = write(RunFolder(tmp_path), State(), stepped(model))
    other = attach_lora(
        make_model("qwen3"), rank=2, alpha=4, dropout=0.0, targets=["q_proj"], rslora=False, seed=0
    )
    with pytest.raises(RunFailed, match="adapter is of another model"):
        restore(folder, engine_of(other))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    engine = stepped(model)
    for step in (1, 2, 3, 999_999, 1_000_000):
        write(run, State(step=step), engine)
    prune(run, 2)
    assert [path.name for path in run.complete_checkpoints()] == ["step-999999", "step-1000000"]
    prune(run, 5)
    assert len(run.complete_checkpoints()) == 2


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    whole = write(run, State(step=1), stepped(model))
    half = run.checkpoints / ".step-000002.partial-abc"
    half.mkdir()
    (half / "optimizer.safetensors").write_bytes(b"half")
    going = write(run, State(step=3), stepped(model))
    (going / MANIFEST).unlink()  # a removal that was cut short
    (tmp_path / ".report.md.x1y2z3").write_text("half a report")
    (tmp_path / "report.md").write_text("whole")
    clear_leftovers(run)
    assert list(run.checkpoints.iterdir()) == [whole]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "report.md"]


def test_saving_over_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    engine = stepped(model)
    folder = write(run, State(step=1), engine)
    before = copy.deepcopy((folder / "optimizer.safetensors").read_bytes())
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    write(run, State(step=1), engine)
    assert manifest_holds(folder) and (folder / "optimizer.safetensors").read_bytes() == before


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    engine = stepped(lora())
    engine.model = nn.Linear(2**24, 2**24, device="meta")  # a petabyte
    with pytest.raises(SaveFailed, match=r"a checkpoint needs 1024\.0 TiB") as refused:
        write(RunFolder(tmp_path), State(), engine)
    assert "keep_checkpoints" in (refused.value.hint or "")
    assert not list(RunFolder(tmp_path).checkpoints.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 16 MiB."""
    with mounted(tmp_path / "disk", mib=16) as folder:
        yield folder


def fill(folder: Path, *, leave: int) -> Path:
    """A file that leaves so many bytes of the disk free."""
    path = folder / "filler"
    path.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
    return path


def test_a_full_disk_takes_the_oldest_first_and_leaves_the_last_good_one(small_disk: Path) -> None:
    run, engine = RunFolder(small_disk), stepped(lora())
    first = save(run, State(step=1), engine, keep=2)
    size = folder_bytes(first)
    second = save(run, State(step=2), engine, keep=2)
    filler = fill(small_disk, leave=size // 2)
    third = save(run, State(step=3), engine, keep=2)  # in the place of the first
    assert run.complete_checkpoints() == [second, third]
    filler.unlink()
    fill(small_disk, leave=0)
    with pytest.raises(SaveFailed, match="of disk, ") as failed:
        save(run, State(step=4), engine, keep=1)
    assert failed.value.exit_code == 4 and "free space" in (failed.value.hint or "")
    assert run.complete_checkpoints() == [second, third]


def test_a_disk_that_fills_up_within_a_save_leaves_nothing_of_it(small_disk: Path) -> None:
    run, engine = RunFolder(small_disk), stepped(lora())
    good = write(run, State(step=1), engine)
    need = folder_bytes(good)
    # The next one is larger than the last: a moment twice as long.
    for value in engine.optimizer.state.values():
        value["exp_avg"] = torch.cat([value["exp_avg"], value["exp_avg"]])
    fill(small_disk, leave=need + 4096)
    with pytest.raises(SaveFailed, match=r"could not be written: .*; the earlier ones are untouched"):
        write(run, State(step=2), engine)
    assert list(run.checkpoints.iterdir()) == [good] and manifest_holds(good)

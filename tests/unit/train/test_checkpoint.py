"""Checkpoints on disk: room, leftovers, what is kept, and exact restoring."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.reference.conftest import make_model
from tunesmith.core.errors import RunFailed
from tunesmith.core.run_folder import MANIFEST, RunFolder, manifest_holds
from tunesmith.model.adapters import attach_lora
from tunesmith.recipe.schema import Train
from tunesmith.train.checkpoint import State, check_disk, clear_leftovers, prune, restore, save
from tunesmith.train.optim import make_optimizer
from tunesmith.train.precision import LossScale


def lora() -> Any:
    return attach_lora(
        make_model("llama-tied"), rank=2, alpha=4, dropout=0.0, targets="all-linear", rslora=False, seed=0
    )


def stepped(model: Any, steps: int = 3) -> torch.optim.Optimizer:
    """An optimizer that has taken steps with made-up gradients."""
    optimizer = make_optimizer(model, Train(weight_decay=0.1))
    torch.manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def test_restored_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = lora()
    optimizer = stepped(model)
    state = State(step=3, tokens=77, supervised_tokens=12, loss=0.1 + 0.2, scale=LossScale(True, 512.0, 4, 1))
    folder = save(RunFolder(tmp_path), state, model, optimizer)
    assert manifest_holds(folder)
    other = lora()
    other_optimizer = make_optimizer(other, Train(weight_decay=0.1))
    assert restore(folder, other, other_optimizer) == state
    for one, opt in ((model, optimizer), (other, other_optimizer)):
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
    optimizer = stepped(model)
    folder = save(RunFolder(tmp_path), State(step=1), model, optimizer)
    found = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    for (name, a), (_, b) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = lora()
    folder = save(RunFolder(tmp_path), State(), model, stepped(model))
    other = attach_lora(
        make_model("qwen3"), rank=2, alpha=4, dropout=0.0, targets=["q_proj"], rslora=False, seed=0
    )
    with pytest.raises(RunFailed, match="adapter is of another model"):
        restore(folder, other, make_optimizer(other, Train()))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    optimizer = stepped(model)
    for step in (1, 2, 3, 999_999, 1_000_000):
        save(run, State(step=step), model, optimizer)
    prune(run, 2)
    assert [path.name for path in run.complete_checkpoints()] == ["step-999999", "step-1000000"]
    prune(run, 5)
    assert len(run.complete_checkpoints()) == 2


def test_leftovers_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    whole = save(run, State(step=1), model, stepped(model))
    half = run.checkpoints / ".step-000002.partial-abc"
    half.mkdir()
    (half / "optimizer.safetensors").write_bytes(b"half")
    going = save(run, State(step=3), model, stepped(model))
    (going / MANIFEST).unlink()  # a removal that was cut short
    clear_leftovers(run)
    assert list(run.checkpoints.iterdir()) == [whole]


def test_saving_over_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path), lora()
    optimizer = stepped(model)
    folder = save(run, State(step=1), model, optimizer)
    before = copy.deepcopy((folder / "optimizer.safetensors").read_bytes())
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    save(run, State(step=1), model, optimizer)
    assert manifest_holds(folder) and (folder / "optimizer.safetensors").read_bytes() == before


def test_a_checkpoint_that_cannot_fit_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    huge = nn.Linear(2**24, 2**24, device="meta")  # a petabyte
    with pytest.raises(RunFailed, match=r"a checkpoint needs 3072\.0 TiB") as refused:
        check_disk(RunFolder(tmp_path), huge)
    assert "keep_checkpoints" in (refused.value.hint or "")

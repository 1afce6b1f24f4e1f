"""The reference's log-probabilities: of the base whatever was trained since, and kept where they are needed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_model
from tests.reference.test_preference import Setup, plain_logps, trainer_in
from tunesmith.core.errors import RunFailed
from tunesmith.core.paths import write_json
from tunesmith.model.adapters import attach_lora
from tunesmith.train.loop import Trainer
from tunesmith.train.reference import FILE, FOLDER

SETUP = Setup()
DPO = {"type": "dpo"}


def lora() -> Any:
    model = make_model("llama-tied")
    return attach_lora(model, rank=4, alpha=8, dropout=0.1, targets="all-linear", rslora=False, seed=0)


def prepare(trainer: Trainer, *, begun: bool = False) -> torch.Tensor:
    """[documents, 2] of the trainer's reference, after `prepare`."""
    trainer.objective.prepare(trainer.engine, trainer.task.run, begun=begun)
    reference = trainer.objective.reference  # type: ignore[attr-defined]
    return torch.cat([reference.of(batch) for batch in SETUP.documents()])


def base_logps() -> torch.Tensor:
    with torch.no_grad():
        pairs = [pair for step in SETUP.sets for micro in step for pair in micro]
        return plain_logps(make_model("llama-tied"), pairs)


def test_it_is_of_the_model_without_its_adapters(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, lora(), SETUP, DPO, 3)
    frozen = [parameter.requires_grad for parameter in trainer.task.model.parameters()]
    trainer.run()
    shutil.rmtree(trainer.task.run.path / FOLDER)
    trainer.objective.prepare(trainer.engine, trainer.task.run, begun=True)
    torch.testing.assert_close(prepare(trainer, begun=True), base_logps(), rtol=0, atol=1e-4)
    assert [parameter.requires_grad for parameter in trainer.task.model.parameters()] == frozen
    assert trainer.task.model.training


def test_a_trained_model_needs_what_was_kept(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, make_model("llama-tied"), SETUP, DPO, 2)
    trainer.run()
    kept = prepare(trainer, begun=True)
    torch.testing.assert_close(kept, base_logps(), rtol=0, atol=1e-4)
    folder = trainer.task.run.path / FOLDER
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8] + b"damaged!")
    with pytest.raises(RunFailed, match="missing or damaged") as caught:
        prepare(trainer, begun=True)
    assert "--fresh" in (caught.value.hint or "")


def test_the_next_run_on_the_same_model_and_data_takes_it_from_the_cache(tmp_path: Path) -> None:
    def trainer_of(name: str, digest: str) -> Trainer:
        trainer = trainer_in(tmp_path / name, make_model("llama-tied"), SETUP, DPO, 2)
        trainer.objective.reference.cache = tmp_path / "cache"  # type: ignore[attr-defined]
        files = {"model.safetensors": {"bytes": 1, "sha256": digest}}
        write_json(trainer.task.run.lock, {"model": {"files": files}, "versions": {"torch": "2"}})
        return trainer

    first, second, other = (trainer_of(name, digest) for name, digest in (("a", "x"), ("b", "x"), ("c", "y")))
    expected = prepare(first)
    for trainer, computes in ((second, False), (other, True)):
        calls = 0
        forward = trainer.engine.forward

        def counted(batch: Any, forward: Any = forward) -> Any:
            nonlocal calls
            calls += 1
            return forward(batch)

        trainer.engine.forward = counted  # type: ignore[method-assign]
        assert torch.equal(prepare(trainer), expected)
        assert bool(calls) == computes
        assert (trainer.task.run.path / FOLDER / FILE).is_file()
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2


def test_other_rows_are_not_taken_for_these(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, lora(), SETUP, DPO, 2)
    left = trainer.task.run.path / f".{FOLDER}.partial-killed"
    left.mkdir()
    prepare(trainer)
    assert not left.exists()
    fewer = copy.deepcopy(SETUP)
    fewer.sets[0][0].pop()
    again = trainer_in(tmp_path, lora(), fewer, DPO, 2)
    again.objective.prepare(again.engine, again.task.run, begun=False)
    assert len(again.objective.reference.table) == 11  # type: ignore[attr-defined]

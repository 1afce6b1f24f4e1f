"""One way to open all: models, runs, adapters, runs over runs, merged or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.make_run import make_run
from tunesmith.core.run_folder import write_manifest
from tunesmith.hub.builtin import BUILTIN
from tunesmith.hub.made import models_dir
from tunesmith.hub.sources import resolve_model
from tunesmith.workflows.open_model import open_model

IDS = torch.arange(50, 90)[None]


def logits(path: Path | str, **options: Any) -> torch.Tensor:
    opened = open_model(str(path), dtype=torch.float32, device="cpu", **options)
    with torch.inference_mode():
        return opened.model(IDS).logits


def by_peft(base: Path, *adapters: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with torch.inference_mode():
        return model.eval()(IDS).logits


def test_plain_model(tiny: Path) -> None:
    opened = open_model(str(tiny), dtype=torch.float32, device="cpu")
    assert (opened.adapter, opened.context_length, opened.name) == (None, 1024, tiny.name)
    torch.testing.assert_close(logits(tiny), by_peft(tiny), rtol=0, atol=0)


@pytest.mark.parametrize("merge", [False, True])
def test_run_with_its_adapter(tiny: Path, tmp_path: Path, merge: bool) -> None:
    run = make_run(tmp_path / "one", tiny)
    opened = open_model(str(run.path), dtype=torch.float32, device="cpu", merge=merge)
    assert isinstance(opened.model, PeftModel) is not merge
    assert opened.adapter == run.checkpoint(10) / "adapter"
    expected = by_peft(tiny, run.checkpoint(10) / "adapter")
    torch.testing.assert_close(logits(run.path, merge=merge), expected, rtol=1e-4, atol=1e-5)
    assert (expected - by_peft(tiny)).abs().max() > 0.01


@pytest.mark.parametrize("given", ["folder", "run"])
def test_given_adapter_takes_the_place_of_the_run_s_own(tiny: Path, tmp_path: Path, given: str) -> None:
    one, two = make_run(tmp_path / "one", tiny), make_run(tmp_path / "two", tiny, steps=(7,))
    adapter = two.checkpoint(7) / "adapter"
    found = logits(one.path, adapter=str(adapter if given == "folder" else two.path))
    torch.testing.assert_close(found, by_peft(tiny, adapter), rtol=1e-4, atol=1e-5)


def test_run_over_a_run(tiny: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny)
    second = make_run(tmp_path / "second", first.path)
    expected = by_peft(tiny, first.checkpoint(10) / "adapter", second.checkpoint(10) / "adapter")
    torch.testing.assert_close(logits(second.path), expected, rtol=1e-4, atol=1e-5)


def test_base_in_another_machine_s_cache_is_the_built_in_one(tiny: Path, tmp_path: Path) -> None:
    """A run made where the cache lay elsewhere: the folder is gone, its name says which model it was."""
    elsewhere = tmp_path / "elsewhere" / BUILTIN
    shutil.copytree(tiny, elsewhere)
    adapter = make_run(tmp_path / "one", elsewhere).checkpoint(10) / "adapter"
    shutil.copytree(elsewhere, models_dir() / BUILTIN)
    write_manifest(models_dir() / BUILTIN)
    shutil.rmtree(elsewhere)
    assert resolve_model(str(adapter)).folder == models_dir() / BUILTIN

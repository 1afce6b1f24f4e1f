"""What speed_up chooses, and what it refuses."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.reference.conftest import make_documents, make_model, one_batch
from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.adapters import attach_lora
from tunesmith.recipe.schema import Train
from tunesmith.train import compile as compiling
from tunesmith.train.objective import Supervised
from tunesmith.train.speed import speed_up

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}


def settings(**values: Any) -> Train:
    return Train.model_validate({"kernels": "torch", "compile": False} | values)


def test_fused_layers_are_the_default_and_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = attach_lora(make_model("qwen2"), **LORA, seed=0)
    speed = speed_up(model, settings())
    assert (speed.fused_layers, speed.lora_layers, speed.compiled_layers) == (2, 14, 0)
    assert speed.threads == torch.get_num_threads()
    assert speed.keeps_freed_memory
    assert "computing with" in capsys.readouterr().err
    assert not speed_up(make_model("qwen2"), settings(memory="low")).keeps_freed_memory


def test_liger_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"train\.kernels: 'liger'"):
        speed_up(make_model("qwen2"), settings(kernels="liger"))


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train\.compile: true"):
        speed_up(make_model("qwen2"), settings(compile=True))


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_compiler(), reason="no C++ compiler")
def test_compiled_layers_compute_the_same_for_batches_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    if "distutils" in sys.modules:  # another test's import; setuptools would refuse to come after it
        monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    plain, compiled = make_model("llama-tied"), make_model("llama-tied")
    attention.install(plain)
    attention.install(compiled)
    assert speed_up(compiled, settings(compile=True)).compiled_layers == 2
    for seed in range(3):
        batch = one_batch(make_documents(3 + seed, seed=seed))
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = Supervised().total(model, batch)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)

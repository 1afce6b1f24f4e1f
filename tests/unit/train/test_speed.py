"""What speed_up chooses, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import ROOT
from tests.reference.conftest import make_model
from tunesmith.core.errors import UserError
from tunesmith.model.adapters import attach_lora
from tunesmith.model.compiled_math import has_compiler
from tunesmith.recipe.schema import Train
from tunesmith.train.speed import speed_up

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}


def settings(**values: Any) -> Train:
    return Train.model_validate({"kernels": "torch", "compile": False} | values)


def test_fused_layers_are_the_default_and_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = attach_lora(make_model("qwen2"), **LORA, seed=0)
    speed = speed_up(model, settings())
    assert (speed.fused_layers, speed.lora_layers, speed.compiled) == (2, 14, False)
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


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiling_is_for_the_fused_layers() -> None:
    with pytest.raises(UserError, match=r"the layers of GPT2LMHeadModel instead"):
        speed_up(
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)), settings(compile=True)
        )


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_compiled_layers_compute_the_same_for_batches_of_any_length() -> None:
    command = [sys.executable, "-m", "tests.unit.train.compiled_layers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr

"""The plan of serving beside what serves: our own engine, transformers' `generate`, llama.cpp's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.export.test_gguf import FAMILIES, SMALL, make
from tunesmith.core.errors import UserError
from tunesmith.model import cpu_kernels
from tunesmith.model.config import load_config
from tunesmith.model.kv_cache import cache_room, weight_bytes
from tunesmith.model.live_tensors import LiveTensors
from tunesmith.plan.decoder import shape_of
from tunesmith.plan.generation import Generation, generation_peak
from tunesmith.plan.model_weights import model_weights
from tunesmith.plan.serving import gguf_bytes, local_weight_bytes
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.export_gguf import export_gguf, llama_quantize
from tunesmith.workflows.open_engine import load_engine
from tunesmith.workflows.plan_serving import plan_serving


@pytest.mark.parametrize(("weights", "requests"), [("fp32", 32), ("int8", 32), ("fp32", 4000)])
def test_our_engine_has_the_bytes_and_tokens_of_the_plan(tiny: Path, weights: Any, requests: int) -> None:
    """Few requests get what they can fill, many what there is room for."""
    wants = EngineWants(path=str(tiny), weights=weights, device="cpu", max_concurrent=requests)
    engine, _ = load_engine(wants)
    generator = engine._generator
    kernels = cpu_kernels.load()
    held = local_weight_bytes(
        model_weights(load_config(tiny)), weights, device="cpu", panel=kernels.panel_width if kernels else 1
    )
    assert held == weight_bytes(generator.model)
    total = 64 << 30
    plan = plan_serving(
        load_config(tiny), total_bytes=total, device="cpu", precision=weights, requests=requests
    )
    assert plan.cache_tokens == generator.cache_capacity
    room = cache_room("cpu", held, total) // plan.token_bytes
    assert generator.cache_capacity == min(requests * plan.max_length, room)
    assert plan.parts["weights"] == pytest.approx(held, rel=0.01)
    engine.close(grace_s=0)


def decoder(hidden: int, inner: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("prompt", "generated"), [(512, 4), (8, 96)])
def test_the_peak_of_transformers_generate(prompt: int, generated: int) -> None:
    """Tensors as the installed transformers holds them, weights left out: within 3%.

    It makes a mask of the prompt only because it is watched (masking_utils.is_tracing).
    """
    model = decoder(128, 512)
    ids = torch.randint(0, 512, (1, prompt))
    with LiveTensors() as live, torch.no_grad():
        for parameter in model.parameters():
            live.track(parameter, "weight")
        weights = live.live_bytes
        model.generate(ids, max_new_tokens=generated, do_sample=False, pad_token_id=0)
    call = Generation(prompt=prompt, generated=generated, each=4, attention="sdpa")
    predicted = generation_peak(shape_of(model.config), 0, call)
    mask = prompt * prompt if predicted.at == "prefill" else 0
    assert predicted.num_bytes + mask == pytest.approx(live.peak_bytes - weights, rel=0.03)


@pytest.mark.parametrize("fmt", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_has_the_bytes_of_the_plan(tmp_path: Path, family: str, fmt: str) -> None:
    """A head of its own, and one that is the embedding; biases."""
    config = FAMILIES[family]
    folder = export_gguf(str(make(config, tmp_path / "model")), quant=fmt, output=tmp_path / "gguf").folder
    assert gguf_bytes(model_weights(config), fmt) == tensor_bytes(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_quantize_chooses_the_types_of_the_plan(tmp_path: Path, tied: bool) -> None:
    try:
        llama_quantize("q4_k_m")
    except UserError as error:
        pytest.skip(str(error))
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 9}
    config = LlamaConfig(**(SMALL | sizes), tie_word_embeddings=tied)
    model = str(make(config, tmp_path / "model"))
    folder = export_gguf(model, quant="q4_k_m", output=tmp_path / "gguf").folder
    assert gguf_bytes(model_weights(config), "q4_k_m") == tensor_bytes(folder)


def tensor_bytes(folder: Path) -> int:
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors)

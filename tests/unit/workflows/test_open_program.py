"""Which engine is taken for what was asked, and what a program of others is told about the model."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.core.gpu import Gpu
from tunesmith.core.run_folder import RunFolder
from tunesmith.core.units import GIB
from tunesmith.model.weights import tensor_shapes
from tunesmith.serve.llamacpp_engine import LlamaCppDriver
from tunesmith.serve.vllm_engine import VllmDriver
from tunesmith.workflows import open_program as open_program_module
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.open_engine import open_engine
from tunesmith.workflows.open_program import open_program
from tunesmith.workflows.served_models import Facts, served_models
from tunesmith.workflows.start_engine import StartedEngine


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """With an adapter, and the GGUF file of an export (its content is llama.cpp's to read)."""
    run = make_run(tmp_path_factory.mktemp("runs") / "orders", tiny, steps=(5,))
    gguf = run.path / "export" / "gguf" / "bf16"
    gguf.mkdir(parents=True)
    (gguf / "orders.gguf").write_bytes(b"GGUF")
    (gguf / "export.json").write_text('{"step": 5}')
    return run


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that can be started stands in for programs that these tests never start."""
    monkeypatch.setenv("TUNESMITH_VLLM", sys.executable)
    monkeypatch.setenv("TUNESMITH_LLAMA_SERVER", "/bin/true")


def test_vllm_gets_the_base_and_the_adapter_beside_it(run: RunFolder, tiny: Path) -> None:
    engine, plain = open_program("vllm", EngineWants(path=str(run.path), max_concurrent=4, max_length=300))
    driver = engine._driver
    assert isinstance(driver, VllmDriver)
    assert driver.adapters_at_start == {"orders": run.checkpoint(5) / "adapter"}
    args = list(driver.command(8000, "key").args)
    assert args[args.index("serve") + 1] == str(tiny)
    assert args[args.index("--max-model-len") + 1] == "300"
    assert "key" not in args
    models = served_models(Facts.of(plain))
    assert list(models) == ["orders", "tiny-llama"]
    assert (models["orders"].max_length, models["orders"].stop_ids) == (300, (2,))


def test_vllm_gets_the_share_of_a_card_that_the_plan_works_out(
    run: RunFolder, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a card of 2 GiB, without CUDA graphs: weights, 8 slots for adapters, cache, dry run, rotary table, and
    0.25 GiB beside torch with a margin of 0.12."""
    gpu = Gpu(name="a card", memory_bytes=2 * GIB, memory_gb_s=0.0, multiprocessors=20, capability=(8, 9))
    monkeypatch.setattr(open_program_module, "first_gpu", lambda: gpu)
    monkeypatch.setattr(open_program_module, "gpu_memory", lambda: (2 * GIB, 2 * GIB))
    numbers = sum(math.prod(shape) for shape in tensor_shapes(tiny / "model.safetensors").values())
    ranks = 2 * 8 * (3 * 128 + 96 + 96 + 3 * 192 - 128)  # two layers: q, o; k, v; gate, up, down

    def share(args: str, **more: Any) -> float:
        monkeypatch.setenv("TUNESMITH_VLLM_ARGS", f"--enforce-eager --max-num-batched-tokens 512 {args}")
        engine, _ = open_program("vllm", EngineWants(path=str(run.path), max_concurrent=4, **more))
        driver = engine._driver
        assert isinstance(driver, VllmDriver)
        line = driver.command(8000, "key").args
        return float(line[line.index("--gpu-memory-utilization") + 1]) * 2 * GIB

    def needed(each: int, token: int) -> float:
        logits = 4 * 49152 * (14 + 4 - (2 if each == 4 else 0))
        states = (512 + 2 * 4) * 64 * each
        fixed = 0.37 * GIB + 8192 * 1024 + (1 << 17) + 1024 * 16 * each
        return fixed + logits + states + (numbers + 8 * ranks) * each + 4 * 1024 * token

    least = 2 * GIB / 10_000  # what is rounded down
    assert share("") == pytest.approx(needed(2, 256) - least / 2, abs=least)
    assert share("", precision="fp32") == pytest.approx(needed(4, 512) - least / 2, abs=least)
    assert share("--kv-cache-dtype fp8") == pytest.approx(needed(2, 128) - least / 2, abs=least)


def test_llamacpp_gets_the_exported_file_of_the_run(run: RunFolder) -> None:
    engine, plain = open_program("llamacpp", EngineWants(path=str(run.path), max_concurrent=4, threads=3))
    driver = engine._driver
    assert isinstance(driver, LlamaCppDriver)
    assert driver.model == run.path / "export" / "gguf" / "bf16" / "orders.gguf"
    assert (driver.slots, driver.threads, driver.max_length) == (4, 3, 1024)
    [model] = served_models(Facts.of(plain)).values()
    assert (model.name, model.adapter, model.origin["run"]) == ("orders", None, str(run.path))


NO_TORCH = """
import sys
sys.modules["torch"] = None
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.open_program import open_program
from tunesmith.workflows.served_models import Facts, served_models
for engine in ("vllm", "llamacpp"):
    _, plain = open_program(engine, EngineWants(path=sys.argv[1]))
    print(*served_models(Facts.of(plain)))
"""


def test_the_process_that_answers_needs_no_torch(run: RunFolder) -> None:
    command = [sys.executable, "-c", NO_TORCH, str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "orders tiny-llama\norders\n", done.stderr


def test_what_a_program_cannot_do_is_refused(run: RunFolder, tiny: Path, tmp_path: Path) -> None:
    wants = EngineWants(path=str(run.path))
    for engine, asked, words in (
        ("vllm", replace(wants, weights="int8"), "--weights"),
        ("vllm", replace(wants, cache_tokens=4096), "--cache-tokens"),
        ("vllm", replace(wants, merge=True), "whole weights"),
        ("vllm", replace(wants, max_length=2000), "context is 1024"),
        ("vllm", replace(wants, threads=2), "--threads 2"),
        ("llamacpp", replace(wants, weights="int8"), "--weights"),
        ("llamacpp", replace(wants, path=str(tmp_path / "nothing.gguf")), "no such file"),
    ):
        with pytest.raises(UserError, match=words):
            open_program(engine, asked)  # type: ignore[arg-type]


def test_options_of_our_own_engine_decide_for_it() -> None:
    def taken(engine: str, *, in_process: bool = False, replicas: int = 1, **wanted: object) -> str:
        wants = EngineWants(path="x", device="cpu", **wanted)  # type: ignore[arg-type]
        open_here = open_engine if in_process else None
        made = StartedEngine(wants, engine=engine, open_here=open_here, replicas=replicas)  # type: ignore[arg-type]
        return made._choice.engine

    assert taken("auto") == taken("auto", replicas=2) == taken("auto", weights="int8") == "local"
    assert taken("vllm") == "vllm"
    assert taken("llamacpp") == "llamacpp"
    for engine in ("vllm", "llamacpp"):
        with pytest.raises(UserError, match="--replicas: is for our own engine"):
            taken(engine, replicas=2)
        with pytest.raises(UserError, match="--in-process"):
            taken(engine, in_process=True)

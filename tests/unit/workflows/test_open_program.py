"""Which engine is taken for what was asked, and what a program of others is told about the model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.make_run import make_run
from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder
from tunesmith.recipe.schema import Serve
from tunesmith.serve.llamacpp_engine import LlamaCppDriver
from tunesmith.serve.vllm_engine import VllmDriver
from tunesmith.workflows.open_engine import EngineWants
from tunesmith.workflows.open_program import open_program
from tunesmith.workflows.serve import ServeOptions, engine_wants
from tunesmith.workflows.served_models import Facts, served_models
from tunesmith.workflows.start_engine import StartedEngine


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """With an adapter, and the GGUF file of an export (its content is llama.cpp's to read)."""
    run = make_run(tmp_path_factory.mktemp("runs") / "orders", tiny, steps=(5,))
    gguf = run.path / "export" / "gguf" / "bf16"
    gguf.mkdir(parents=True)
    (gguf / "orders.gguf").write_bytes(b"GGUF")
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


def test_llamacpp_gets_the_exported_file_of_the_run(run: RunFolder) -> None:
    engine, plain = open_program("llamacpp", EngineWants(path=str(run.path), max_concurrent=4, threads=3))
    driver = engine._driver
    assert isinstance(driver, LlamaCppDriver)
    assert driver.model == run.path / "export" / "gguf" / "bf16" / "orders.gguf"
    assert (driver.slots, driver.threads, driver.max_length) == (4, 3, 1024)
    [model] = served_models(Facts.of(plain)).values()
    assert (model.name, model.adapter, model.origin["run"]) == ("orders", None, str(run.path))


def test_what_a_program_cannot_do_is_refused(run: RunFolder, tiny: Path, tmp_path: Path) -> None:
    wants = EngineWants(path=str(run.path))
    for engine, asked, words in (
        ("vllm", replace(wants, weights="int8"), "--weights"),
        ("vllm", replace(wants, cache_tokens=4096), "--cache-tokens"),
        ("vllm", replace(wants, merge=True), "whole weights"),
        ("vllm", replace(wants, max_length=2000), "context is 1024"),
        ("llamacpp", replace(wants, path=str(tiny)), "no GGUF"),
        ("llamacpp", replace(wants, adapter=str(run.path)), "as GGUF files"),
        ("llamacpp", replace(wants, adapters={"a": str(run.path)}), "as GGUF files"),
    ):
        with pytest.raises(UserError, match=words):
            open_program(engine, asked)  # type: ignore[arg-type]


def test_options_of_our_own_engine_decide_for_it() -> None:
    def taken(engine: str, *, in_process: bool = False, replicas: int = 1, **wanted: object) -> str:
        wants = EngineWants(path="x", device="cpu", **wanted)  # type: ignore[arg-type]
        made = StartedEngine(wants, engine=engine, in_process=in_process, replicas=replicas)  # type: ignore[arg-type]
        return made._choice.engine

    assert taken("auto") == taken("auto", replicas=2) == taken("auto", weights="int8") == "local"
    assert taken("vllm") == "vllm"
    assert taken("llamacpp") == "llamacpp"
    for engine in ("vllm", "llamacpp"):
        with pytest.raises(UserError, match="--replicas: is for our own engine"):
            taken(engine, replicas=2)
        with pytest.raises(UserError, match="--in-process"):
            taken(engine, in_process=True)


def test_from_options_and_recipe_to_what_is_loaded(run: RunFolder) -> None:
    recipe = Serve(precision="fp32", max_length=256, model_name="named")
    wants = engine_wants("x", ServeOptions(), recipe)
    assert (wants.precision, wants.weights, wants.max_length, wants.model_name) == (
        "fp32",
        None,
        256,
        "named",
    )
    # The run's own precision gives way to --weights; the caller's is for the engine to refuse.
    assert engine_wants("x", ServeOptions(weights="bf16"), recipe).precision == "auto"
    clash = engine_wants("x", ServeOptions(weights="bf16", precision="fp32"), recipe)
    assert (clash.precision, clash.weights) == ("fp32", "bf16")
    # An adapter in place of the model's own gives the model its name.
    plain = Serve()
    assert engine_wants("x", ServeOptions(adapters=(str(run.path),)), plain).model_name == "orders"
    inside = str(run.checkpoint(5) / "adapter")
    assert engine_wants("x", ServeOptions(adapters=(inside,)), plain).model_name == "orders"
    assert engine_wants("x", ServeOptions(adapters=("/some/folder",)), plain).model_name == "folder"

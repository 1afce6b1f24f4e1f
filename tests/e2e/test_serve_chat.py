"""The chat command, and adapters behind chat and endpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.greedy import greedy
from tunesmith.model.adapters import attach_lora, save_adapter
from tunesmith.model.load import load_model
from tunesmith.model.template import encode_prompt

QUESTION = "What is the capital of France?"


def make_adapter(tiny: Path, folder: Path, *, size: float) -> Path:
    """A LoRA adapter of `tiny` with random weights of this size; 0 changes nothing."""
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    tuned = attach_lora(model, rank=4, alpha=8, dropout=0.0, targets="all-linear", rslora=False, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, size) if size else parameter.zero_()
    save_adapter(tuned, folder)
    return folder


def test_one_message_as_json_equals_transformers(smol: Path, cli: Any) -> None:
    said = cli.json("chat", smol, "--message", QUESTION, "--temperature", "0", "--max-tokens", "24")
    tokenizer = AutoTokenizer.from_pretrained(smol)
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    expected = greedy(model, prompt, 24)
    assert said["answer"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert (said["tokens"], said["prompt_tokens"]) == (len(expected), len(prompt))
    assert said["finish_reason"] == "stop"


def test_lines_from_stdin_share_a_history_until_reset(tiny: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "chat",
        str(tiny),
        "--temperature",
        "0",
        "--max-tokens",
        "6",
    ]
    lines = "hello\nhello\n/reset\nhello\n/nothing\n/exit\nnever asked\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'/nothing' is not a command" in done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    first = [{"role": "user", "content": "hello"}]
    answer = tokenizer.decode(greedy(model, encode_prompt(tokenizer, first), 6), skip_special_tokens=True)
    both = [*first, {"role": "assistant", "content": answer}, *first]
    second = tokenizer.decode(greedy(model, encode_prompt(tokenizer, both), 6), skip_special_tokens=True)
    assert done.stdout == f"{answer}\n{second}\n{answer}\n"


def test_json_needs_a_message(tiny: Path, cli: Any) -> None:
    done = cli("chat", tiny, "--json")
    assert done.returncode == 2
    assert "--message" in json.loads(done.stdout)["error"]["what"]


def test_chat_with_an_adapter_equals_transformers_with_peft(tiny: Path, tmp_path: Path, cli: Any) -> None:
    from peft import PeftModel

    adapter = make_adapter(tiny, tmp_path / "adapter", size=0.3)
    said = cli.json(
        "chat", tiny, "--adapter", adapter, "--message", "hello", "--temperature", "0", "--max-tokens", "12"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
    without = greedy(base, prompt, 12)
    expected = greedy(PeftModel.from_pretrained(base, adapter), prompt, 12)
    assert expected != without
    assert said["answer"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["chat", "--message", "hello"]])
def test_an_adapter_without_effect_is_refused(
    tiny: Path, tmp_path: Path, cli: Any, command: list[str]
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", size=0)
    done = cli(command[0], tiny, "--adapter", adapter, *command[1:], timeout=120)
    assert done.returncode == 2
    assert "changes nothing" in done.stderr

"""Exported GGUF files under the real llama.cpp, where it is installed: its tokens and greedy answers are ours."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig

from tests.unit.export.test_gguf import FAMILIES, SMALL, byte_level, make, sentencepiece
from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient
from tunesmith.export.gguf import BY_LLAMA_QUANTIZE
from tunesmith.export.gguf_tokenizer import probe_texts
from tunesmith.model.generate import generate
from tunesmith.model.limits import Limits
from tunesmith.model.load import load_model
from tunesmith.model.requests import SamplingParams
from tunesmith.serve.engine import Ask
from tunesmith.serve.http_engine import HttpEngine
from tunesmith.serve.llamacpp_engine import LlamaCppDriver
from tunesmith.serve.text import Detokenizer
from tunesmith.workflows.engines import llama_server
from tunesmith.workflows.export_gguf import export_gguf, llama_quantize


@pytest.fixture
def program() -> list[str]:
    try:
        return llama_server()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def quantize() -> str:
    try:
        return llama_quantize("q4_k_m")
    except UserError as error:
        pytest.skip(str(error))


def started(
    program: list[str], folder: Path, tokenizer: Any, tmp_path: Path, vocab: int, quant: str = "f32"
) -> HttpEngine:
    done = export_gguf(str(folder), quant=quant, output=tmp_path / "gguf")
    path = next(done.folder.glob("*.gguf"))
    driver = LlamaCppDriver(program, path, Detokenizer(tokenizer), 256, slots=2, threads=1)
    engine = HttpEngine(
        driver, probe=[5, 6], limits=Limits(256, vocab), log=tmp_path / "log", max_concurrent=2
    )
    engine.start()
    return engine


def tokenized(engine: HttpEngine, texts: Sequence[str]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        client = EventClient(engine._url, api_key=engine._key)
        bodies = [{"content": text, "add_special": True, "parse_special": True} for text in texts]
        found = [(await client.post("/tokenize", body))["tokens"] for body in bodies]
        await client.close()
        return found

    return asyncio.run(run())


def greedy(engine: HttpEngine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    async def run() -> list[list[int]]:
        got: list[list[int]] = [[] for _ in prompts]
        async for batch in engine.submit([Ask(prompt, params) for prompt in prompts]):
            for index, event in batch:
                if event.token_id is not None and event.token_id not in params.stop_ids:
                    got[index].append(event.token_id)
        return got

    return asyncio.run(run())


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_of_every_family(name: str, program: list[str], tmp_path: Path) -> None:
    folder = make(FAMILIES[name], tmp_path / "model")
    chance = random.Random(1)
    prompts = [[chance.randrange(3, 700) for _ in range(length)] for length in (1, 9, 30, 70, 120)]
    params = SamplingParams(max_new_tokens=20)
    expected = generate(load_model(folder, dtype=torch.float32, device="cpu"), prompts, params)
    engine = started(program, folder, byte_level(), tmp_path, 704)
    try:
        assert greedy(engine, prompts, params) == [one.ids for one in expected]
    finally:
        engine.close(grace_s=0)


@pytest.mark.parametrize("kind", ["byte-level", "legacy", "always", "never"])
def test_text_becomes_the_same_tokens(kind: str, program: list[str], tmp_path: Path) -> None:
    folder = make(FAMILIES["llama"], tmp_path / "model")
    tokenizer = byte_level() if kind == "byte-level" else sentencepiece(kind)
    tokenizer.save_pretrained(folder)
    engine = started(program, folder, tokenizer, tmp_path, 704)
    try:
        texts = [text for text in probe_texts() if kind != "always" or not text.startswith(" ")]
        texts += ["the cat the mat", "the cat</s>the mat"][: 1 if kind == "always" else 2]
        wrong = [
            (text, ours, theirs)
            for text, theirs in zip(texts, tokenized(engine, texts), strict=True)
            if (ours := list(tokenizer(text).input_ids)) != theirs
        ]
        assert not wrong, (len(wrong), wrong[0])
    finally:
        engine.close(grace_s=0)


def test_smollm2_answers_and_tokenises_as_trained(smol: Path, program: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol)
    chats = ["What is the capital of Italy?", "Write about cats 🐱🐱", "请用一句话说明什么是机器学习。"]
    prompts = [
        list(tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        ))
        for text in chats
    ]  # fmt: skip
    params = SamplingParams(max_new_tokens=24, stop_ids=(2,))
    expected = generate(load_model(smol, dtype=torch.float32, device="cpu"), prompts, params)
    engine = started(program, smol, tokenizer, tmp_path, 49152)
    try:
        assert greedy(engine, prompts, params) == [one.ids for one in expected]
        assert tokenized(engine, probe_texts()) == [tokenizer(text).input_ids for text in probe_texts()]
    finally:
        engine.close(grace_s=0)


@pytest.mark.parametrize("quant", BY_LLAMA_QUANTIZE)
def test_k_quants_of_the_real_program(quant: str, quantize: str, tmp_path: Path) -> None:
    """Blocks of 256 are used where rows have them; the values, tokenizer and stop token are the model's."""
    wide = LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 512}, tie_word_embeddings=True)
    folder = make(wide, tmp_path / "model")
    done = export_gguf(str(folder), quant=quant, output=tmp_path / "gguf")
    assert done.checks[0].passed and done.checks[0].difference > 0 and done.notes == ()
    file = gguf.GGUFReader(next(done.folder.glob("*.gguf")))
    assert {t.tensor_type.name for t in file.tensors if len(t.shape) > 1} <= {f"Q{n}_K" for n in range(2, 7)}
    assert len(list(done.folder.glob("*.gguf"))) == 1
    fields = file.fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.chat_template"].contents() == byte_level().chat_template


def test_rows_that_k_quants_do_not_divide_are_noted(quantize: str, tmp_path: Path) -> None:
    folder = make(FAMILIES["llama"], tmp_path / "model")
    (note,) = export_gguf(str(folder), quant="q4_k_m", output=tmp_path / "gguf").notes
    assert note.startswith(
        "q4_k_m has blocks of 256: llama.cpp stores 16 of 16 matrices, with rows of 64, 96"
    )


def test_smollm2_of_4_bits_answers_and_stops(
    smol: Path, program: list[str], quantize: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol)
    text = "What is 2 + 2?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    params = SamplingParams(max_new_tokens=48, stop_ids=(2,))
    engine = started(program, smol, tokenizer, tmp_path, 49152, "q4_k_m")
    try:
        (answer,) = greedy(engine, [list(prompt)], params)
        assert "4" in tokenizer.decode(answer) and len(answer) < 48
    finally:
        engine.close(grace_s=0)

"""GGUF files: dequantised once into the cache as a plain bf16 safetensors model with its tokenizer."""

from __future__ import annotations

import gc
import importlib.util
import io
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tunesmith.core.errors import MissingExtra, UserError
from tunesmith.core.paths import sha256_file
from tunesmith.core.progress import say
from tunesmith.core.units import bytes_text
from tunesmith.hub.made import made_once
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import clean_tokenizer_config

SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Pre-tokenizers that set every digit apart before GPT-2's own pattern (llama.cpp, src/llama-vocab.cpp);
# transformers reads them as plain GPT-2, which would cut "2024" into other tokens than in pretraining.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"}

LIKE_GPT2 = {"", "default", "gpt-2", "mpt", "olmo", "jais", "phi-2"}


def is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def model_from_gguf(path: Path, *, progress: bool = True) -> ModelFiles:
    """The model in a GGUF file as a plain folder in the cache, keyed by the file's SHA-256.

    Raises UserError when the file is one part of several, damaged, or of an architecture that
    transformers cannot read from GGUF.
    """
    if SHARD.search(path.name):
        raise UserError(
            f"{path}: one part of a split GGUF", hint="join the parts first: llama-gguf-split --merge"
        )
    name = f"gguf-{sha256_file(path)[:32]}"
    size = path.stat().st_size

    def make(folder: Path) -> None:
        if progress:
            say(f"dequantise {path.name} ({bytes_text(size)}) into {folder.parent / name}, once")
        convert(path, folder)

    folder = made_once(name, make, need_bytes=5 * size)
    return ModelFiles(folder=folder, name=path.stem, source="gguf", origin=str(path), tokenizer=folder)


def convert(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`: config, bf16 safetensors, tokenizer, chat template."""
    check_reader()
    try:
        with quiet(), _without_gc():
            _convert(path, folder)
    except MemoryError:
        raise
    except Exception as error:  # the readers raise whatever a wrong byte leads them to
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: the GGUF file could not be read: {text[:300]}",
            hint="fetch it again if it is damaged, or use the model's original safetensors",
        ) from error


def check_reader() -> None:
    """Raise MissingExtra unless the packages that read a GGUF file are installed."""
    for package in ("gguf", "transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "train")


@contextmanager
def _without_gc() -> Iterator[None]:
    """The GGUF reader makes a million small objects; the collector looking at them doubles the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(str(path.parent), **place)
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        weights = AutoModelForCausalLM.from_pretrained(
            str(path.parent), config=config, dtype=torch.bfloat16, **place
        ).state_dict()
    plain = _plain_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=plain.bos_token_id, eos_token_id=plain.eos_token_id, pad_token_id=plain.pad_token_id
    )
    model.save_pretrained(folder)
    _save_tokenizer(path, folder, plain)


def _plain_config(config: Any) -> Any:
    """The configuration without traces of GGUF, and floats as they were before they became float32."""
    import numpy as np
    from transformers import AutoConfig

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: exact(item) for key, item in value.items()}
        if isinstance(value, float) and float(np.float32(value)) == value:
            return float(str(np.float32(value)))
        return value

    raw = exact(config.to_dict())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        raw.pop(key, None)
    return AutoConfig.for_model(raw.pop("model_type"), **raw)


def _save_tokenizer(path: Path, folder: Path, config: Any) -> None:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(path.parent), gguf_file=path.name, local_files_only=True
    )
    pre = _pre_tokenizer(path)
    like_gpt2 = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    if like_gpt2 and pre in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif like_gpt2 and pre not in LIKE_GPT2:
        say(
            f"warning: {path}: its pre-tokenizer '{pre}' is not known here; text is split as for GPT-2, "
            "which may give other tokens than in pretraining. The model's original folder has the true one."
        )
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    clean_tokenizer_config(folder / "tokenizer_config.json")


def _pre_tokenizer(path: Path) -> str:
    """`tokenizer.ggml.pre` of a GGUF file, or "".

    Looked up by its bytes (length and key, type 8 for text, length and text; all little-endian): the reader
    of the package gguf takes seconds for a vocabulary.
    """
    key = b"tokenizer.ggml.pre"
    mark = struct.pack("<Q", len(key)) + key + struct.pack("<I", 8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(mark)
        if found < 0:
            return ""
        begin = found + len(mark)
        (length,) = struct.unpack("<Q", content[begin : begin + 8])
        return content[begin + 8 : begin + 8 + length].decode()

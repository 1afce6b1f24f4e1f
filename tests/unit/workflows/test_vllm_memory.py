"""What vLLM is said to need of a card, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tunesmith.core.errors import UserError
from tunesmith.core.gpu import Gpu
from tunesmith.core.units import GIB
from tunesmith.workflows.vllm_memory import VllmOptions, vllm_memory, vllm_options

SIZES = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = LlamaConfig(**SIZES)
RTX3090 = Gpu(
    name="NVIDIA GeForce RTX 3090",
    memory_bytes=int(23.7 * GIB),
    memory_gb_s=936.0,
    multiprocessors=82,
    capability=(8, 6),
)
NUMBERS = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A safetensors file of 1000 numbers in bf16: the sizes of a model are its config's."""
    entry = {"dtype": "BF16", "shape": [10, 100], "data_offsets": [0, 2 * NUMBERS]}
    header = json.dumps({"a": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(2 * NUMBERS)
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


def test_options_are_read_as_vllm_reads_them() -> None:
    assert vllm_options("auto", []) == VllmOptions()
    args = ["-tp", "2", "--tensor_parallel_size=4", "--kv-cache-dtype", "fp8", "--enforce-eager"]
    args += ["--max-num-batched-tokens", "512", "-pp=2"]
    assert vllm_options("float32", args) == VllmOptions(
        tensor_parallel=4, pipeline_parallel=2, each=4, cache_each=1, tokens=512, eager=True
    )
    assert vllm_options("float32", ["--dtype", "bfloat16"]).each == 2
    assert vllm_options("auto", ["--max-num-batched-tokens", "16k"]).tokens == 0
    for given in (["-tp"], ["-tp", "two"], ["--tensor-parallel-size=0"]):
        with pytest.raises(UserError, match=r"\$TUNESMITH_VLLM_ARGS: --tensor-parallel-size"):
            vllm_options("auto", given)


def test_a_token_s_keys_and_values(folder: Path) -> None:
    """2 x 32 layers x 8 heads x 128 x 2 bytes; twice as many in fp32; fewer on each of several cards."""
    for options, expected in (
        (VllmOptions(), 131072),
        (VllmOptions(each=4, cache_each=4), 262144),
        (VllmOptions(cache_each=1), 65536),
        (VllmOptions(tensor_parallel=4), 32768),
        (VllmOptions(tensor_parallel=16), 16384),  # one of 8 heads on every card, copied
        (VllmOptions(pipeline_parallel=3), 131072 // 32 * 11),
    ):
        found = vllm_memory(folder, LLAMA_8B, options, gpu=None, sequences=1, lora_rank=16, lora_slots=8)
        assert found.token == expected
        assert found.other is None


def test_weights_by_the_format_served_and_by_card(folder: Path) -> None:
    def weights(config: LlamaConfig = LLAMA_8B, **options: int) -> int:
        wanted = VllmOptions(**options)
        return vllm_memory(folder, config, wanted, gpu=None, sequences=1, lora_rank=1, lora_slots=1).weights

    assert weights() == 2 * NUMBERS
    assert weights(each=4) == 4 * NUMBERS
    # Of two cards each has half of all but the norms: 65 x 4096 of 8,030,261,248 numbers.
    assert weights(tensor_parallel=2) == 1001
    packed = LlamaConfig(**SIZES, quantization_config={"quant_method": "awq"})
    assert weights(packed, each=4) == (folder / "model.safetensors").stat().st_size


def test_what_there_is_beside_weights_and_cache(folder: Path) -> None:
    """On a 3090, of vLLM with 2048 tokens a pass, the newest being the hungriest.

    Forward: 2048 x (3 x 14336 + 2 x (4096 + 2 x 1024) + 4 x 4096) x 2 bytes = 280 MiB, which is more than the
    logits of 8 sequences, and cuBLAS 8.125 MiB. Beside torch 0.25 GiB, graphs 0.9, margin 0.12 + 0.55; rotary
    table 8192 x 128 x 2 bytes. An adapter of rank 16: 41,943,040 numbers.
    """

    def other(slots: int = 0, **options: object) -> float:
        wanted = VllmOptions(**options)  # type: ignore[arg-type]
        found = vllm_memory(
            folder, LLAMA_8B, wanted, gpu=RTX3090, sequences=8, lora_rank=16, lora_slots=slots
        )
        assert found.other is not None
        return found.other / GIB

    dry = 2048 * (3 * 14336 + 2 * 6144 + 4 * 4096) * 2 + (8 << 20) + (1 << 17)
    expected = (dry + 8192 * 128 * 2) / GIB + 0.25 + 0.9 + 0.12 + 0.55
    assert other() == pytest.approx(expected, abs=1e-6)
    assert other(8) - other() == pytest.approx(8 * 41943040 * 2 / GIB)
    assert other() - other(eager=True) == pytest.approx(0.9 + 0.55, abs=1e-6)
    assert other(tokens=4096) > other()
    assert other(tensor_parallel=2) - other() == pytest.approx(
        0.4 - 0.25 + 1.5 - 0.12 - 2048 * (3 * 14336 + 2 * 6144) / GIB, abs=1e-6
    )  # no direct links on a card of 24 GB
    unknown = VllmOptions(tokens=0)
    assert (
        vllm_memory(folder, LLAMA_8B, unknown, gpu=RTX3090, sequences=8, lora_rank=16, lora_slots=8).other
        is None
    )


def test_a_model_without_attention_is_refused(folder: Path) -> None:
    from transformers import MambaConfig

    with pytest.raises(UserError, match="does not tell the sizes of keys and values"):
        vllm_memory(
            folder, MambaConfig(), VllmOptions(), gpu=RTX3090, sequences=8, lora_rank=16, lora_slots=8
        )

"""Packed weights: what each format stores, and its products against float64 on exactly those values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tunesmith.model import cpu_kernels
from tunesmith.model.served_weights import NF4, PackedLinear, WeightFormat, WideEmbedding, pack_weights

FORMATS: list[WeightFormat] = ["fp32", "bf16", "int8", "nf4"]
# (outputs, inputs): whole panels and blocks, neither, and one of each.
SHAPES = [(96, 128), (50, 70), (1, 64)]
ROWS = [1, 2, 3, 4, 12, 13, 32, 200]
both_ways = pytest.mark.parametrize("way", ["kernels", "torch"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the kernels or on torch's operations alone."""
    if request.param == "kernels" and cpu_kernels.load() is None:
        pytest.skip("no C++ compiler here")
    if request.param == "torch":
        monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    yield request.param


def linear(outputs: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(outputs)
        return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_products(way: str, format: WeightFormat, shape: tuple[int, int], bias: bool) -> None:
    plain = linear(*shape, bias=bias)
    packed = PackedLinear(plain, format)
    weight, added = packed.weight.double(), plain.bias.double() if bias else 0.0
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(packed(x).double(), x.double() @ weight.T + added, atol=1e-5, rtol=1e-5)
    assert packed(torch.randn(2, 3, shape[1]).bfloat16()).shape == (2, 3, shape[0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_rows_product_depends_on_no_other_row(format: WeightFormat) -> None:
    if cpu_kernels.load() is None:
        pytest.skip("no C++ compiler here")
    packed = PackedLinear(linear(200, 576), format)
    x = torch.randn(200, 576)
    whole = packed(x)
    for first, count in ((0, 1), (1, 2), (5, 3), (17, 12), (60, 13), (3, 100)):
        assert torch.equal(packed(x[first : first + count]), whole[first : first + count])


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_formats_store(way: str, shape: tuple[int, int]) -> None:
    plain = linear(*shape)
    weight = plain.weight
    assert torch.equal(PackedLinear(plain, "fp32").weight, weight)
    assert torch.equal(PackedLinear(plain, "bf16").weight, weight.bfloat16().float())
    int8 = PackedLinear(plain, "int8").weight
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((int8 - weight).abs() <= step * 0.5001).all()
    torch.testing.assert_close((int8 / step).round() * step, int8)
    nf4 = PackedLinear(plain, "nf4").weight
    for row, stored in zip(weight, nf4, strict=True):
        for block, values in zip(row.split(64), stored.split(64), strict=True):
            nearest = (block[:, None] / block.abs().max() - NF4).abs().amin(1)
            torch.testing.assert_close((block - values).abs() / block.abs().max(), nearest, atol=1e-6, rtol=0)


@both_ways
def test_nf4_has_the_values_of_bitsandbytes(way: str) -> None:
    plain = linear(96, 192)
    codes, state = bnb.quantize_4bit(plain.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(PackedLinear(plain, "nf4").weight, bnb.dequantize_4bit(codes, state))


def test_a_row_of_zeros_stays_zero() -> None:
    plain = linear(40, 64)
    plain.weight[3] = 0
    for format in FORMATS:
        assert not PackedLinear(plain, format).weight[3].any()


def test_relative_error_of_products() -> None:
    """Against float64 products with the unrounded weights: bf16 rounds to 8 bits, int8 and NF4 coarser."""
    plain = linear(576, 576)
    x = torch.randn(32, 576)
    exact = x.double() @ plain.weight.double().T
    errors = {f: float((PackedLinear(plain, f)(x) - exact).norm() / exact.norm()) for f in FORMATS}
    assert errors["fp32"] < 1e-6 < errors["bf16"] < 0.002 < errors["int8"] < 0.006 < errors["nf4"] < 0.1


@both_ways
def test_memory(way: str) -> None:
    plain = linear(1024, 640)
    bits = {format: PackedLinear(plain, format).num_bytes * 8 / plain.weight.numel() for format in FORMATS}
    assert bits == pytest.approx({"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4.5}, rel=0.01)


def test_a_model_is_packed_whole() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(300, (2, 9))
    with torch.inference_mode():
        wanted = model(ids).logits
    for format in FORMATS:
        packed = LlamaForCausalLM(config).eval()
        packed.load_state_dict(model.state_dict())
        assert pack_weights(packed.to(torch.bfloat16) if format == "bf16" else packed, format) == 2 * 7 + 1
        assert {p.dtype for n, p in packed.named_parameters() if "norm" in n} == {torch.float32}
        assert type(packed.get_input_embeddings()) is WideEmbedding
        head = packed.get_output_embeddings()
        assert isinstance(head, PackedLinear) and head.format == ("bf16" if format == "nf4" else format)
        with torch.inference_mode():
            found = packed(ids).logits
        assert found.dtype == torch.float32
        bound = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.02, "nf4": 0.2}[format]
        assert float((found - wanted).norm() / wanted.norm()) < bound

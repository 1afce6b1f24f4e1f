"""A model of which only the shapes are there: from its configuration alone, for what is traced and not run.

model = meta_model(config, torch.bfloat16)      on torch's meta device: adapters can be attached
quantise_shape(model, ...)
with FakeTensorMode(allow_non_fake_inputs=True):
    make_fake(model)                            now it computes, on fake tensors of the CPU
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunesmith.model.quant import load_bitsandbytes, quantised_names
from tunesmith.model.quiet import quiet

# bitsandbytes' blocks of weights that share a scale, and of scales that share one.
BLOCK, NESTED_BLOCK = 64, 256
CODES = {"nf4": 16, "nested": 256}


def with_layers(config: Any, layers: int | None) -> Any:
    """The configuration with so many decoder layers; None: as many as it has."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    if layers is None or layers == text.num_hidden_layers:
        return changed
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = [kinds[at % len(kinds)] for at in range(layers)]
    return changed


def meta_model(
    config: Any,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
    vocabulary: int = 0,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a configuration, without weights, in evaluation mode.

    vocabulary: it has at least so many rows.
    """
    config = with_layers(config, layers)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, vocabulary)
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model (no PeftModel); none where they go by another name."""
    layers = getattr(model.get_decoder(), "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def has_equal_layers(config: Any, *, trust_remote_code: bool = False) -> bool:
    """True for a model whose decoder layers have the same weights each, in number and shape."""
    key = config.to_json_string(), trust_remote_code
    if key not in _EQUAL:
        _EQUAL[key] = _has_equal_layers(config, trust_remote_code)
    return _EQUAL[key]


_EQUAL: dict[tuple[str, bool], bool] = {}


def _has_equal_layers(config: Any, trust_remote_code: bool) -> bool:
    layers = decoder_layers(meta_model(config, torch.bfloat16, trust_remote_code=trust_remote_code))
    kinds = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    return len(kinds) == 1


def quantise_shape(
    model: Any, *, compute_dtype: torch.dtype, double_quant: bool, keep: Sequence[str] = ()
) -> int:
    """What `model.quant.quantize` does, on shapes alone. Returns how many layers; raises MissingExtra."""
    bitsandbytes = load_bitsandbytes()
    names = quantised_names(model, keep)
    for name in names:
        model.set_submodule(
            name, _nf4_shape(bitsandbytes, model.get_submodule(name), compute_dtype, double_quant)
        )
    model.is_loaded_in_4bit = True
    return len(names)


def _nf4_shape(bitsandbytes: Any, linear: Any, compute_dtype: torch.dtype, double_quant: bool) -> Any:
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    count = linear.weight.numel()
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta")
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.compress_statistics, weight.quant_type = double_quant, "nf4"  # peft looks at them
    weight.quant_state = _state(bitsandbytes.functional.QuantState, linear.weight, double_quant)
    layer.weight = weight
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def _state(kind: Any, weight: Tensor, double_quant: bool) -> Any:
    blocks = -(-weight.numel() // BLOCK)
    nested = None
    if double_quant:
        scales = torch.empty(-(-blocks // NESTED_BLOCK), device="meta")
        code = torch.empty(CODES["nested"], device="meta")
        nested = kind(absmax=scales, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    return kind(
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32, device="meta"),
        shape=weight.shape,
        code=torch.empty(CODES["nf4"], device="meta"),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty((), device="meta") if double_quant else None,
        state2=nested,
    )


def make_fake(model: nn.Module, device: str = "cpu") -> None:
    """Put a tensor of `device` in place of every meta tensor: a fake one under FakeTensorMode, else one that
    holds whatever lay there."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = _fake_parameter(parameter, made, device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _fake(buffer, device)
        # transformers' rotary embedding keeps its table under two names, one of them no buffer.
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _fake(value, device))


def _fake_parameter(parameter: nn.Parameter, made: dict[int, Any], device: str) -> Any:
    """The same one for weights that are tied."""
    if id(parameter) not in made:
        fake = nn.Parameter(_fake(parameter, device), requires_grad=parameter.requires_grad)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            _fake_state(state, device)
            fake.quant_state = state  # type: ignore[attr-defined]
        made[id(parameter)] = parameter, fake
    return made[id(parameter)][1]


def _fake_state(state: Any, device: str) -> None:
    for part in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            value = getattr(part, name, None) if part is not None else None
            if value is not None:
                setattr(part, name, _fake(value, device))


def _fake(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

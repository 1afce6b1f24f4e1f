"""Four bits a frozen weight: NF4 with its constants quantised too (Dettmers et al. 2023, QLoRA,
arXiv:2305.14314), through bitsandbytes, on a GPU and on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft.helpers
import peft.import_utils
import torch
from torch import nn

from tunesmith.core.errors import MissingExtra
from tunesmith.core.optional import load


def quantize(
    model: Any,
    *,
    device: torch.device | str,
    compute_dtype: torch.dtype,
    double_quant: bool,
    keep: Sequence[str] = (),
) -> int:
    """Store the linear layers of `model` as NF4 on `device`, in place, and move all else there.

    Returns the number of layers. The output head stays as it is, and so do modules that `keep` names by the
    end of their dotted names, with all that they hold. Products are computed in `compute_dtype`. One layer
    after the other goes to the device, so that a GPU never holds the whole model unquantised. Raises
    MissingExtra without bitsandbytes.
    """
    bitsandbytes = load_bitsandbytes()
    layers = quantised_names(model, keep)
    for name in layers:
        layer = _nf4(bitsandbytes.nn, model.get_submodule(name), device, compute_dtype, double_quant)
        model.set_submodule(name, layer)
    model.to(device)
    model.is_loaded_in_4bit = True  # by this name peft knows such a model
    return len(layers)


def quantised_names(model: Any, keep: Sequence[str] = ()) -> list[str]:
    """The layers of `model` that `quantize` stores in four bits."""
    return [name for name, part in model.named_modules() if _is_quantised(name, part, model, keep)]


def _is_quantised(name: str, part: nn.Module, model: Any, keep: Sequence[str]) -> bool:
    kept = any(f".{name}.".find(f".{module}.") >= 0 for module in keep)
    return type(part) is nn.Linear and part is not model.get_output_embeddings() and not kept


def _nf4(
    kinds: Any, linear: Any, device: torch.device | str, compute_dtype: torch.dtype, double_quant: bool
) -> Any:
    layer = kinds.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    weight = kinds.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = weight.to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    # Else an evaluation on such a CPU repacks the weights in place, with other rounding ever after.
    layer.support_avx512bf16_for_cpu = False
    return layer.train(linear.training)


def load_bitsandbytes() -> Any:
    """bitsandbytes, and peft told that it is there, which it may have looked for in vain before.

    Raises MissingExtra.
    """
    try:
        found = load("bitsandbytes")
    except ImportError:
        raise MissingExtra("bitsandbytes", "qlora") from None
    peft.helpers.bnb = found
    for is_there in (peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available):
        is_there.cache_clear()
    return found


def product_of_four_bits(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What bitsandbytes' operation `gemm_4bit` computes, in the steps of which it consists on a CPU, as
    operations that can be followed one by one: the whole weight for a moment, and a product with it."""
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    product: torch.Tensor = _gemm_4bit_default_impl(*args, **kwargs)
    return product


def four_bit_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Of a layer of four bits its weight and the constants that belong to it; of another none."""
    weight = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if not isinstance(weight, torch.Tensor) or state is None:
        return []
    nested = getattr(state, "state2", None)
    found = [weight, state.absmax, state.code, getattr(state, "offset", None)]
    found += [nested.absmax, nested.code] if nested is not None else []
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]

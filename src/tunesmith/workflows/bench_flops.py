"""How much arithmetic a token of training costs, and how much a GPU could do."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from tunesmith.core.errors import UserError
from tunesmith.plan.cards import card_named


def flops_per_token(model: Path, method: str) -> float:
    """Floating-point operations of the weights' matrix products for one token of one training step.

    2 a weight in the forward pass, 2 for the gradient of its input and, in a full fine-tune, 2 for its own
    (Kaplan et al. 2020, appendix B; attention and adapters are left out). The embedding counts once, as the
    head: where it is not tied, the rows that are looked up cost nothing.
    """
    return (6.0 if method == "full" else 4.0) * matrix_weights(model)


def matrix_weights(model: Path) -> int:
    """Weights of all matrices that a token is multiplied with."""
    sizes: dict[str, int] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                shape = file.get_slice(name).get_shape()
                sizes[name] = shape[0] * shape[1] if len(shape) == 2 else 0
    has_head = any("lm_head" in name for name in sizes)
    return sum(size for name, size in sizes.items() if not (has_head and "embed_tokens" in name))


def peak_flops(gpu: str | None) -> float | None:
    """Dense bf16 products with fp32 sums that a GPU of that name does at its data sheet's rate, in
    floating-point operations per second; None without a GPU, and for one that has none or is not known."""
    if gpu is None:
        return None
    try:
        return card_named(gpu).rate("bf16") * 1e12
    except UserError:
        return None

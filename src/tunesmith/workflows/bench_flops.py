"""How much arithmetic a token of training costs, and how much a GPU could do."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

# Dense bf16 products with fp32 sums, floating-point operations per second, from the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A40": 149.7e12,
    "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


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
    """What a GPU of that name could do in a second; None for one that is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if gpu and name in gpu), None)

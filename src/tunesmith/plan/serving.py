"""What a served model holds: every weight in the format that it is stored in, and adapters.

Shapes alone; no weight is read. Shapes: N output features, I input features of a matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tunesmith.plan.allocator import LARGEST_SMALL, OWN_SEGMENT_FROM, round_block, segment_bytes

Kind = Literal["embedding", "head", "linear", "experts", "other"]
# vLLM pads the vocabulary so that it divides among the cards (vocab_parallel_embedding.py).
VOCAB_MULTIPLE = 64
GROUP = 128  # inputs that share a scale, of GPTQ and AWQ as they are published
NF4_BLOCK, NESTED_BLOCK = 64, 256
# Matrices whose inputs, not outputs, are divided among cards; by the last part of their names.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj", "dense_4h_to_h", "w2", "wo")
# Matrices of one input that engines keep as one.
FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight by name and shape. tied: a head that is the embedding, and takes room of its own only where it
    is stored anew."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    tied: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The module that it belongs to, without its parents."""
        return self.name.rpartition(".")[0].rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The number of its decoder layer."""
        found = re.search(r"\.(\d+)\.", self.name)
        return int(found.group(1)) if found else None


# -- formats -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored. plain: bytes of a number that stays as it is (embeddings, norms, biases, the
    head unless `head`); parts: bytes of each tensor that a matrix [N, I] becomes, None: it stays too."""

    plain: int
    parts: Callable[[int, int], tuple[int, ...]] | None = None
    head: bool = False


def _grouped(bits: int, *, order: bool) -> Callable[[int, int], tuple[int, ...]]:
    """GPTQ's and AWQ's layout: packed numbers, fp16 scales and packed zeros by group; order: GPTQ's g_idx."""

    def parts(outputs: int, inputs: int) -> tuple[int, ...]:
        groups = -(-inputs // GROUP)
        index = (4 * inputs,) if order else ()
        return (outputs * inputs * bits // 8, 2 * groups * outputs, groups * outputs * bits // 8, *index)

    return parts


def _nf4(outputs: int, inputs: int) -> tuple[int, ...]:
    """bitsandbytes: a scale in fp32 for every 64 numbers (Dettmers et al. 2023, arXiv:2305.14314)."""
    count = outputs * inputs
    return (-(-count // 2), 4 * -(-count // NF4_BLOCK))


def _nf4_double(outputs: int, inputs: int) -> tuple[int, ...]:
    """The scales in one byte, with a scale of their own for every 256."""
    packed, scales = _nf4(outputs, inputs)
    return (packed, scales // 4, 4 * -(-scales // 4 // NESTED_BLOCK))


FORMATS: dict[str, Format] = {
    "fp32": Format(4),
    "bf16": Format(2),
    "fp16": Format(2),
    # One fp32 scale an output: bitsandbytes' LLM.int8 and compressed-tensors' w8a8 alike.
    "int8": Format(2, lambda outputs, inputs: (outputs * inputs, 4 * outputs)),
    "fp8": Format(2, lambda outputs, inputs: (outputs * inputs, 4)),
    "nf4": Format(2, _nf4),
    "nf4-dq": Format(2, _nf4_double),
    "gptq-int4": Format(2, _grouped(4, order=True)),
    "gptq-int8": Format(2, _grouped(8, order=True)),
    "awq-int4": Format(2, _grouped(4, order=False)),
}


def tensor_bytes(weight: Weight, form: Format) -> tuple[int, ...]:
    """Bytes of each tensor that a weight is stored as; none for a tied head."""
    if weight.tied:
        return ()
    stays = weight.kind not in ("linear", "experts") and not (weight.kind == "head" and form.head)
    if stays or form.parts is None:
        return (weight.count * form.plain,)
    *several, outputs, inputs = weight.shape
    return tuple(part * math.prod(several) for part in form.parts(outputs, inputs))


def weight_bytes(weights: Iterable[Weight], form: Format, rounding: Callable[[int], int] = int) -> int:
    """Memory of all weights; rounding: of one tensor's bytes, as `held_bytes` for a GPU."""
    return sum(rounding(part) for weight in weights for part in tensor_bytes(weight, form))


def held_bytes(num_bytes: int) -> int:
    """What torch's CUDA allocator counts for a tensor that came when nothing was free, as weights do.

    A tensor of 10 MiB or more gets a segment of whole 2 MiB, and a rest of up to 1 MiB goes with it: for
    Llama-2-13B, whose MLP matrices are 135 MiB, that is 120 MiB.
    """
    block = round_block(num_bytes)
    if block < OWN_SEGMENT_FROM:
        return block
    rest = segment_bytes(block) - block
    return block + rest if rest <= LARGEST_SMALL else block


# -- our own engine ----------------------------------------------------------------------------------


def local_weight_bytes(
    weights: Iterable[Weight], stored: str, *, device: Literal["cpu", "cuda"], panel: int
) -> int:
    """As `served_weights.pack_weights` (CPU) and `quant.quantize` (GPU) store them; stored: fp32 … nf4.

    panel: outputs that the CPU's kernels keep together (cpu_kernels.Kernels.panel_width).
    """
    if device == "cuda" or stored == "fp16":
        return weight_bytes(weights, FORMATS["nf4-dq" if stored == "nf4" else stored])
    small = 4 if stored == "fp32" else 2
    total = 0
    for weight in weights:
        if weight.kind == "embedding":
            total += weight.count * small
        elif weight.kind in ("linear", "head"):
            total += _packed_bytes(weight, stored, panel)
        elif weight.name.endswith("_proj.bias"):
            total += 4 * (-(-weight.count // panel) * panel)
        else:
            total += weight.count * 4
    return total


def _packed_bytes(weight: Weight, stored: str, panel: int) -> int:
    """A matrix in the kernels' order; of nf4 the head stays bfloat16. A tied head is a copy."""
    outputs, inputs = weight.shape
    outputs = -(-outputs // panel) * panel
    if stored == "nf4" and weight.kind == "head":
        stored = "bf16"
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}[stored]
    scales = {"int8": 4, "nf4": 4 * -(-inputs // NF4_BLOCK)}.get(stored, 0)
    return outputs * inputs * bits // 8 + outputs * scales


# -- several cards -----------------------------------------------------------------------------------


def sharded(weights: Iterable[Weight], cards: int, kv_heads: int) -> list[Weight]:
    """What one of `cards` holds under tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053, vLLM's way).

    Key and value heads are copied where there are fewer than cards; norms are on all; the vocabulary is
    padded.
    """
    return [_shard(weight, cards, kv_heads) for weight in weights]


def _shard(weight: Weight, cards: int, kv_heads: int) -> Weight:
    if weight.kind in ("embedding", "head"):
        return _cut(weight, 0, cards, padded(weight.shape[0], VOCAB_MULTIPLE))
    if weight.kind == "experts":
        return _cut(weight, 1, cards)
    if weight.module in ROW_PARALLEL:
        return weight if weight.kind == "other" else _cut(weight, 1, cards)
    if weight.kind == "other" and not weight.name.endswith("_proj.bias"):
        return weight
    return _cut(weight, 0, min(cards, kv_heads) if weight.module in ("k_proj", "v_proj") else cards)


def _cut(weight: Weight, axis: int, parts: int, whole: int | None = None) -> Weight:
    sizes = list(weight.shape)
    sizes[axis] = -(-(whole or sizes[axis]) // parts)
    return replace(weight, shape=tuple(sizes))


def fused(weights: Iterable[Weight], groups: Sequence[str]) -> list[Weight]:
    """The weights of an engine that keeps each group of FUSED as one matrix."""
    found: dict[tuple[str, str], Weight] = {}
    for weight in weights:
        group = next((name for name in groups if weight.module in FUSED[name]), None)
        at, last = weight.name.rpartition(".")[0].rpartition(".")[0], weight.name.rpartition(".")[2]
        key = (weight.name, "") if group is None else (at, group + last)
        before = found.get(key)
        rows = weight.shape[0] + (before.shape[0] if before else 0)
        found[key] = replace(weight, shape=(rows, *weight.shape[1:])) if group else weight
    return list(found.values())


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# -- adapters ----------------------------------------------------------------------------------------


def adapter_bytes(
    weights: Iterable[Weight], rank: int, bytes_each: int, targets: Sequence[str] | None = None
) -> int:
    """A LoRA adapter of `rank` on the matrices of the modules `targets` (None: all but the head)."""
    matrices = [w for w in weights if w.kind == "linear" and (targets is None or w.module in targets)]
    return sum(rank * sum(w.shape) * bytes_each for w in matrices)


# -- llama.cpp ---------------------------------------------------------------------------------------

# Numbers of a block and its bytes (ggml-common.h).
GGML_TYPES = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q5_0": (32, 22), "q4_0": (32, 18),
    "q4_k": (256, 144), "q6_k": (256, 210),
}  # fmt: skip
# What takes the place of a type whose blocks do not divide a row.
GGML_FALLBACK = {"q4_k": "q5_0", "q6_k": "q8_0"}
GGUF_FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_k_m")


def gguf_bytes(weights: Sequence[Weight], fmt: str) -> int:
    """Tensor bytes of a GGUF file; what else is in it is the tokenizer. fmt: one of GGUF_FORMATS.

    q4_k_m as llama-quantize chooses types (llama-quant.cpp). A tied head is not in the file.
    """
    layers = 1 + max((weight.layer or 0 for weight in weights), default=0)
    tied = any(weight.tied for weight in weights)
    return sum(_gguf_tensor(weight, fmt, layers, tied) for weight in weights if not weight.tied)


def _gguf_tensor(weight: Weight, fmt: str, layers: int, tied: bool) -> int:
    if weight.kind == "other":
        return weight.count * 4
    kind = _q4_k_m(weight, layers, tied) if fmt == "q4_k_m" else fmt
    size, num_bytes = GGML_TYPES[kind]
    if weight.shape[-1] % size:
        kind = GGML_FALLBACK.get(kind, "f16")
        size, num_bytes = GGML_TYPES[kind]
    return weight.count // size * num_bytes


def _q4_k_m(weight: Weight, layers: int, tied: bool) -> str:
    if weight.kind == "head" or (weight.kind == "embedding" and tied):
        # A row that 256 does not divide goes to q8_0 by both ways.
        return "q6_k"
    at = weight.layer or 0
    more = at < layers // 8 or at >= 7 * layers // 8 or (at - layers // 8) % 3 == 2
    return "q6_k" if more and weight.module in ("v_proj", "down_proj") else "q4_k"

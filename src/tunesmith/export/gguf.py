"""Write a Llama, Mistral, Qwen2 or Qwen3 model as one GGUF file, and check the file against the model.

Shapes: H heads, D size of a head, E embedding.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tunesmith.core.errors import RunFailed, UserError
from tunesmith.export.gguf_tokenizer import GgufTokenizer
from tunesmith.model.config import context_length

# model_type of transformers: architecture of GGUF. Mistral's computation is Llama's.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# These rotate pairs of neighbours where transformers rotates halves, so rows of q and k are reordered.
PERMUTED = {"llama"}
ROPE_FACTORS = "rope_freqs.weight"

# The formats that the package gguf writes. Error of a value by its format, as a share of the largest
# value of its block of 32: half a step of the scale, a whole step where q*_0 has no code for the top, and
# the rounding of the scale to fp16.
BLOCK_BOUNDS = {"q8_0": 0.005, "q5_1": 0.04, "q5_0": 0.068, "q4_1": 0.075, "q4_0": 0.14}
PLAIN = ("f32", "f16", "bf16")
DIRECT = (*PLAIN, *BLOCK_BOUNDS)
# Those that only llama.cpp's own program writes.
BY_LLAMA_QUANTIZE = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
BLOCK = 32
K_BLOCK = 256  # of the k-quants
# Largest |stored - trained| / |trained| (Frobenius norms) of a tensor that still counts as the same one.
K_QUANT_BOUND = {"q2": 0.6, "q3": 0.35, "q4": 0.2, "q5": 0.1, "q6": 0.05}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GgufModel:
    """What goes into the file: the model's config and weights, its tokenizer, how it stops."""

    name: str
    config: Any
    state: Mapping[str, Tensor]
    tokenizer: GgufTokenizer
    chat_template: str | None
    bos_id: int | None
    pad_id: int | None
    eos_id: int | None
    stop_ids: tuple[int, ...]

    @property
    def architecture(self) -> str:
        return FAMILIES[self.config.model_type]


def check_family(config: Any) -> None:
    """Raise UserError unless llama.cpp computes what a model of this `config` computes."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(
            f"--to gguf: a '{kind}' model cannot be written", hint=f"possible are {', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        raise UserError(f"--to gguf: the activation '{config.hidden_act}' is not llama.cpp's for '{kind}'")
    if getattr(config, "mlp_bias", False):
        raise UserError("--to gguf: biases in the MLP (mlp_bias) are not llama.cpp's for this family")
    _rope(config)


def usable_context(config: Any) -> int:
    """Tokens up to which llama.cpp's full attention is the model's: its window where it slides one."""
    window: int | None = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is None or "sliding_attention" not in layers:
        return context_length(config)
    return min(context_length(config), window)


# -- writing -----------------------------------------------------------------------------------------


def write_gguf(model: GgufModel, path: Path, fmt: str) -> float:
    """Write `model` to `path` in a format of DIRECT, read it back, and return the worst tensor's error.

    The error is |stored - trained| / |trained| by Frobenius norms. Raises UserError for a weight that the
    family has no name for, RunFailed when the file does not hold the model.
    """
    import gguf

    writer = gguf.GGUFWriter(path, model.architecture)
    try:
        _write_facts(writer, model, fmt)
        plan = _plan(model, fmt)
        for entry in plan:
            writer.add_tensor_info(
                entry.name, entry.bytes_shape, entry.dtype, entry.num_bytes, raw_dtype=entry.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in plan:
            writer.write_tensor_data(gguf.quants.quantize(entry.values(), entry.kind))
    finally:
        writer.close()
    return check_gguf(model, path, fmt)


def estimated_bytes(num_values: int, fmt: str) -> int:
    """Upper bound of the file in `fmt`; one of llama-quantize counts with its f32 source."""
    per_value = {"f32": 4.0, "f16": 2.0, "bf16": 2.0}
    return int(num_values * per_value.get(fmt, 1.07 if fmt in DIRECT else 5.0))


def error_bound(fmt: str) -> float:
    """The most that |stored - trained| / |trained| of a tensor can be by the rounding of `fmt`."""
    if fmt in BLOCK_BOUNDS:
        return BLOCK_BOUNDS[fmt] * BLOCK**0.5  # all of a block's values as large as its largest error
    return {"f32": 0.0, "f16": 2.0**-10, "bf16": 2.0**-8}.get(fmt) or K_QUANT_BOUND.get(fmt[:2], 0.0)


def _write_facts(writer: Any, model: GgufModel, fmt: str) -> None:
    import gguf

    config = model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if fmt == 'f32' else 'MOSTLY'}_{fmt.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(usable_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    _write_rope(writer, config)
    _write_tokenizer(writer, model)


def _write_tokenizer(writer: Any, model: GgufModel) -> None:
    words = model.tokenizer
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.add_space_prefix is not None:
        writer.add_add_space_prefix(words.add_space_prefix)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    _write_special_ids(writer, model)
    if model.chat_template:
        writer.add_chat_template(model.chat_template)


def _write_special_ids(writer: Any, model: GgufModel) -> None:
    if model.bos_id is not None:
        writer.add_bos_token_id(model.bos_id)
    if model.pad_id is not None:
        writer.add_pad_token_id(model.pad_id)
    end, *more = end_ids(model)
    writer.add_eos_token_id(end)
    if more:
        writer.add_eot_token_id(more[0])
    if len(more) > 1:
        writer.add_eom_token_id(more[1])


def end_ids(model: GgufModel) -> list[int]:
    """The stop ids as GGUF names them: end of text, of a turn, of a message; more have no place there."""
    first = model.eos_id if model.eos_id in model.stop_ids else model.stop_ids[0]
    return [first, *(i for i in model.stop_ids if i != first)]


# -- rotary positions --------------------------------------------------------------------------------


def _rope(config: Any) -> dict[str, Any]:
    """The config's rope settings. Raises UserError for those that llama.cpp has in another form or not."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    more = {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow"}}
    odd = sorted(k for k, v in rope.items() if v is not None and k not in known | more.get(kind, set()))
    partial = rope.get("partial_rotary_factor", 1.0) != 1.0
    odd = [name for name in odd if name != "partial_rotary_factor" or partial]
    if kind not in ("default", "linear", "llama3", "yarn") or odd:
        what = f"rope of type '{kind}'" + (f" with {', '.join(odd)}" if odd else "")
        raise UserError(f"--to gguf: {what} cannot be written", hint="export it with --to merged")
    return rope


def _write_rope(writer: Any, config: Any) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _rope_factors(config: Any) -> Array | None:
    """Llama 3's division of each frequency [D / 2], by transformers' own formula; None for other types."""
    if _rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / scaled).numpy()


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# -- tensors -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file; heads: whether, and by how many heads, its rows are reordered for rope."""

    name: str
    source: Tensor
    kind: Any
    heads: int | None = None

    def values(self) -> Array:
        """float32, rows in the file's order."""
        array: Array = self.source.detach().to("cpu", torch.float32).numpy()
        return array if self.heads is None else neighbours(array, self.heads)

    @property
    def dtype(self) -> npt.DTypeLike:
        return {"F32": np.float32, "F16": np.float16}.get(self.kind.name, np.uint8)

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of what is stored: elements of F32 and F16, bytes of everything else."""
        import gguf

        shape = tuple(self.source.shape)
        if self.dtype is not np.uint8:
            return shape
        return tuple(gguf.quant_shape_to_byte_shape(shape, self.kind))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.bytes_shape)) * np.dtype(self.dtype).itemsize


def neighbours(rows: Array, heads: int) -> Array:
    """Rows [H * D, …] of q or k from halves (i, i + D/2) to neighbours (2i, 2i + 1) in each head."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _plan(model: GgufModel, fmt: str) -> list[_Entry]:
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.architecture.upper()], config.num_hidden_layers)
    plan = []
    factors = _rope_factors(config)
    if factors is not None:
        plan.append(_Entry(ROPE_FACTORS, torch.from_numpy(factors), gguf.GGMLQuantizationType.F32))
    for key, tensor in model.state.items():
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue  # llama.cpp takes the embeddings where there is no output tensor
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"--to gguf: the weight '{key}' has no place in a {model.architecture} file")
        plan.append(_Entry(name, tensor, _kind(name, tensor, fmt), heads_to_reorder(config, key)))
    return plan


def _kind(name: str, tensor: Tensor, fmt: str) -> Any:
    """Vectors stay fp32; embeddings and output get 8 bits in formats of 4 and 5; odd rows stay fp16."""
    import gguf

    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    if fmt in BLOCK_BOUNDS and tensor.shape[-1] % BLOCK:
        return gguf.GGMLQuantizationType.F16
    outer = name in ("token_embd.weight", "output.weight") and fmt in BLOCK_BOUNDS
    return gguf.GGMLQuantizationType["Q8_0" if outer else fmt.upper()]


def heads_to_reorder(config: Any, key: str) -> int | None:
    """By how many heads the rows of the weight `key` are reordered for rope; None where they are not."""
    if FAMILIES[config.model_type] not in PERMUTED:
        return None
    if ".q_proj." in key:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in key else None


# -- checking ----------------------------------------------------------------------------------------


def check_gguf(model: GgufModel, path: Path, fmt: str) -> float:
    """The largest error of a tensor in the file against the model, as write_gguf returns it.

    Raises RunFailed when a tensor is missing, not finite, or off by more than its format explains.
    """
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    plan = _plan(model, fmt if fmt in DIRECT else "f32")
    if {entry.name for entry in plan} != set(stored):
        odd = sorted({entry.name for entry in plan} ^ set(stored))
        raise _refused(path, f"its tensors are not the model's: {', '.join(odd[:3])}")
    return max(_check_tensor(path, entry, stored[entry.name], fmt) for entry in plan)


def _check_tensor(path: Path, entry: _Entry, stored: Any, fmt: str) -> float:
    import gguf

    wanted = entry.values()
    worst, size = 0.0, 0.0
    for rows, found in _chunks(wanted, stored.data):
        found = gguf.quants.dequantize(found, stored.tensor_type).astype(np.float32).reshape(rows.shape)
        if not np.isfinite(found).all():
            raise _refused(path, f"'{entry.name}' is not finite as {stored.tensor_type.name}")
        if not _within(rows, found, stored.tensor_type.name.lower()):
            raise _refused(path, f"'{entry.name}' is not what was written")
        worst += float(np.square(found - rows, dtype=np.float64).sum())
        size += float(np.square(rows, dtype=np.float64).sum())
    error = (worst / size) ** 0.5 if size else worst**0.5
    if fmt not in DIRECT and error > error_bound(fmt):
        raise _refused(path, f"'{entry.name}' is off by {error:.2g} of its size as {fmt}")
    return error


def _chunks(wanted: Array, stored: Array) -> Iterator[tuple[Array, Array]]:
    """Some rows of both at a time: a whole embedding in float64 would not fit beside the model."""
    step = max(1, 2**22 // max(1, wanted[0].size)) if wanted.ndim > 1 else len(wanted)
    for begin in range(0, len(wanted), step):
        yield wanted[begin : begin + step], stored[begin : begin + step]


def _within(wanted: Array, found: Array, kind: str) -> bool:
    if kind == "f32":
        return bool(np.array_equal(wanted, found))
    if kind in ("f16", "bf16"):
        unit = 2.0**-11 if kind == "f16" else 2.0**-8
        least = 2.0**-24 if kind == "f16" else 0.0  # fp16's smallest step
        return bool((np.abs(found - wanted) <= unit * np.abs(wanted) + least).all())
    if kind not in BLOCK_BOUNDS:
        return True  # k-quants: bounded by the whole tensor's error
    blocks = np.abs(wanted).reshape(-1, BLOCK)
    bound = BLOCK_BOUNDS[kind] * blocks.max(-1, keepdims=True) + 2.0**-22
    return bool((np.abs(found - wanted).reshape(-1, BLOCK) <= bound).all())


def _refused(path: Path, what: str) -> RunFailed:
    return RunFailed(
        f"the export was refused: {path.name}: {what}",
        hint="take another --quant (fp16 ends at 65504); check the disk if it happens again",
    )

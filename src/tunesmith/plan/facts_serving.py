"""Published peaks of serving, predicted from what a row says of its configuration.

    serve_hf     transformers' `generate`, or LitGPT's: torch's max_memory_allocated
    serve_vllm   vLLM's start-up log: all but the key/value cache, on each card

Rows are written by hand from many sources, so their texts are searched for words, never compared whole.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.cards import card_named
from tunesmith.plan.decoder import Shape
from tunesmith.plan.facts_types import Prediction, Row, Skipped, Unknown
from tunesmith.plan.generation import (
    CUBLAS_BYTES,
    CUBLAS_BYTES_HOPPER,
    V0,
    V1_SORTING,
    VLLM_BLOCK,
    CardKind,
    Generation,
    VllmRun,
    VllmVersion,
    card_kind,
    default_batch,
    generation_peak,
    vllm_activation,
    vllm_graphs,
    vllm_non_torch,
    vllm_version,
    weights_of_shape,
)
from tunesmith.plan.serving import (
    FORMATS,
    Format,
    Weight,
    fused,
    held_bytes,
    sharded,
    weight_bytes,
)

# Programs and formats whose memory follows rules of their own, which are not here.
OTHER_PROGRAMS = re.compile(
    r"llama\.?cpp|llama-server|ollama|gguf|\btgi\b|text-generation-inference|sglang|tensorrt|trt-?llm|lmdeploy"
    r"|\bmlx\b|exllamav2|unsloth|deepspeed",
    re.IGNORECASE,
)
OTHER_FORMATS = re.compile(
    r"hqq|exl2|aqlm|quip|mx-?fp|nv-?fp|gguf|\bq\d_|eetq|2of4|2:4|sparse", re.IGNORECASE
)
OTHER_MEASURES = re.compile(r"nvidia-smi|process|reserved", re.IGNORECASE)
# What a row's words on its weights mean, the first that is found. fp8-dynamic has a scale an output, as int8.
FORMAT_WORDS = (
    (r"(nf4|fp4|4-?bit).?dq|double.?quant", "nf4-dq"),
    (r"awq", "awq-int4"),
    (r"gptq[-_ ]?(int|w)?8", "gptq-int8"),
    (r"gptq|w4a16|marlin", "gptq-int4"),
    (r"nf4|fp4|4-?bit", "nf4"),
    (r"fp8[-_ ]?dyn|w8a16", "int8"),
    (r"fp8|float8", "fp8"),
    (r"w8a8|int8|8-?bit", "int8"),
    (r"int4", "gptq-int4"),
    (r"float32|fp32|32-true", "fp32"),
    (r"bf16|bfloat16|fp16|float16|16-true|half", "bf16"),
)
# Formats whose matrices are widened for the product of a prompt, and those that keep the room for it: the
# kernel of AutoGPTQ for four bits (exllama).
WIDENED, KEPT = ("nf4", "nf4-dq", "awq-int4"), ("gptq-int4",)
# Parameters beyond those of the decoder described, as a share: more is another architecture (experts).
UNNAMED_SHARE = 0.02
EXPERTS = "experts"
EXPERTS_CHOSEN = ("experts_per_token", "num_experts_per_tok", "active_experts", "top_k")
SHORT_PROMPT, SHORT_ANSWER = 16, 50


def predict_serving(row: Row) -> Prediction | Skipped:
    """The peak of a row of kind serve_hf or serve_vllm, from its configuration alone."""
    try:
        _check(row)
        shape = _shape(row)
        return _generate(row, shape) if row.get("kind") == "serve_hf" else _vllm(row, shape)
    except Unknown as error:
        return Skipped(str(error))


# -- what a row says ---------------------------------------------------------------------------------


def _check(row: Row) -> None:
    """Raises Unknown for what follows other rules than those here."""
    if row.get("kind") not in ("serve_hf", "serve_vllm"):
        raise Unknown(f"kind: '{row.get('kind')}' is not known")
    program = OTHER_PROGRAMS.search(_text(row, "notes", "source"))
    if program:
        raise Unknown(f"{program.group()}: its rules are not known")
    if row.get("peak_metric") is None:
        raise Unknown("no peak is given")
    if not isinstance(row.get("peak_extra") or {}, dict):
        raise Unknown(f"peak_extra: {row['peak_extra']!r} is no object")
    if OTHER_MEASURES.search(_text(row, "peak_metric")):
        raise Unknown(f"peak_metric: '{row['peak_metric']}' counts more than torch's tensors")
    if row.get("offload") not in (None, "none"):
        raise Unknown(f"offload: what '{row['offload']}' leaves on the card is not known")


def _shape(row: Row) -> Shape:
    found: dict[str, Any] = row.get("config") or {}
    needed = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    missing = [name for name in needed if not isinstance(found.get(name), int)]
    if missing:
        raise Unknown(f"config: {', '.join(missing)} not given")
    return Shape(
        **{name: found[name] for name in needed} | {"intermediate": _inner(found)},
        tied=bool(found.get("tied_embeddings")),
        gated=found.get("mlp", "gated") == "gated",
        qkv_bias=bool(found.get("qkv_bias")),
        qk_norm=bool(found.get("qk_norm")),
        norm="layer" if found.get("norm") == "ln" else "rms",
        norms_per_layer=found.get("norms_per_layer") or 2,
        context=found.get("max_position_embeddings") or max(_context(row), row.get("seq_len") or 0),
    )


def _inner(config: dict[str, Any]) -> int:
    """Width of what a token goes through in the MLP: of all the experts that it is sent to."""
    each = config.get("moe_intermediate") or config.get("moe_intermediate_size") or config["intermediate"]
    chosen = next((config[name] for name in EXPERTS_CHOSEN if config.get(name)), 0)
    return int(chosen * each if chosen else config["intermediate"])


def _context(row: Row) -> int:
    """Positions of the model, by its family; they decide on the rotary tables, some MiB."""
    name = _text(row, "model").lower()
    if re.search(r"llama-?3\.[1-3]", name):
        return 131072
    return 32768 if re.search(r"qwen|mistral|mixtral", name) else 4096


def _text(row: Row, *names: str) -> str:
    return " ".join(str(row.get(name) or "") for name in names)


def _release(text: str, program: str) -> tuple[int, int] | None:
    """The version that is written after the name of a program, such as `vLLM v0.19.0`."""
    found = re.search(program + r"(?:[ =(v]|version|release)*(\d+)\.(\d+)", text, re.IGNORECASE)
    return (int(found.group(1)), int(found.group(2))) if found else None


def _number_after(text: str, word: str) -> int | None:
    found = re.search(word + r"[ =:]*(\d+)", text, re.IGNORECASE)
    return int(found.group(1)) if found else None


def _each(row: Row) -> int:
    """Bytes of a number of the hidden states."""
    return 4 if re.search(r"float32|fp32|32-true", _text(row, "precision").split(";")[0]) else 2


def _format_name(row: Row) -> str:
    text = "; ".join(part for part in _precisions(row) if "kv" not in part)
    # What is said of the weights counts, not the format that is computed in.
    named = re.search(r"weights (.+)", text)
    text = named.group(1) if named else text
    quantised = "compressed-tensors" in text
    if quantised:  # which of its formats, only the checkpoint's name tells
        text = _text(row, "model", "source", "notes").lower()
    found = next((name for words, name in FORMAT_WORDS if re.search(words, text)), None)
    if found is None or OTHER_FORMATS.search(text) or (quantised and FORMATS[found].parts is None):
        raise Unknown(f"precision: '{row.get('precision')}' is not known")
    return found


def _precisions(row: Row) -> list[str]:
    return re.split(r"[;,] *", _text(row, "precision").lower())


def _cache_each(row: Row, each: int) -> int:
    """Bytes of a number of the keys and values; each: of the hidden states."""
    told = " ".join(part for part in _precisions(row) if "kv" in part)
    if re.search(r"int4|4-?bit|fp4", told):
        raise Unknown(f"precision: a cache in '{told}' is not known")
    if re.search(r"fp8|int8|8-?bit", told):
        return 1
    return 2 if re.search(r"16", told) else each


def _format(row: Row, *, head: bool = False) -> Format:
    return replace(FORMATS[_format_name(row)], plain=_each(row), head=head)


def _weights(row: Row, shape: Shape) -> list[Weight]:
    """The decoder's weights, and under one name what its number of parameters has beyond them."""
    weights = weights_of_shape(shape)
    given = (row.get("config") or {}).get("n_params")
    if not given:
        return weights
    rest = int(given) - sum(weight.count for weight in weights if not weight.tied)
    if abs(rest) <= UNNAMED_SHARE * given:
        return [*weights, Weight("rest", (max(rest, 0),), "other")]
    if rest < 0:
        raise Unknown(f"config: its sizes give more than n_params {given}")
    rows = rest // shape.hidden // shape.layers
    names = (f"model.layers.{at}.{EXPERTS}.weight" for at in range(shape.layers))
    return [*weights, *(Weight(name, (rows, shape.hidden), "linear") for name in names)]


def _largest(weights: list[Weight], *, head: bool) -> int:
    """Numbers of the largest matrix."""
    kinds = ("linear", "head") if head else ("linear",)
    return max(weight.count for weight in weights if weight.kind in kinds and weight.module != EXPERTS)


# -- generate ----------------------------------------------------------------------------------------


def _generate(row: Row, shape: Shape) -> Prediction:
    litgpt, name = "litgpt" in _text(row, "source", "notes").lower(), _format_name(row)
    cards = row.get("num_gpus") or 1
    weights = fused(_weights(row, shape), ["qkv"] if litgpt else [])
    widened = 2 * _largest(weights, head=litgpt)
    kept = (CUBLAS_BYTES_HOPPER if _card(row).is_hopper else CUBLAS_BYTES) + widened * (name in KEPT)
    kept = kept * cards + _rotary_tables(row, shape)
    call = _call(row, litgpt=litgpt)
    if name in WIDENED:
        # LitGPT widens to fp16 and that to bf16, the head's matrix too.
        call = replace(call, dequantised=widened * (2 if litgpt else 1))
    stored = weight_bytes(weights, _format(row, head=litgpt), held_bytes)
    peak = generation_peak(shape, stored + kept, call)
    whole = not re.search(r"per gpu|per card|rank 0", _text(row, "peak_metric").lower())
    return Prediction(peak.num_bytes / (1 if whole else cards) / GIB, peak.as_dict() | {"kept_bytes": kept})


def _call(row: Row, *, litgpt: bool) -> Generation:
    extra, notes = row.get("peak_extra") or {}, _text(row, "notes", "loss_impl")
    if (_number_after(notes, r"(?:num_)?beams?") or 1) > 1 or re.search(
        r"quanti[sz]ed (kv )?cache", notes, re.I
    ):
        raise Unknown("notes: beams and a quantised cache are not known")
    if _cache_each(row, _each(row)) != _each(row):
        raise Unknown("precision: a quantised cache is not known")
    prompt, generated = extra.get("input_tokens"), extra.get("generated_tokens")
    if prompt is None:
        if not re.search(r"short prompt|new tokens", notes) and row.get("seq_len") is None:
            raise Unknown("the lengths of prompt and answer are not given")
        generated = generated or _number_before(notes, "new tokens") or SHORT_ANSWER
        prompt = max(1, row["seq_len"] - generated) if row.get("seq_len") else SHORT_PROMPT
    return Generation(
        prompt=int(prompt),
        generated=int(generated or 0),
        batch=row.get("micro_batch") or 1,
        each=_each(row),
        full_logits=not litgpt and _full_logits(notes),
        attention=str(row.get("attention") or "flash_attention_2"),
        static_cache=litgpt or re.search(r"static[- ](kv[- ])?cache", notes, re.IGNORECASE) is not None,
    )


def _number_before(text: str, word: str) -> int | None:
    found = re.search(r"(\d+) " + word, text)
    return int(found.group(1)) if found else None


def _full_logits(notes: str) -> bool:
    if re.search(r"last[- ]token logits", notes, re.IGNORECASE):
        return False
    if re.search(r"full[- ](prompt |sequence )?(fp32 )?logits|logits of all", notes, re.IGNORECASE):
        return True
    return (_release(notes, "transformers") or (5, 0)) < (4, 45)


def _rotary_tables(row: Row, shape: Shape) -> int:
    """Sines and cosines of all positions, which every layer kept for itself before transformers 4.45, Llama's
    before 4.39."""
    release = _release(_text(row, "notes"), "transformers") or (5, 0)
    last = (4, 39) if "llama" in _text(row, "model").lower() else (4, 45)
    return 2 * shape.layers * shape.context * shape.head_dim * _each(row) if release < last else 0


# -- vLLM --------------------------------------------------------------------------------------------


def _vllm(row: Row, shape: Shape) -> Prediction:
    run = _vllm_run(row)
    stored = _vllm_weights(row, shape, run)
    activation, other = vllm_activation(shape, run, last=run.pipeline_parallel == 1), vllm_non_torch(run)
    graphs = vllm_graphs(run)
    # A metric that lists its parts without graphs has none.
    listed = "non-torch" in _text(row, "peak_metric") and "graph" not in _text(row, "peak_metric").lower()
    fixed = stored + other + (0 if listed else graphs)
    detail = {
        "weights_gib": round(stored / GIB, 3),
        "activation": activation.as_dict(),
        "non_torch_gib": round(other / GIB, 3),
        "vllm": run.version.name,
    }
    cache = _cache(row, shape, stored + other + graphs + vllm_activation(shape, run).num_bytes, run)
    return Prediction((fixed + activation.num_bytes) / GIB, detail | cache)


def _vllm_weights(row: Row, shape: Shape, run: VllmRun) -> int:
    """On the first card, with the table of rotary positions."""
    weights = _weights(row, shape)
    if run.pipeline_parallel > 1:
        layers = -(-shape.layers // run.pipeline_parallel)
        weights = [w for w in weights if w.kind != "head" and (w.layer is None or w.layer < layers)]
    if run.tensor_parallel > 1:
        weights = sharded(weights, run.tensor_parallel, shape.kv_heads)
    rotary = shape.context * shape.head_dim * run.each
    return rotary + weight_bytes(fused(weights, ["qkv", "gate_up"]), _format(row), held_bytes)


def _vllm_run(row: Row) -> VllmRun:
    notes, card, version = _text(row, "notes"), _card(row), _version(row)
    if re.search(r"(enable|max)[-_]loras?\b", notes):
        raise Unknown("notes: how much room adapters have is not given")
    if not card.num_bytes:
        raise Unknown(f"gpu: '{row.get('gpu')}' does not say how much memory it has")
    tokens, sequences = default_batch(card)
    if not version.chunked:
        if not row.get("seq_len"):
            raise Unknown("max_model_len is not given")
        tokens, sequences = max(2048, int(row["seq_len"])), 256
    tensor, pipeline = _parallel(row)
    return VllmRun(
        version=version,
        card=card,
        tokens=_number_after(notes, "max[-_]num[-_]batched[-_]tokens") or tokens,
        sequences=_number_after(notes, "max[-_]num[-_]seqs") or sequences,
        each=_each(row),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
    )


def _parallel(row: Row) -> tuple[int, int]:
    """Cards that share each layer, and that share the layers out."""
    text = _text(row, "parallelism")
    tensor, pipeline, data = (
        _number_after(text, rf"\b(?:{short}|{name}[- ]parallel(?:ism)?(?:[- ]size)?)") or 1
        for short, name in (("tp", "tensor"), ("pp", "pipeline"), ("dp", "data"))
    )
    if tensor * pipeline * data != (row.get("num_gpus") or tensor * pipeline * data):
        raise Unknown(f"parallelism: '{text}' does not say how {row['num_gpus']} cards share the model")
    return tensor, pipeline


def _version(row: Row) -> VllmVersion:
    """By its release, or by the year that is told: V1 came in 2025, 0.17 in 2026."""
    notes = _text(row, "notes", "source")
    release, year = _release(notes, "vllm"), re.search(r"\b(202\d)\b", notes)
    if re.search(r"\bV0\b|VLLM_USE_V1=0", notes):
        return V0
    if release is not None:
        found = vllm_version(*release)
        eager = re.search(r"enforce[-_]eager", notes) is not None
        return replace(found, counts_graphs=found.counts_graphs and not eager)
    if year is None or int(year.group(1)) > 2025:
        raise Unknown("notes: the release of vLLM is not given")
    return V1_SORTING if year.group(1) == "2025" else V0


def _card(row: Row) -> CardKind:
    """The card of the row's words, with the memory that they tell."""
    text = _text(row, "gpu")
    try:
        kind = card_kind(card_named(text.partition("(")[0].strip()))
    except UserError:
        kind = CardKind(num_bytes=0, is_hopper=bool(re.search(r"[hH][12]00", text)), is_a100="A100" in text)
    told = re.search(r"([\d.]+) ?GiB", text) or (None if kind.num_bytes else re.search(r"(\d+) ?GB", text))
    return replace(kind, num_bytes=int(float(told.group(1)) * GIB)) if told else kind


def _cache(row: Row, shape: Shape, taken: int, run: VllmRun) -> dict[str, Any]:
    """Tokens of the key/value cache, where the row says which share of the card vLLM may take."""
    share = (row.get("peak_extra") or {}).get("gpu_memory_utilization")
    if share is None:
        return {}
    each = _cache_each(row, run.each)
    layers = replace(shape, layers=-(-shape.layers // run.pipeline_parallel))
    page = VLLM_BLOCK * layers.token_bytes(each, run.tensor_parallel)
    return {"kv_cache_tokens": int((share * run.card.num_bytes - taken) // page) * VLLM_BLOCK}

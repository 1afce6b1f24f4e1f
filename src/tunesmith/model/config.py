"""What a model's config.json says, and whether it is a model that can be trained and served here.

Works where torch is not installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tunesmith.core.errors import UserError
from tunesmith.model.quiet import quiet
from tunesmith.model.tokenizer import load_error
from tunesmith.model.weights import read_json_file


def load_config(folder: Path, *, trust_remote_code: bool = False, quantized: bool = False) -> Any:
    """The configuration of the causal language model in `folder`.

    quantized: its weights may be. Raises UserError when it is no such model.
    """
    raw = read_json_file(folder / "config.json")
    name = str(raw.get("model_type", ""))
    known = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if raw.get("auto_map") and not known and not trust_remote_code:
        raise UserError(
            f"{folder}: the model '{name}' brings its own Python code, which is not run",
            hint="read that code, then set model.trust_remote_code: true, or choose a model that "
            f"transformers {transformers.__version__} knows",
        )
    if not known and not raw.get("auto_map"):
        raise _unknown_architecture(folder, name)
    if not quantized:
        _refuse_quantized(folder, raw)
    _refuse_other_heads(folder, raw)
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a wrong value in config.json surfaces as almost any type
        raise load_error(folder, "config.json", error, trust_remote_code) from error


def context_length(config: Any) -> int:
    """The most tokens that the model's positions allow; 2048 when its config does not say."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 2048


def token_bytes(config: Any, bytes_each: int) -> int:
    """Bytes of one token's keys and values in all layers, by a model's config; bytes_each: of a number."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * key_heads * size * bytes_each)


def _unknown_architecture(folder: Path, name: str) -> UserError:
    if not name:
        return UserError(f"{folder / 'config.json'}: has no 'model_type'", hint="is this a model folder?")
    return UserError(
        f"{folder}: transformers {transformers.__version__} knows no causal language model '{name}'",
        hint="check that it is a text-generating model; a newer transformers may know it",
    )


def _refuse_quantized(folder: Path, raw: dict[str, Any]) -> None:
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method:
        raise UserError(
            f"{folder}: its weights are already quantized ({method}), which cannot be trained or served here",
            hint="use the model's original bf16 or fp16 weights; vLLM serves such folders (--engine vllm)",
        )


def _refuse_other_heads(folder: Path, raw: dict[str, Any]) -> None:
    """A classifier or encoder of a known family would load with a random language-model head."""
    names = [str(name) for name in raw.get("architectures") or []]
    if names and not any(
        n.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for n in names
    ):
        raise UserError(
            f"{folder}: holds a {names[0]}, not a causal language model",
            hint="choose a model whose config.json names an architecture that ends in ForCausalLM",
        )

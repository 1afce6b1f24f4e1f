"""Shapes of well-known models, by name: to plan for a model of which no file is at hand.

As their makers' config.json files on the Hugging Face hub say; the sum of their weights is tested against the
published numbers of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from tunesmith.core.errors import UserError

TABLE = """
name            type    hidden layers heads kv ffn   vocab  tied positions theta
smollm2-135m    llama   576    30     9     3  1536  49152  yes  8192      100000
smollm2-360m    llama   960    32     15    5  2560  49152  yes  8192      100000
smollm2-1.7b    llama   2048   24     32    32 8192  49152  yes  8192      130000
qwen1.5-0.5b    qwen2   1024   24     16    16 2816  151936 yes  32768     1000000
qwen1.5-1.8b    qwen2   2048   24     16    16 5504  151936 no   32768     1000000
qwen1.5-4b      qwen2   2560   40     20    20 6912  151936 no   32768     5000000
qwen1.5-7b      qwen2   4096   32     32    32 11008 151936 no   32768     1000000
qwen1.5-14b     qwen2   5120   40     40    40 13696 152064 no   32768     1000000
qwen2.5-0.5b    qwen2   896    24     14    2  4864  151936 yes  32768     1000000
qwen2.5-1.5b    qwen2   1536   28     12    2  8960  151936 yes  32768     1000000
qwen2.5-3b      qwen2   2048   36     16    2  11008 151936 yes  32768     1000000
qwen2.5-7b      qwen2   3584   28     28    4  18944 152064 no   32768     1000000
qwen2.5-14b     qwen2   5120   48     40    8  13824 152064 no   32768     1000000
qwen2.5-32b     qwen2   5120   64     40    8  27648 152064 no   32768     1000000
qwen2.5-72b     qwen2   8192   80     64    8  29568 152064 no   32768     1000000
qwen3-0.6b      qwen3   1024   28     16    8  3072  151936 yes  40960     1000000
qwen3-1.7b      qwen3   2048   28     16    8  6144  151936 yes  40960     1000000
qwen3-4b        qwen3   2560   36     32    8  9728  151936 yes  40960     1000000
qwen3-8b        qwen3   4096   36     32    8  12288 151936 no   40960     1000000
qwen3-14b       qwen3   5120   40     40    8  17408 151936 no   40960     1000000
qwen3-32b       qwen3   5120   64     64    8  25600 151936 no   40960     1000000
llama-2-7b      llama   4096   32     32    32 11008 32000  no   4096      10000
llama-2-13b     llama   5120   40     40    40 13824 32000  no   4096      10000
llama-2-70b     llama   8192   80     64    8  28672 32000  no   4096      10000
llama-3-8b      llama   4096   32     32    8  14336 128256 no   8192      500000
llama-3.1-8b    llama   4096   32     32    8  14336 128256 no   131072    500000
llama-3.1-70b   llama   8192   80     64    8  28672 128256 no   131072    500000
llama-3.2-1b    llama   2048   16     32    8  8192  128256 yes  131072    500000
llama-3.2-3b    llama   3072   28     24    8  8192  128256 yes  131072    500000
mistral-7b-v0.1 mistral 4096   32     32    8  14336 32000  no   32768     10000
mistral-7b-v0.3 mistral 4096   32     32    8  14336 32768  no   32768     1000000
"""
QWEN3_HEAD_SIZE = 128
# Factor by which Llama 3.1 and 3.2 stretch the rotation of 8192 positions.
LLAMA3_FACTOR = {"llama-3.1-8b": 8.0, "llama-3.1-70b": 8.0, "llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0}
TUNED = re.compile(r"[- ](chat|instruct|base|hf)\b")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A dense decoder. model_type: of transformers; arguments: of that type's configuration class."""

    name: str
    model_type: str
    arguments: Mapping[str, Any]


def _read(line: str) -> Size:
    name, model_type, *figures, tied, positions, theta = line.split()
    hidden, layers, heads, kv_heads, ffn, vocabulary = map(int, figures)
    head_size = QWEN3_HEAD_SIZE if model_type == "qwen3" else hidden // heads
    # transformers' Qwen2 derives the size of a head and takes no argument for it
    head = {} if model_type == "qwen2" else {"head_dim": head_size}
    window = {"sliding_window": 4096 if name.endswith("v0.1") else None} if model_type == "mistral" else {}
    arguments = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied == "yes",
        "max_position_embeddings": int(positions),
        "rope_parameters": _rotation(name, float(theta)),
        **head,
        **window,
    }
    return Size(name=name, model_type=model_type, arguments=MappingProxyType(arguments))


def _rotation(name: str, theta: float) -> dict[str, Any]:
    if name not in LLAMA3_FACTOR:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": LLAMA3_FACTOR[name],
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


SIZES: Mapping[str, Size] = MappingProxyType(
    {size.name: size for size in map(_read, TABLE.strip().splitlines()[1:])}
)


def _key(text: str) -> str:
    """`Qwen/Qwen1.5-0.5B-Chat` -> `qwen1505b`; who published it goes, and what tells how it was tuned."""
    name = text.strip().lower().rpartition("/")[2].replace("meta-llama", "llama")
    return re.sub(r"[^a-z0-9]", "", TUNED.sub("", name))


_NAMED = {_key(name): size for name, size in SIZES.items()}


def size_named(text: str) -> Size:
    """The model that `text` means: `qwen1.5-0.5b`, `Qwen1.5 0.5B`, `Qwen/Qwen1.5-0.5B-Chat` are one.

    Raises UserError with the nearest names for one that is not in the table.
    """
    key = _key(text)
    if key in _NAMED:
        return _NAMED[key]
    near = [_NAMED[match].name for match in get_close_matches(key, _NAMED, n=3, cutoff=0.6)]
    likely = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"'{text}' is no model whose shape is known here",
        hint=f"{likely}known are {', '.join(SIZES)}; of any other, give the folder with its config.json",
    )


def config_of(name: str) -> Any:
    """The transformers configuration of a model of the table. Raises UserError as `size_named` does."""
    from transformers import AutoConfig

    size = size_named(name)
    return AutoConfig.for_model(size.model_type, **size.arguments)


def num_parameters(config: Any) -> int:
    """Weights of a Llama, Mistral, Qwen2 or Qwen3 model, tied ones once. Raises ValueError for others."""
    text = config.get_text_config()
    if text.model_type not in {size.model_type for size in SIZES.values()}:
        raise ValueError(f"the weights of a {text.model_type} model are not counted here")
    return _outer_parameters(text) + text.num_hidden_layers * _layer_parameters(text)


def _outer_parameters(text: Any) -> int:
    """Embedding, head and last norm."""
    matrices = 1 if text.tie_word_embeddings else 2
    return int(matrices * text.vocab_size * text.hidden_size + text.hidden_size)


def _layer_parameters(text: Any) -> int:
    hidden, heads, kv_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    attention = 2 * hidden * heads * size + 2 * hidden * kv_heads * size
    biases = (heads + 2 * kv_heads) * size * _has_qkv_bias(text) + hidden * _has_other_bias(text)
    head_norms = 2 * size if text.model_type == "qwen3" else 0
    ffn = 3 * hidden * text.intermediate_size
    ffn_biases = (2 * text.intermediate_size + hidden) * bool(getattr(text, "mlp_bias", False))
    return int(attention + biases + head_norms + ffn + ffn_biases + 2 * hidden)


def _has_qkv_bias(text: Any) -> bool:
    return text.model_type == "qwen2" or _has_other_bias(text)


def _has_other_bias(text: Any) -> bool:
    """Whether attention's output projection has a bias: Llama and Qwen3 may."""
    return bool(getattr(text, "attention_bias", False))

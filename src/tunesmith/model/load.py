"""A model and its tokenizer from a local transformers folder: safetensors only, nothing left random."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.loading import first_load
from tunesmith.core.units import bytes_text
from tunesmith.model.hardware import settle_vector_math
from tunesmith.model.new_tokens import add_tokens
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import (
    TOKENIZER_FILES,
    clean_tokenizer_config,
    has_tokenizer,
    read_json_file,
    tensor_shapes,
    weight_files,
)


def load_tokenizer(
    folder: Path,
    *,
    chat_template: Path | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
) -> Any:
    """The tokenizer in `folder`; `chat_template` (a Jinja file) replaces its own template.

    `new_tokens`: texts that are each one token from now on. A model without a chat template is given as it
    is: `tokenizer.chat_template` is None. Raises UserError when the files are missing or damaged, the
    template is not Jinja, or a new token is none.
    """
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: no tokenizer: none of {', '.join(TOKENIZER_FILES[:3])} is there",
            hint="copy the tokenizer files of the model into the folder",
        )
    try:
        # A known model's config class, by which its tokenizer is found, brings much else at its first use.
        with quiet(), first_load("torch._dynamo"):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise _load_error(folder, "tokenizer", error, trust_remote_code) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    add_tokens(tokenizer, new_tokens)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer and its chat template to `folder`, without traces of this machine."""
    tokenizer.save_pretrained(folder)
    clean_tokenizer_config(folder / "tokenizer_config.json")


def read_template(path: Path) -> str:
    """The text of a Jinja file. Raises UserError when it is missing or does not parse."""
    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"chat template {path}: {reason}", hint="check model.chat_template") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {path}, line {error.lineno}: {error.message}") from None
    return text


class _Generation(jinja2.ext.Extension):
    """Lets the `{% generation %}` blocks of transformers' templates parse."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
) -> Any:
    """The causal language model in `folder`, in evaluation mode, its weights as `dtype` on `device`.

    Every weight comes from the folder's safetensors. Raises UserError when a file is missing or
    damaged, the architecture is unknown or no causal language model, a weight is missing or has another
    shape, or `device` has not enough memory.
    """
    settle_vector_math()
    config = load_config(folder, trust_remote_code=trust_remote_code)
    files = weight_files(folder)
    for path in files:
        tensor_shapes(path)
    device = torch.device(device)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **({} if device.type == "cpu" else {"device_map": {"": device}}),
            )
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(folder, files, dtype, device) from error
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError …
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise _out_of_memory(folder, files, dtype, device) from error
        raise _load_error(folder, "model", error, trust_remote_code) from error
    _check_complete(folder, info)
    model.name_or_path = str(folder)
    return model.eval()


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the causal language model in `folder`. Raises UserError when it is none."""
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
    _refuse_quantized(folder, raw)
    _refuse_other_heads(folder, raw)
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a wrong value in config.json surfaces as almost any type
        raise _load_error(folder, "config.json", error, trust_remote_code) from error


def context_length(config: Any) -> int:
    """The most tokens that the model's positions allow; 2048 when its config does not say."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"):
        found = getattr(config, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return 2048


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
            hint="use the model's original bf16 or fp16 weights",
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


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills a missing weight with random numbers and only warns."""
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} weights are not in its files, such as '{missing[0]}'",
            hint="the files are not of this config.json: copy or fetch the whole folder again",
        )
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if mismatched:
        raise UserError(f"{folder}: weights of another shape than config.json says: {mismatched[0]}")


def _load_error(folder: Path, part: str, error: Exception, trusted: bool) -> TunesmithError:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text and not trusted:
        return UserError(
            f"{folder}: the {part} brings its own Python code, which is not run",
            hint="read that code, then set model.trust_remote_code: true",
        )
    return UserError(
        f"{folder}: the {part} could not be loaded: {text.splitlines()[0][:300]}",
        hint="check that the folder is whole: copy or fetch it again",
    )


def _out_of_memory(folder: Path, files: list[Path], dtype: torch.dtype, device: torch.device) -> UserError:
    size = sum(path.stat().st_size for path in files)
    on_gpu = device.type == "cuda"
    free = (
        torch.cuda.mem_get_info(device)[0]
        if on_gpu
        else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    programs = "on the GPU (nvidia-smi lists them)" if on_gpu else "that use much memory"
    return UserError(
        f"{folder}: its {bytes_text(size)} of weights do not fit as {str(dtype).removeprefix('torch.')} on "
        f"{device}, which has {bytes_text(free)} free",
        hint=f"end other programs {programs}, use bf16, or a smaller model",
    )

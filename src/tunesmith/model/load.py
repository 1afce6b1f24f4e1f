"""A model and its tokenizer from a local transformers folder: safetensors only, nothing left random."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tunesmith.core.errors import UserError
from tunesmith.core.units import bytes_text
from tunesmith.model.config import load_config
from tunesmith.model.hardware import settle_vector_math
from tunesmith.model.quiet import quiet
from tunesmith.model.tokenizer import load_error
from tunesmith.model.weights import (
    tensor_shapes,
    weight_files,
)

ALIGNMENT = 64  # bytes: that of every CPU tensor that torch allocates


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
        raise load_error(folder, "model", error, trust_remote_code) from error
    _check_complete(folder, info)
    if device.type == "cpu":
        own_memory(model)
    model.name_or_path = str(folder)
    return model.eval()


def own_memory(model: Any) -> None:
    """Move weights that lie in a mapped file at an odd address into memory of torch's own alignment.

    Where a tensor begins in its file depends on the header's length, and some CPUs' matrix products round
    otherwise for another alignment: a run resumed from a checkpoint would leave the uninterrupted curve by
    a last bit.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()


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

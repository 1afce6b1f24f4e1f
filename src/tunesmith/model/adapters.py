"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) through peft, whose files everyone can read.

Adapter weights are fp32 whatever the base is, so that small updates are not rounded away.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json
from tunesmith.model.quiet import quiet
from tunesmith.model.weights import ADAPTER_CONFIG as CONFIG
from tunesmith.model.weights import ADAPTER_WEIGHTS as WEIGHTS
from tunesmith.model.weights import read_json_file, refuse_pickles, tensor_shapes


def attach_lora(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: list[str] | str,
    rslora: bool,
    seed: int,
) -> PeftModel:
    """Wrap `model` with fresh adapters, the only parameters that require gradients.

    The output starts as the base's own (B is zero). The same seed gives the same A on the same device,
    and torch's global random state is left as it was. `targets`: names of linear layers, or
    "all-linear" for all but the head. Raises UserError for a name that no linear layer has.
    """
    if not isinstance(targets, str):
        check_targets(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        with quiet():
            wrapped = get_peft_model(model, config)
    # get_peft_model writes the model's folder over whatever the config names.
    config.base_model_name_or_path, config.revision = base_reference(model)
    return wrapped


def linear_names(model: nn.Module) -> set[str]:
    """Dotted names of the linear layers."""
    return {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def check_targets(model: Any, targets: list[str]) -> None:
    """Raise UserError for a target that is not the end of any linear layer's dotted name."""
    full = linear_names(model)
    known = sorted({name.rsplit(".", 1)[-1] for name in full})
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in full):
            near = difflib.get_close_matches(target, known, n=1)
            raise UserError(
                f"method.targets: no linear layer of the model is named '{target}'",
                hint=(f"did you mean '{near[0]}'? " if near else "") + f"its layers are: {', '.join(known)}",
            )


def base_reference(model: Any) -> tuple[str, str | None]:
    """(name or path, revision) of the base as adapter_config.json keeps it.

    A snapshot in the hub's cache is named by its hub id and commit, which mean the same everywhere; any
    other folder by its absolute path.
    """
    folder = Path(str(model.name_or_path)).absolute()
    parts = folder.parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/"), parts[-1]
    return str(folder), None


def load_adapter(model: Any, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Wrap `model` with the LoRA adapter in `folder` (peft's own format).

    Raises UserError when a file is missing, damaged or a pickle, or the adapter is not made for this model:
    every tensor must be there, none may be left over, and all shapes must agree.
    """
    config = read_config(folder)
    found = tensor_shapes(_weights_file(folder))
    config.inference_mode = not trainable
    try:
        with quiet():
            wrapped = PeftModel(model, config)
    except ValueError as error:  # no layer has a target's name
        raise _misfit(folder, model, str(error).splitlines()[0]) from None
    _check_fit(folder, wrapped, found)
    device = next(model.parameters()).device
    set_peft_model_state_dict(wrapped, load_file(folder / WEIGHTS, device=str(device)))
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable and "lora_" in name)
    return wrapped if trainable else wrapped.eval()


def read_config(folder: Path) -> LoraConfig:
    """The LoRA settings in `folder`. Raises UserError for another kind of adapter."""
    raw = read_json_file(folder / CONFIG)
    kind = str(raw.get("peft_type", "missing"))
    if kind != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type is {kind}; only LORA adapters are read")
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {error}", hint="was it written by a newer peft?") from None


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        refuse_pickles(folder)
        raise UserError(f"{folder}: {WEIGHTS} is missing", hint="copy the whole adapter folder")
    return path


def _check_fit(folder: Path, wrapped: PeftModel, found: dict[str, tuple[int, ...]]) -> None:
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise _misfit(folder, wrapped, f"it lacks {len(missing)} tensors, such as '{missing[0]}'")
    if extra:
        raise _misfit(
            folder, wrapped, f"the model has no place for {len(extra)} tensors, such as '{extra[0]}'"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise _misfit(
                folder, wrapped, f"'{name}' is {list(found[name])} where the model needs {list(shape)}"
            )


def _misfit(folder: Path, model: Any, reason: str) -> UserError:
    return UserError(
        f"{folder}: the adapter does not fit the model: {reason}",
        hint=f"give the base model that {folder / CONFIG} names in base_model_name_or_path",
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write peft's two files: adapter_config.json and adapter_model.safetensors (fp32).

    The same adapter gives the same bytes: peft itself writes its set of targets in random order, asks the
    hub about the base, and leaves a model card with blanks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    raw = model.peft_config["default"].to_dict()
    raw["inference_mode"] = True
    write_json(folder / CONFIG, json.loads(json.dumps(raw, default=_json_value, sort_keys=True)))


def _json_value(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def merge_adapter(model: PeftModel) -> Any:
    """Fold the adapter into the weights: W + scale · B·A, in the base's dtype. Returns the plain model.

    Raises UserError when a merged weight is not finite.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}", hint="is the adapter damaged?") from None

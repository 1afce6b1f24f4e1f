"""A LoRA adapter as two small matrices a layer, read from peft's files without wrapping the model.

Read is what is a low-rank update of linear layers and nothing else; all other kinds are refused with the
reason. scale = alpha / r, with rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) alpha / sqrt(r).

Shapes: r rank, D input features, N output features of a layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tunesmith.core.errors import UserError
from tunesmith.model.adapters import base_reference, difference, read_config, weights_file
from tunesmith.model.weights import ADAPTER_CONFIG as CONFIG
from tunesmith.model.weights import read_json_file, tensor_shapes, weight_files

PREFIX = "base_model.model."
# Settings of peft's that change what a pass computes, with words for what they are.
REFUSED = {
    "use_dora": "it is a DoRA adapter, whose magnitudes depend on the whole weight",
    "modules_to_save": "it brings whole modules of its own (modules_to_save)",
    "trainable_token_indices": "it brings embedding rows of its own for some tokens",
    "lora_bias": "it has biases",
}
# Settings that do not: they tell of training, of initial values, or of which layers the adapter is on.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias",
    "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "runtime_config", "megatron_core", "loftq_config", "eva_config",
    "velora_config", "qalora_group_size",
}  # fmt: skip
# Others change the base's weights at the start of training, which the file does not tell.
STARTS = (True, False, "gaussian", "eva")
MAX_RANK = 256
SAMPLE_BYTES = 65536
# Of weights that were rounded to four bits from what they are.
MOST_DISTANCE = 0.15


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's update: y += (x Aᵀ) B. a: [r, D]; b: [r, N], peft's B transposed and scaled; both fp32."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """What the settings say of one layer."""

    rank: int
    scale: float


def read_lora(
    folder: Path, model: Any, layers: Mapping[str, tuple[int, int]], *, max_rank: int
) -> dict[str, LowRank]:
    """The updates in `folder` by the names of the model's linear layers, on the model's device.

    layers: (D, N) of every linear layer. Raises UserError with the reason for an adapter of another kind,
    for another base, of a higher rank, damaged, or not finite.
    """
    config = read_config(folder)
    found = tensor_shapes(weights_file(folder))
    if reason := why_only_merged(folder, max_rank=max_rank):
        raise _refused(folder, reason)
    if reason := _other_base(config, model):
        raise _misfit(folder, reason)
    places = _places(config, layers)
    if not places:
        raise _misfit(folder, f"none of the model's linear layers is in target_modules {_targets(config)}")
    expected = _expected(places, layers)
    tensors = _tensors(weights_file(folder))
    copies = _copies(folder, {name: tensors[name] for name in found.keys() - expected.keys()}, model)
    if fault := difference({name: shape for name, shape in found.items() if name not in copies}, expected):
        raise _misfit(folder, fault)
    return _updates(folder, places, tensors, next(model.parameters()).device)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Not through the file's mapping: there the package loses some bytes of memory with every tensor.
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path}: the file is damaged ({error})", hint="copy or fetch it again") from None


def _copies(folder: Path, others: Mapping[str, Tensor], model: Any) -> set[str]:
    """Those of `others` that are the base's own weights, which peft saves with an adapter on the head.

    Raises UserError where they have other values.
    """
    copies = set()
    for name, tensor in others.items():
        weight = _weight(model, name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if weight is None or weight.shape != tensor.shape:
            continue
        if _distance(tensor, weight) > MOST_DISTANCE:
            raise _refused(folder, f"it brings weights of its own ('{name}')")
        copies.add(name)
    return copies


def _weight(model: Any, name: str) -> Tensor | None:
    layer, _, which = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(layer), which, None)
    except AttributeError:
        return None
    return found.detach().cpu() if isinstance(found, Tensor) else None


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative to the other's length."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12))


def why_only_merged(folder: Path, *, max_rank: int = MAX_RANK) -> str | None:
    """Why the LoRA adapter in `folder` cannot be computed beside its base; None when it can."""
    config = read_config(folder)
    return _other_kind(config) or _unknown_settings(folder) or _too_high(config, max_rank)


def _other_kind(config: LoraConfig) -> str | None:
    """Why an adapter with these settings is not two matrices a linear layer; None when it is."""
    for name, reason in REFUSED.items():
        if getattr(config, name, None):
            return reason
    if config.bias != "none":
        return f"it has trained biases (bias: {config.bias})"
    if config.init_lora_weights not in STARTS:
        return f"its training changed the base's weights at the start ({config.init_lora_weights})"
    for field in dataclasses.fields(config):
        if field.name not in HARMLESS and getattr(config, field.name):
            return f"it has the setting {field.name}"
    return None


def _unknown_settings(folder: Path) -> str | None:
    """peft drops settings that it does not know with no more than a warning."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    raw = read_json_file(folder / CONFIG)
    unknown = sorted(name for name, value in raw.items() if value and name not in known)
    return f"it has the setting {unknown[0]}, which the installed peft does not know" if unknown else None


def _too_high(config: LoraConfig, max_rank: int) -> str | None:
    rank = max([config.r, *config.rank_pattern.values()])
    return f"its rank is {rank}, the highest served is {max_rank}" if rank > max_rank else None


def _other_base(config: LoraConfig, model: Any) -> str | None:
    """Why the adapter belongs to another base; None when it does not, or nobody can tell."""
    named = config.base_model_name_or_path
    if not named or not model.name_or_path:
        return None
    ours = base_reference(model)[0]
    if same_base(str(named), ours):
        return None
    return f"it was trained on '{named}', not on '{ours}'"


def same_base(one: str, other: str) -> bool:
    """False when two references name different models for certain.

    Two folders are the same when samples of their weights are; two hub ids when they end in the same name
    (mirrors have other owners). A folder and an id can be the same.
    """
    folders = Path(one).expanduser(), Path(other).expanduser()
    if all((folder / "config.json").is_file() for folder in folders):
        return folders[0].samefile(folders[1]) or fingerprint(folders[0]) == fingerprint(folders[1])
    if all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in (one, other)):
        return one.rsplit("/")[-1].lower() == other.rsplit("/")[-1].lower()
    return True


def fingerprint(folder: Path) -> str:
    """A hash of a model folder's weights: of each file the size, beginning, middle and end."""
    found = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        found.update(str(size).encode())
        with path.open("rb") as file:
            for at in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(at)
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def _places(config: LoraConfig, layers: Mapping[str, tuple[int, int]]) -> dict[str, _Place]:
    """The layers that the adapter is on, as peft would choose them."""
    everywhere = config.target_modules == "all-linear"
    return {
        name: _place(config, name)
        for name in layers
        if (everywhere and not name.endswith("lm_head")) or _is_target(config, name, everywhere)
    }


def _is_target(config: LoraConfig, name: str, everywhere: bool) -> bool:
    return not everywhere and bool(check_target_module_exists(config, name))


def _place(config: LoraConfig, name: str) -> _Place:
    rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
    return _Place(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _expected(
    places: Mapping[str, _Place], layers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """The tensors that such an adapter's file has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (place.rank, layers[name][0])
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (layers[name][1], place.rank)
    return shapes


def _updates(
    folder: Path, places: Mapping[str, _Place], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, LowRank]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{folder}: '{name}' has values that are not finite numbers",
                hint="the training run broke off its rails: take an earlier checkpoint",
            )
    updates = {}
    for name, place in places.items():
        a, b = (tensors[f"{PREFIX}{name}.lora_{which}.weight"] for which in "AB")
        b = b.float().T.mul(place.scale)
        # A copy of A: it may be a view of the bytes read.
        updates[name] = LowRank(a.to(device, torch.float32, copy=True), b.to(device).contiguous())
    if not any(bool(update.a.any()) and bool(update.b.any()) for update in updates.values()):
        raise UserError(
            f"{folder}: the adapter changes nothing: one matrix of every layer's pair is zero",
            hint="train it for at least one step",
        )
    return updates


def _targets(config: LoraConfig) -> str:
    targets = config.target_modules
    return targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))


def _refused(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder}: the adapter cannot be served beside its base: {reason}",
        hint="merge it into a copy of its base and serve that: tunesmith export --to merged",
    )


def _misfit(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder}: the adapter does not fit the model: {reason}",
        hint=f"serve the base model that {folder / CONFIG} names in base_model_name_or_path, or correct that",
    )

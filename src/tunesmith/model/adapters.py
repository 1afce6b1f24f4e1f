"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) through peft, whose files everyone can read.

Adapter weights are fp32 whatever the base is, so that small updates are not rounded away. Beside the pairs
of small matrices an adapter may hold magnitudes (DoRA: Liu et al. 2024, arXiv:2402.09353), whole modules,
and the embedding rows of new tokens.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.core.errors import UserError
from tunesmith.core.paths import write_json
from tunesmith.model.new_tokens import embedding_names, full_name, grow, is_tied, rows_of_adapter
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
    dora: bool = False,
    modules_to_save: Sequence[str] = (),
    new_token_ids: Sequence[int] = (),
) -> PeftModel:
    """Wrap `model` with fresh adapters, the only parameters that require gradients.

    The output starts as the base's own (B is zero). The same seed gives the same A on the same device,
    and torch's global random state is left as it was. `targets`: names of linear layers, or
    "all-linear" for all but the head. `modules_to_save`: names of modules trained whole; embeddings that are
    tied to the head stay so. `new_token_ids`: tokens whose embeddings, and rows of the head, are trained.
    Raises UserError for a name that no such layer has, and for parts that cannot be trained together.
    """
    if not isinstance(targets, str):
        check_targets(model, targets)
    check_whole_modules(model, targets, modules_to_save)
    tied = is_tied(model) and not {*modules_to_save}.isdisjoint(embedding_names(model))
    whole = _tied_once(model, modules_to_save) if tied else list(modules_to_save)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=rslora,
        use_dora=dora,
        modules_to_save=whole or None,
        trainable_token_indices=_token_indices(model, targets, modules_to_save, new_token_ids) or None,
        ensure_weight_tying=tied,
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
    for target in targets:
        if not _is_named(target, full):
            raise _no_module("method.targets: no linear layer", target, full)


def check_whole_modules(model: Any, targets: list[str] | str, modules: Sequence[str]) -> None:
    """Raise UserError for one of `modules` that the model does not have, that cannot be trained whole, or
    that is a target of low-rank adapters too."""
    known = {name: part for name, part in model.named_modules() if name}
    for module in modules:
        found = [part for name, part in known.items() if name == module or name.endswith("." + module)]
        if not found:
            raise _no_module("method.modules_to_save: no module", module, set(known))
        if module in targets and not isinstance(targets, str):
            raise UserError(
                f"method.modules_to_save: '{module}' is in method.targets too",
                hint="leave it out of one of the two lists",
            )
        if any(isinstance(part, (nn.ModuleList, nn.ModuleDict)) for part in found):
            raise UserError(
                f"method.modules_to_save: '{module}' is a list of modules",
                hint="name the modules in it, such as mlp or input_layernorm",
            )


def _tied_once(model: Any, modules: Sequence[str]) -> list[str]:
    """Embeddings and head, where they are one matrix, under one name; peft adds the other itself."""
    others = [module for module in modules if module not in embedding_names(model)]
    return [*others, full_name(model, model.get_input_embeddings())]


def _is_named(end: str, names: set[str]) -> bool:
    return any(name == end or name.endswith("." + end) for name in names)


def _no_module(what: str, name: str, names: set[str]) -> UserError:
    known = sorted({part for each in names if not (part := each.rsplit(".", 1)[-1]).isdigit()})
    near = difflib.get_close_matches(name, known, n=1)
    return UserError(
        f"{what} of the model is named '{name}'",
        hint=(f"did you mean '{near[0]}'? " if near else "") + f"its names are: {', '.join(known)}",
    )


def _token_indices(
    model: Any, targets: list[str] | str, whole: Sequence[str], ids: Sequence[int]
) -> dict[str, list[int]]:
    """Which rows of which matrix are trained for the tokens `ids`, as peft writes it."""
    if not ids:
        return {}
    embeddings, head = names = embedding_names(model)
    if not isinstance(targets, str) and head in targets:
        raise UserError(
            f"method.targets: '{head}' cannot have a low-rank adapter together with model.new_tokens, "
            "whose rows of it are trained themselves",
            hint=f"leave '{head}' out of method.targets, or train it whole: method.modules_to_save: [{head}]",
        )
    if is_tied(model):
        return {} if set(names) & set(whole) else {embeddings: list(ids)}
    return {name: list(ids) for name in names if name not in whole}


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
    found = tensor_shapes(weights_file(folder))
    config.inference_mode = not trainable
    grow(model, rows_of_adapter(config, found, model))
    try:
        with quiet():
            wrapped = PeftModel(model, config)
    except (ValueError, IndexError) as error:  # no layer has a target's name, no row a token's number
        raise _misfit(folder, model, str(error).splitlines()[0]) from None
    _check_fit(folder, wrapped, found)
    device = next(model.parameters()).device
    set_peft_model_state_dict(wrapped, load_file(folder / WEIGHTS, device=str(device)))
    if not trainable:
        wrapped.requires_grad_(False)
    return wrapped if trainable else wrapped.eval()


def set_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> str | None:
    """Put an adapter's tensors, as `save_adapter` names them, into `model`; what does not fit, or None."""
    fault = difference({name: tuple(t.shape) for name, t in tensors.items()}, _shapes(model))
    if fault is None:
        set_peft_model_state_dict(model, dict(tensors))
    return fault


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


def weights_file(folder: Path) -> Path:
    """The adapter's safetensors file. Raises UserError when there is none, or pickles in its place."""
    path = folder / WEIGHTS
    if not path.is_file():
        refuse_pickles(folder)
        raise UserError(f"{folder}: {WEIGHTS} is missing", hint="copy the whole adapter folder")
    return path


def _check_fit(folder: Path, wrapped: PeftModel, found: dict[str, tuple[int, ...]]) -> None:
    fault = difference(found, _shapes(wrapped))
    if fault:
        raise _misfit(folder, wrapped, fault)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """What `save_adapter` writes, by peft's names; a tied tensor under each of its names."""
    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def _shapes(wrapped: PeftModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter_tensors(wrapped).items()}


def difference(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str | None:
    """In what an adapter's tensors are not those that the model wants."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        return f"it lacks {len(missing)} tensors, such as '{missing[0]}'"
    if extra:
        return f"the model has no place for {len(extra)} tensors, such as '{extra[0]}'"
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"'{name}' is {list(found[name])} where the model needs {list(shape)}"
    return None


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
    state = adapter_tensors(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # tied modules have one tensor under two names: peft writes both
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    raw = model.peft_config["default"].to_dict()
    raw["inference_mode"] = True
    write_json(folder / CONFIG, json.loads(json.dumps(raw, default=_json_value, sort_keys=True)))


def _json_value(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def merge_adapter(model: PeftModel) -> Any:
    """Fold the adapter into the weights, in the base's dtype: W + scale · B·A, for DoRA times its magnitudes
    over the rows' norms. Returns the plain model.

    A head that is one matrix with the embeddings becomes a matrix of its own when only it was adapted.
    Raises UserError when a merged weight is not finite.
    """
    _untie_adapted_head(model.get_base_model())
    try:
        with quiet():
            merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}", hint="is the adapter damaged?") from None
    head = merged.get_output_embeddings()
    # peft gives the copy of a head that is tied to whole trained embeddings these two the wrong way round.
    head.out_features, head.in_features = head.weight.shape
    return merged


def _untie_adapted_head(model: Any) -> None:
    """Merging writes into the weight itself, which the embeddings would then share."""
    head = model.get_output_embeddings()
    base = getattr(head, "base_layer", None)
    if base is not None and base.weight is model.get_input_embeddings().weight:
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False

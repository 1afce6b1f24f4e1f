"""An xtuner 0.1 config as a recipe: what became what, what has no counterpart, what differs and why."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.convert.ledger import Ledger, Note, last
from tunesmith.convert.pyconfig import Section, Symbol, read_config
from tunesmith.convert.xtuner_data import Rows, read_rows, refuse_images
from tunesmith.convert.xtuner_rules import OPTIMIZERS, RULES, SECTIONS
from tunesmith.convert.xtuner_templates import (
    HOW_TO_GET,
    find_package,
    jinja,
    model_brings,
    template_of,
)
from tunesmith.core.errors import UserError
from tunesmith.recipe.compat import Template


@dataclass
class Imported:
    """values: of the recipe; notes: of every line; differences: what is done otherwise, and why;
    chat_template: Jinja text, if the model does not bring it; template: xtuner's own."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    chat_template: str | None = None
    template: Template | None = None


def import_config(
    path: Path, *, xtuner: Path | None = None, compat: bool = False, deepspeed: bool = False
) -> Imported:
    """The recipe of an xtuner 0.1 text config, read without running it.

    xtuner: folder or wheel with xtuner's prompt sentences; compat: its own tokens, order and learning rates;
    deepspeed: as started with --deepspeed. Raises UserError, with the line, for whatever has no counterpart.
    """
    config = read_config(path)
    ledger = Ledger(config, SECTIONS)
    refuse_images(ledger)
    if "train_dataloader" not in config.values:
        raise UserError(
            f"{path}: not a training config of xtuner 0.1: it has no train_dataloader",
            hint="configs with framework = 'huggingface' and those of other tools are not imported",
        )
    package = find_package(path, xtuner)
    rows = read_rows(ledger, package)
    found = Imported(differences=_general(deepspeed=deepspeed))
    found.values["model"] = _model(ledger)
    _template(ledger, rows, package, found)
    found.values["data"] = _data(ledger, rows, found)
    found.values["method"] = _method(ledger)
    found.values["train"] = _train(ledger, found)
    found.values |= _samples(ledger, found)
    if compat:
        _reproduce(ledger, rows, found, deepspeed=deepspeed)
    found.differences = [] if compat else [*found.differences, *rows.differences]
    found.notes = [_with_value(note, found.values) for note in ledger.notes(RULES)]
    return found


def _with_value(note: Note, values: dict[str, Any]) -> Note:
    """The note with the value that the recipe's key has."""
    value: Any = values
    for key in (note.became or "").split("."):
        if not isinstance(value, dict) or key not in value:
            return note
        value = value[key]
    shown = value if isinstance(value, (int, float, str)) else ""
    return replace(note, became=f"{note.became}: {shown}".removesuffix(": "))


def _general(*, deepspeed: bool) -> list[str]:
    """What is done otherwise for every config."""
    window = (
        "drops the micro-batches after the last whole step" if deepspeed else "steps across epoch borders"
    )
    return [
        "warm-up: counted in optimizer steps, and the peak is always reached; xtuner counts micro-batches, "
        "and on small data its rate can stay at 1e-5 of the peak to the end, or training does not start",
        "prompts: one chat template serves training, samples and the endpoint; xtuner trains, evaluates and "
        "serves with three",
        f"last window: every epoch ends with a step of what is left, so no row is left out; xtuner {window}",
        "dtype: bf16 where the hardware multiplies it, else fp16 with loss scaling (train.precision: auto)",
        "loss: mean over all supervised tokens of a step; xtuner takes the mean of its micro-batches' means",
        "checkpoints: between optimizer steps, and resumed exactly; xtuner loses part of a step when resumed",
    ]


# -- model and method -----------------------------------------------------------------------------------


def _model(ledger: Ledger) -> dict[str, Any]:
    kind = last(ledger.get("model.type"))
    if kind != "SupervisedFinetune":
        raise ledger.error("model.type", f"the model {kind} has no counterpart; SupervisedFinetune has")
    if ledger.get("load_from") is not None:
        raise ledger.error(
            "load_from",
            f"load_from = {ledger.get('load_from')!r}: a checkpoint of xtuner cannot be gone on with",
            "convert it to a model folder with 'xtuner convert pth_to_hf' and give that folder as the model",
        )
    path = ledger.take("model.llm.pretrained_model_name_or_path", "model.path")
    if not isinstance(path, str) or isinstance(path, Symbol):
        raise ledger.error("model.llm", f"pretrained_model_name_or_path is {path!r}, not the name of a model")
    ledger.take(
        "model.max_position_embeddings", None, "the model's own limit holds: its context is not stretched"
    )
    return {"path": path}


def _method(ledger: Ledger) -> dict[str, Any]:
    quant = ledger.get("model.llm.quantization_config")
    if ledger.get("model.llm.load_in_8bit") or (isinstance(quant, Section) and quant.get("load_in_8bit")):
        raise ledger.error(
            "model.llm",
            "a base in 8 bits has no counterpart",
            "set load_in_4bit=True: qlora quantises to NF4",
        )
    if not isinstance(ledger.get("model.lora"), Section):
        if quant is not None:
            raise ledger.error(
                "model.llm.quantization_config", "a quantised base is not trained without lora"
            )
        return {"type": "full"}
    method = _lora(ledger)
    if quant is not None:
        method |= _quantised(ledger)
    return method


def _quantised(ledger: Ledger) -> dict[str, Any]:
    place = "model.llm.quantization_config"
    if not ledger.take(f"{place}.load_in_4bit", "method.type: qlora"):
        raise ledger.error(place, "a quantised base has 4 bits here", "set load_in_4bit=True")
    kind = ledger.take(f"{place}.bnb_4bit_quant_type", "method.type: qlora") or "fp4"
    if kind != "nf4":
        raise ledger.error(place, f"4 bits as {kind} have no counterpart", "set bnb_4bit_quant_type='nf4'")
    double = bool(ledger.take(f"{place}.bnb_4bit_use_double_quant", "method.double_quant"))
    return {"type": "qlora", "double_quant": double}


def _lora(ledger: Ledger) -> dict[str, Any]:
    place = "model.lora"
    if ledger.get(f"{place}.bias", "none") != "none":
        raise ledger.error(f"{place}.bias", "trained biases have no counterpart", "set bias='none'")
    rank = int(ledger.number(f"{place}.r", "method.rank", 8))
    method: dict[str, Any] = {
        "type": "lora",
        "rank": rank,
        "alpha": float(ledger.number(f"{place}.lora_alpha", "method.alpha", 8)),
        "dropout": float(ledger.number(f"{place}.lora_dropout", "method.dropout", 0.0)),
    }
    targets = ledger.take(f"{place}.target_modules", "method.targets")
    if isinstance(targets, str) and targets != "all-linear":
        raise ledger.error(
            f"{place}.target_modules", "a pattern of modules has no counterpart", "list their names"
        )
    method |= {"targets": list(targets)} if isinstance(targets, (list, tuple)) else {}
    for theirs, ours in (("use_rslora", "rslora"), ("use_dora", "dora")):
        method |= {ours: True} if ledger.take(f"{place}.{theirs}", f"method.{ours}") else {}
    whole = ledger.take(f"{place}.modules_to_save", "method.modules_to_save")
    return method | ({"modules_to_save": list(whole)} if whole else {})


# -- data -----------------------------------------------------------------------------------------------


def _template(ledger: Ledger, rows: Rows, package: Path | None, found: Imported) -> None:
    """Which chat template the rows are written with."""
    wanted = [t for t in rows.templates if t is not None]
    if not wanted:
        found.template = Template(system="", instruction="{input}", suffix="", suffix_as_eos=False, sep="")
        return
    if any(t != wanted[0] for t in wanted):
        raise ledger.error("train_dataloader.dataset", "its data sets have different prompt templates")
    known = template_of(wanted[0], package)
    if known is None:
        raise ledger.error(
            "train_dataloader.dataset", f"the prompt template {wanted[0]} is not known",
            f"--xtuner FOLDER_OR_WHEEL reads it from your xtuner ({HOW_TO_GET})",
        )  # fmt: skip
    name, found.template = known
    if model_brings(name, found.values["model"]["path"]):
        found.differences.append(f"template: the model's own, in place of xtuner's {name}")
    else:
        found.chat_template = jinja(found.template)


def _data(ledger: Ledger, rows: Rows, found: Imported) -> dict[str, Any]:
    if rows.packing:
        found.differences.append(
            "packing: whole rows, each attending to itself alone; xtuner cuts rows at the borders of packs, "
            "lets them attend to each other, and loses the tokens that are left over"
        )
    return {
        "sources": rows.sources,
        "max_length": rows.max_length,
        "packing": rows.packing,
        # As there: a longer row is cut. Here it is counted and shown.
        "too_long": "truncate",
        "eval_fraction": 0.0,
    }


# -- training -------------------------------------------------------------------------------------------


def _train(ledger: Ledger, found: Imported) -> dict[str, Any]:
    accumulation = _accumulation(ledger)
    train: dict[str, Any] = _length(ledger, accumulation)
    train["micro_batch_size"] = int(ledger.number("train_dataloader.batch_size", "train.micro_batch_size", 1))
    train["grad_accumulation"] = accumulation
    train |= _optimizer(ledger)
    train |= _schedule(ledger, train, accumulation)
    train["gradient_checkpointing"] = bool(ledger.get("model.use_activation_checkpointing", True))
    ledger.take("model.use_activation_checkpointing", "train.gradient_checkpointing")
    dtype = ledger.take("optim_wrapper.dtype", "train.precision")
    train["precision"] = "bf16" if last(dtype) == "bfloat16" else "auto"
    seed = ledger.take(
        "randomness.seed", "train.seed", None if has_seed(ledger) else "0: the run can be repeated"
    )
    if has_seed(ledger):
        train["seed"] = seed
    else:
        found.differences.append(
            "seed: train.seed is 0 and the run can be repeated; xtuner draws one at random"
        )
    return train | _saving(ledger, accumulation)


def _accumulation(ledger: Ledger) -> int:
    """Micro-batches of an optimizer step of one process: ranks of a sequence-parallel group share theirs."""
    count = max(1, int(ledger.number("optim_wrapper.accumulative_counts", "train.grad_accumulation", 1)))
    shared = ledger.get("sequence_parallel_size")
    parallel = last(ledger.get("train_dataloader.sampler.type")) == "SequenceParallelSampler"
    if parallel and isinstance(shared, int) and shared > 1:
        ledger.take("sequence_parallel_size", None, "no counterpart: a row is not spread over GPUs")
        return max(1, count // shared)
    return count


def _length(ledger: Ledger, accumulation: int) -> dict[str, Any]:
    epochs = ledger.number("train_cfg.max_epochs", "train.epochs", 0)
    if epochs > 0:
        return {"epochs": float(epochs)}
    iters = ledger.take("train_cfg.max_iters", "train.max_steps", "micro-batches / grad_accumulation")
    if not isinstance(iters, int):
        raise ledger.error("train_cfg", "train_cfg has neither max_epochs nor max_iters")
    return {"max_steps": max(1, math.ceil(iters / accumulation))}


def _optimizer(ledger: Ledger) -> dict[str, Any]:
    place = "optim_wrapper.optimizer"
    kind = last(ledger.get(f"{place}.type"))
    if kind not in OPTIMIZERS:
        raise ledger.error(f"{place}.type", f"the optimizer {kind} has no counterpart", "AdamW has")
    ledger.take(f"{place}.type", f"train.optimizer: {OPTIMIZERS[kind]}")
    norm = ledger.take("optim_wrapper.clip_grad.max_norm", "train.max_grad_norm")
    if ledger.get("optim_wrapper.clip_grad.norm_type", 2) != 2:
        raise ledger.error("optim_wrapper.clip_grad.norm_type", "only the L2 norm has a counterpart")
    train: dict[str, Any] = {
        "lr": float(ledger.number(f"{place}.lr", "train.lr", 1e-3)),
        "max_grad_norm": norm,
    }
    if train["lr"] <= 0:
        raise ledger.error(f"{place}.lr", f"{place}.lr is {train['lr']}, not above 0")
    betas = ledger.take(f"{place}.betas", "train.betas")
    train |= {"betas": list(betas) if isinstance(betas, (list, tuple)) else betas} if betas else {}
    train["eps"] = float(ledger.number(f"{place}.eps", "train.eps", 1e-8))
    train["weight_decay"] = float(ledger.number(f"{place}.weight_decay", "train.weight_decay", 0.01))
    return train | {"optimizer": OPTIMIZERS[kind]}


def _schedule(ledger: Ledger, train: dict[str, Any], accumulation: int) -> dict[str, Any]:
    """Warm-up and course of the learning rate."""
    known: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0}
    for number, (place, part) in enumerate(ledger.sections_at("param_scheduler")):
        kind = last(part.get("type"))
        if kind == "LinearLR" and number == 0:
            known |= _warmup(ledger, place, part, train, accumulation)
        elif kind == "CosineAnnealingLR":
            ledger.take(f"{place}.type", "train.schedule: cosine")
            low = ledger.number(f"{place}.eta_min", "train.min_lr_ratio", 0.0)
            known |= {"schedule": "cosine", "min_lr_ratio": low / train["lr"]}
        elif kind != "ConstantLR":
            raise ledger.error(
                place, f"the schedule {kind} has no counterpart", "LinearLR, CosineAnnealingLR have"
            )
    return known


def _warmup(
    ledger: Ledger, place: str, part: Section, train: dict[str, Any], accumulation: int
) -> dict[str, Any]:
    end = ledger.number(f"{place}.end", "train.warmup_ratio", 0.0, "counted in optimizer steps")
    ledger.take(f"{place}.start_factor", None, "the first step has peak / (warm-up steps + 1)")
    if part.get("by_epoch", True) and "epochs" in train:
        return {"warmup_ratio": round(end / train["epochs"], 6)}
    return {"warmup_steps": math.ceil(end / accumulation)}


def _saving(ledger: Ledger, accumulation: int) -> dict[str, Any]:
    place = "default_hooks.checkpoint"
    saving: dict[str, Any] = {}
    interval = ledger.get(f"{place}.interval")
    if isinstance(interval, int) and interval > 0 and not ledger.get(f"{place}.by_epoch", True):
        ledger.take(f"{place}.interval", "train.save_every", "micro-batches / grad_accumulation")
        saving["save_every"] = max(1, round(interval / accumulation))
    keep = ledger.take(f"{place}.max_keep_ckpts", "train.keep_checkpoints")
    if isinstance(keep, int):
        saving["keep_checkpoints"] = keep if keep > 0 else 1000
    return saving


def _samples(ledger: Ledger, found: Imported) -> dict[str, Any]:
    """The questions that are asked during training; other hooks have no counterpart, or need none."""
    samples: dict[str, Any] = {}
    for place, hook in ledger.sections_at("custom_hooks"):
        kind = last(hook.get("type"))
        if kind == "EvaluateChatHook":
            samples = {"samples": _asked(ledger, place, found)}
        elif kind == "DatasetInfoHook":
            ledger.take(
                f"{place}.type", None, "'tunesmith data show RECIPE' shows rows as the model sees them"
            )
        elif kind not in ("VarlenAttnArgsToMessageHubHook", "ThroughputHook"):
            ledger.take(f"{place}.type", None, f"no counterpart: the hook {kind} is code")
    return samples


def _asked(ledger: Ledger, place: str, found: Imported) -> dict[str, Any]:
    given = ledger.take(f"{place}.evaluation_inputs", "samples.prompts") or []
    asked = given if isinstance(given, (list, tuple)) else [given]
    system = ledger.take(
        f"{place}.system", None, "samples are asked as rows are trained: without this system message"
    )
    if system:
        found.differences.append("samples: asked without the system message of EvaluateChatHook")
    every = ledger.take(f"{place}.every_n_iters", "samples.every", "micro-batches / grad_accumulation")
    values: dict[str, Any] = {"prompts": [str(text) for text in asked]}
    if isinstance(every, int) and every > 0:
        values["every"] = max(1, round(every / found.values["train"]["grad_accumulation"]))
    longest = ledger.take(f"{place}.max_new_tokens", "samples.max_new_tokens")
    return values | ({"max_new_tokens": longest} if isinstance(longest, int) else {})


def _reproduce(ledger: Ledger, rows: Rows, found: Imported, *, deepspeed: bool) -> None:
    """The section `compat`: what xtuner itself would have trained on."""
    assert found.template is not None
    _refuse_other_rows(ledger, rows)
    workers = ledger.take("train_dataloader.dataset.map_num_proc", "compat.map_workers")
    found.values["compat"] = {
        "tool": "xtuner",
        "template": found.template.model_dump(),
        "map_workers": workers if isinstance(workers, int) else 32,
        "warmup_start": ledger.get("param_scheduler.0.start_factor", 1e-5),
        "deepspeed": deepspeed,
    }


def _refuse_other_rows(ledger: Ledger, rows: Rows) -> None:
    """Raise UserError for rows and packs that are not reproduced."""
    place = "train_dataloader.dataset"
    faults = [
        *(["use_varlen_attn=True"] if ledger.get(f"{place}.use_varlen_attn") else []),
        *(["shuffle_before_pack=False"] if ledger.get(f"{place}.shuffle_before_pack", True) is False else []),
        *(["several data_files of one data set"] if rows.several_files else []),
        *rows.not_reproduced,
    ]
    if faults:
        raise ledger.error(
            place,
            f"--compat does not reproduce {'; '.join(faults)}",
            "leave out --compat: the recipe trains it",
        )


def has_seed(ledger: Ledger) -> bool:
    return isinstance(ledger.get("randomness.seed"), int)


def recipe_name(path: Path) -> str:
    """The name of the run: the file's, in letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "xtuner"

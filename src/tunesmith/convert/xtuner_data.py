"""The data sets of an xtuner config as sources of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.convert.ledger import Ledger, last
from tunesmith.convert.pyconfig import Section, Symbol
from tunesmith.convert.xtuner_templates import HOW_TO_GET, system_text
from tunesmith.core.errors import UserError

BUILDERS = ("json", "csv", "parquet", "arrow")
OWN_ROWS = "write the rows as 'messages' (a jsonl file) and give that file"


@dataclass(frozen=True)
class RowMap:
    """How a map function of xtuner reads a row. columns: our name of a column: theirs."""

    format: str
    columns: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    why: str | None = None


MAPS: dict[str, RowMap] = {
    "alpaca_map_fn": RowMap("alpaca"),
    "alpaca_zh_map_fn": RowMap(
        "alpaca", {"instruction": "instruction_zh", "input": "input_zh", "output": "output_zh"}
    ),
    "medical_map_fn": RowMap("alpaca", system="medical"),
    "sql_map_fn": RowMap(
        "alpaca", {"instruction": "context", "input": "question", "output": "answer"}, system="sql"
    ),
    "arxiv_map_fn": RowMap(
        "prompt_completion", {"prompt": "abstract", "completion": "title"}, system="arxiv_gentile"
    ),
    "code_alpaca_map_fn": RowMap("prompt_completion", system="coder"),
    "tiny_codes_map_fn": RowMap("prompt_completion", {"completion": "response"}, system="coder"),
    "colors_map_fn": RowMap(
        "prompt_completion",
        {"prompt": "description", "completion": "color"},
        system="colorist",
        why="the name before a description's first ':' stays in the question; xtuner cuts it off",
    ),
    "crime_kg_assitant_map_fn": RowMap(
        "prompt_completion", {"prompt": "input", "completion": "output"}, system="lawyer"
    ),
    "law_reference_map_fn": RowMap(
        "prompt_completion", {"prompt": "question", "completion": "answer"}, system="lawyer"
    ),
    "default_map_fn": RowMap("prompt_completion", {"prompt": "input", "completion": "output"}),
    "stack_exchange_map_fn": RowMap("prompt_completion", {"prompt": "question", "completion": "response"}),
    "openorca_map_fn": RowMap(
        "prompt_completion", {"system": "system_prompt", "prompt": "question", "completion": "response"}
    ),
    "oasst1_map_fn": RowMap("guanaco"),
    "openai_map_fn": RowMap("messages"),
    "wizardlm_map_fn": RowMap("sharegpt"),
    "pretrain_map_fn": RowMap("text"),
    "None": RowMap("turns"),
}


@dataclass
class Rows:
    """The recipe's sources and what holds for all of them."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    max_length: int | None = None
    packing: bool = False
    templates: list[Any] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    not_reproduced: list[str] = field(default_factory=list)
    several_files: bool = False


def read_rows(ledger: Ledger, package: Path | None) -> Rows:
    """The sources of the training data. Raises UserError for data that has no counterpart."""
    rows = Rows()
    place = "train_dataloader.dataset"
    given = ledger.get(place)
    if not isinstance(given, Section):
        raise ledger.error(
            place, "there is no train_dataloader with a dataset, so there is nothing to import"
        )
    if last(given.get("type")) == "ConcatDataset":
        ledger.take(f"{place}.datasets", "data.sources")
        for number in range(len(given.get("datasets", []))):
            _read_set(ledger, f"{place}.datasets.{number}", rows, package)
    else:
        _read_set(ledger, place, rows, package)
    rows.differences = list(dict.fromkeys(rows.differences))
    return rows


def _read_set(ledger: Ledger, place: str, rows: Rows, package: Path | None) -> None:
    kind = last(ledger.get(f"{place}.type"))
    if kind == "MOSSSFTDataset":
        _read_moss(ledger, place, rows)
    elif kind == "process_hf_dataset":
        _read_hub(ledger, place, rows, package)
    else:
        raise ledger.error(
            f"{place}.type", f"{kind} has no counterpart: {WHY_NOT.get(kind, 'unknown data')}", OWN_ROWS
        )
    _same_length(ledger, place, rows)


WHY_NOT = {
    "LLaVADataset": "it holds images, and only text is trained",
    "RefCOCOJsonDataset": "it holds images, and only text is trained",
    "InvRefCOCOJsonDataset": "it holds images, and only text is trained",
    "process_ms_dataset": "it reads a ModelScope data set, whose rows are rewritten by code",
    "build_packed_dataset": "it reads rows that were turned into tokens elsewhere",
    "load_intern_repo_tokenized_dataset": "it reads rows that were turned into tokens elsewhere",
}


def _same_length(ledger: Ledger, place: str, rows: Rows) -> None:
    length = ledger.take(f"{place}.max_length", "data.max_length")
    if not isinstance(length, int) or length < 8:
        raise ledger.error(
            f"{place}.max_length", f"max_length is {length!r}, not a number of tokens from 8 on"
        )
    if rows.max_length not in (None, length):
        raise ledger.error(
            f"{place}.max_length",
            f"max_length is {length} here and {rows.max_length} for another data set",
            "a recipe has one max_length: give them the same",
        )
    rows.max_length = length


def _read_moss(ledger: Ledger, place: str, rows: Rows) -> None:
    path = _path(ledger, f"{place}.data_file")
    ledger.take(f"{place}.bot_name", None, "the name MOSS stays in the rows")
    rows.sources.append({"path": path, "format": "moss"})
    rows.templates.append(Symbol("xtuner.utils.PROMPT_TEMPLATE.moss_sft"))
    rows.not_reproduced.append("MOSSSFTDataset")
    rows.differences.append(
        "MOSS rows: only the answers are learned, and tool results come as the user's; xtuner learns the "
        "questions too, and puts bot_name in place of MOSS"
    )


def _read_hub(ledger: Ledger, place: str, rows: Rows, package: Path | None) -> None:
    if ledger.get(f"{place}.do_dataset_tokenization", True) is False:
        raise ledger.error(
            f"{place}.do_dataset_tokenization",
            "its rows are tokens already, which have no counterpart",
            OWN_ROWS,
        )
    mapping, system = _row_map(ledger, place, rows, package)
    template = ledger.take(
        f"{place}.template_map_fn.template", "the model's own chat template, or model.chat_template"
    )
    rows.templates.append(template)
    packing = ledger.take(f"{place}.pack_to_max_length", "data.packing")
    rows.packing = rows.packing or packing is None or bool(packing)
    if ledger.take(f"{place}.max_dataset_length", None, "all rows are used: a recipe draws no random subset"):
        rows.differences.append("max_dataset_length: all rows are used, not a random part of them")
        rows.not_reproduced.append("max_dataset_length")
    subset = ledger.take(f"{place}.dataset.name", "data.sources.subset")
    paths = _paths(ledger, place)
    rows.several_files = rows.several_files or len(paths) > 1
    for path, split in paths:
        source: dict[str, Any] = {"path": path, "format": mapping.format}
        source |= {"columns": dict(mapping.columns)} if mapping.columns else {}
        source |= {"split": split} if split != "train" else {}
        source |= {"subset": str(subset)} if subset is not None else {}
        rows.sources.append(source | ({"system": system} if system else {}))


def _row_map(ledger: Ledger, place: str, rows: Rows, package: Path | None) -> tuple[RowMap, str | None]:
    """How the rows are read, and their system message."""
    given = ledger.get(f"{place}.dataset_map_fn")
    name = last(given)
    if name in ledger.config.functions:
        raise ledger.error(
            f"{place}.dataset_map_fn", f"{name}() is Python of the config's own, which is never run", OWN_ROWS
        )
    if name not in MAPS:
        raise ledger.error(f"{place}.dataset_map_fn", f"the map function {name} has no counterpart", OWN_ROWS)
    mapping = MAPS[name]
    ledger.take(f"{place}.dataset_map_fn", f"data.sources.format: {mapping.format}", mapping.why)
    if mapping.why:
        rows.differences.append(f"{name}: {mapping.why}")
        rows.not_reproduced.append(name)
    if mapping.system is None:
        return mapping, None
    system = system_text(Symbol(f"xtuner.utils.SYSTEM_TEMPLATE.{mapping.system}"), package)
    if system is None:
        rows.differences.append(
            f"{name}: its system message is a sentence of xtuner's own, which is not on this machine: rows "
            f"get none; --xtuner FOLDER_OR_WHEEL reads it ({HOW_TO_GET})"
        )
        rows.not_reproduced.append(f"{name} without its system message, which --xtuner reads")
    return mapping, system


def _paths(ledger: Ledger, place: str) -> list[tuple[str, str]]:
    """(path, split) of every source of one data set."""
    inner = f"{place}.dataset"
    loader = last(ledger.get(f"{inner}.type"))
    split = str(ledger.get(f"{place}.split", None) or ledger.get(f"{inner}.split", None) or "train")
    if loader == "load_from_disk":
        key = "dataset_path" if ledger.get(f"{inner}.dataset_path") else "path"
        return [(_path(ledger, f"{inner}.{key}"), split)]
    if loader != "load_dataset":
        raise ledger.error(f"{inner}.type", f"{loader} has no counterpart: it loads rows by code", OWN_ROWS)
    path = _path(ledger, f"{inner}.path")
    if ledger.get(f"{inner}.data_dir") is not None:
        raise ledger.error(
            f"{inner}.data_dir",
            f"a folder of the data set {path} cannot be named in a recipe",
            "fetch the data set and give the path of that folder",
        )
    if ledger.get(f"{inner}.data_files") is None:
        return [(path, split)]
    return [(file, "train") for file in _files(ledger, inner, path, split)]


def _path(ledger: Ledger, place: str) -> str:
    path = str(ledger.get(place))
    ledger.take(place, f"data.sources.path: {path}")
    return path


def _files(ledger: Ledger, place: str, builder: str, split: str) -> list[str]:
    files = ledger.get(f"{place}.data_files")
    if builder not in BUILDERS:
        raise ledger.error(
            f"{place}.data_files",
            f"single files of the data set {builder} cannot be named in a recipe",
            "fetch the data set and give the paths of the files",
        )
    if isinstance(files, dict):
        if split not in files:
            raise ledger.error(f"{place}.data_files", f"data_files has no '{split}'")
        files = ledger.take(f"{place}.data_files.{split}", "data.sources.path")
    ledger.take(f"{place}.data_files", "data.sources.path")
    return [str(file) for file in (files if isinstance(files, (list, tuple)) else [files])]


def refuse_images(ledger: Ledger) -> None:
    """Raise UserError for a config that trains on images."""
    kind = last(ledger.get("model.type"))
    if kind == "LLaVAModel" or ledger.get("image_processor") is not None:
        raise UserError(
            f"{ledger.config.path}: line {ledger.line('model.type')}: {kind} learns from images, and only "
            "text is trained here",
            hint="the text configs of xtuner (full, lora, qlora) are imported",
        )

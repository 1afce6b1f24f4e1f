"""Rows of files: json, jsonl, csv, parquet, arrow, folders of them, saved `datasets` folders, and hub ids.

A `RowFile` gives its rows one after the other with their numbers, so that a message can name the place. A
row that cannot be read comes as a `BadRow` that says why.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.core.errors import UserError
from tunesmith.core.hub_cache import fetched_folder
from tunesmith.core.paths import sha256_file, sha256_json
from tunesmith.core.store import is_url, join
from tunesmith.core.store_cache import fetch
from tunesmith.recipe.schema import Source

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
UTF8 = "save the file as UTF-8"
ARROW_ROWS = 1000


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    why: str


NumberedRow = tuple[int, Any]


@dataclass(frozen=True)
class RowFile:
    """One file (or data set) of rows. `unit` is what its numbers count: rows, or lines of the file."""

    name: str
    unit: str
    num_bytes: int
    read: Callable[[], Iterator[NumberedRow]]
    digest: Callable[[], str]


def open_source(source: Source, place: str) -> list[RowFile]:
    """The files of a source, in the order of their names. `place` is its key in the recipe, for messages.

    Raises UserError when there is no such path, nothing readable in it, or a suffix that is not supported.
    """
    if is_url(source.path):
        return _stored(source, place)
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            return _folder(path, source, place)
        if path.exists():
            return [_file(path, place)]
    except PermissionError as error:
        raise UserError(f"{error.filename}: this user may not read it", hint="check owner and mode") from None
    looks_local = path.suffix.lower() in READERS or source.path.startswith((".", "/", "~"))
    if looks_local or not HUB_ID.match(source.path):
        raise UserError(
            f"{place}.path: '{source.path}' does not exist (looked in {Path.cwd()})", hint="check the path"
        )
    return [_hub(source, place)]


def _stored(source: Source, place: str) -> list[RowFile]:
    """What lies in an object store goes by its URL, wherever on this machine it has been brought."""
    try:
        here = fetch(source.path)
    except UserError as error:
        raise UserError(f"{place}.path: {error.what}", hint=error.hint) from None
    try:
        files = open_source(source.model_copy(update={"path": str(here)}), place)
    except UserError as error:
        raise UserError(error.what.replace(str(here), source.path), hint=error.hint) from None
    return [replace(file, name=_url_of(file, here, source.path)) for file in files]


def _url_of(file: RowFile, here: Path, url: str) -> str:
    below = Path(file.name).relative_to(here).as_posix()
    return url if below == "." else join(url, below)


def _folder(path: Path, source: Source, place: str) -> list[RowFile]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_saved(path, source, place)]
    next(path.iterdir(), None)  # rglob passes over a folder that may not be read
    visible = (
        p
        for p in sorted(path.rglob("*"))
        if not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    files = [p for p in visible if p.suffix.lower() in READERS and p.is_file()]
    if not files:
        raise UserError(
            f"{place}.path: the folder '{path}' holds no data file", hint=f"put in {SUFFIXES} files"
        )
    return [_file(p, place) for p in files]


def _file(path: Path, place: str) -> RowFile:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{place}.path: '{path}' has a suffix that is not supported", hint=f"use {SUFFIXES}")
    if not path.is_file():
        raise UserError(f"{place}.path: '{path}' is not a file")
    with path.open("rb") as file:
        if not file.read(1):
            raise UserError(f"{path}: the file is empty")
    unit, reader = READERS[suffix]
    return RowFile(str(path), unit, path.stat().st_size, lambda: reader(path), lambda: sha256_file(path))


# -- text files -------------------------------------------------------------------------------------


def _read_json(path: Path) -> Iterator[NumberedRow]:
    text = _decode(path.read_bytes(), path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _first_line_is_object(text):
            yield from _parse_lines(text.splitlines())
            return
        raise UserError(f"{path}: not JSON: {error}", hint="the file must be a list of objects") from None
    yield from enumerate(_list_of_rows(value, path), start=1)


def _list_of_rows(value: Any, path: Path) -> list[Any]:
    if isinstance(value, dict):
        lists = [
            k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)
        ]
        if len(lists) == 1:
            return value[lists[0]]
        found = f"holds {len(lists)} lists of rows ({', '.join(lists)})" if lists else "holds no list of rows"
        raise UserError(
            f"{path}: the file is one JSON object that {found}",
            hint='write a list of objects, or {"data": [...]}',
        )
    if not isinstance(value, list):
        raise UserError(f"{path}: the file is a JSON {type(value).__name__}, not a list of objects")
    return value


def _first_line_is_object(text: str) -> bool:
    """Many files named .json hold JSON lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _bad_utf8(path, number, error.start) from None
            yield from _parse_lines([text], number)


def _parse_lines(lines: list[str], first: int = 1) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, BadRow(f"not JSON: {error}")


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(sys.maxsize)
    _decode(path.read_bytes(), path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            _check_header(header, path)
            for number, cells in enumerate((row for row in reader if row), start=1):
                yield number, _csv_row(header, cells)
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: not CSV: {error}") from None


def _check_header(header: list[str], path: Path) -> None:
    if not header:
        raise UserError(f"{path}: the file is empty")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: the header names a column twice: {', '.join(map(repr, twice))}",
            hint="the first line of a csv file must name its columns",
        )


def _csv_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells where the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        raise _bad_utf8(path, content.count(b"\n", 0, error.start) + 1, error.start - line_start) from None


def _bad_utf8(path: Path, line: int, byte: int) -> UserError:
    return UserError(f"{path}: line {line}: byte {byte + 1} is not UTF-8", hint=UTF8)


# -- columnar files ---------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=ARROW_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file: {_one_line(error)}") from None


def _read_arrow(path: Path) -> Iterator[NumberedRow]:
    """Both kinds of Arrow IPC: the stream (as `datasets` writes it) and the file."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_stream(source)
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                source.seek(0)
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            yield from _numbered(batches)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not an Arrow file: {_one_line(error)}") from None


def _numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


# -- datasets ---------------------------------------------------------------------------------------


def _saved(path: Path, source: Source, place: str) -> RowFile:
    from datasets import load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # datasets lets errors of many libraries through
        raise UserError(f"{path}: not a folder saved by datasets: {_one_line(error)}") from None
    return _dataset(found, str(path), source, place)


def _hub(source: Source, place: str) -> RowFile:
    from datasets import load_dataset

    fetched = fetched_folder("dataset", source.path)  # what fetch brought is used until it is fetched anew
    try:
        found = load_dataset(str(fetched or source.path), source.subset, split=source.split)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise _hub_failed(source, place, error) from None
        raise UserError(f"{place}.split: '{source.split}': {_one_line(error)}") from None
    except Exception as error:  # datasets lets errors of many libraries through
        raise _hub_failed(source, place, error) from None
    return _dataset(found, source.path, source, place)


def _hub_failed(source: Source, place: str, error: Exception) -> UserError:
    return UserError(
        f"{place}.path: '{source.path}' is neither a local path nor a data set that can be had from the hub: "
        f"{_one_line(error)}",
        hint="check the name and the network; $HF_ENDPOINT names a mirror; a local file needs its suffix",
    )


def _dataset(found: Any, name: str, source: Source, place: str) -> RowFile:
    """A loaded `datasets` object as a file of rows."""
    if isinstance(found, dict):
        if source.split not in found:
            raise UserError(
                f"{place}.split: '{source.split}' is not a split of {name}", hint=f"it has {', '.join(found)}"
            )
        found = found[source.split]
    files = [Path(entry["filename"]) for entry in found.cache_files]

    def read() -> Iterator[NumberedRow]:
        return ((number, row) for number, row in enumerate(found, start=1))

    def digest() -> str:
        parts = [sha256_file(path) for path in files] or [found._fingerprint]
        return sha256_json([*parts, source.split, len(found)])

    return RowFile(name, "row", sum(path.stat().st_size for path in files), read, digest)


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


READERS: dict[str, tuple[str, Callable[[Path], Iterator[NumberedRow]]]] = {
    ".json": ("row", _read_json),
    ".jsonl": ("line", _read_jsonl),
    ".csv": ("row", _read_csv),
    ".parquet": ("row", _read_parquet),
    ".arrow": ("row", _read_arrow),
}
SUFFIXES = ", ".join(READERS)

"""Which GGUF files llama.cpp is given for the model that a user names, and which of them must be made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.export.save import EXPORT
from tunesmith.hub.gguf_file import is_gguf
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.weights import read_json_file
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.gguf_files import GgufJob, adapter_job, make_gguf_files, model_job
from tunesmith.workflows.given_adapters import adapter_beside, with_given_adapter

QUANTS = {"auto": None, "fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@dataclass(frozen=True)
class ServedGguf:
    """The file of the weights, and by name those of the adapters that requests may choose.

    folders: by the same names what the user gave for the adapters, as folders or GGUF files. merged: the
    model's own adapter is in the weights.
    """

    files: ModelFiles
    weights: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    merged: bool = False


def served_gguf(wants: EngineWants) -> ServedGguf:
    """What is there already, or was exported of the run's newest checkpoint; else made, once, of the model.

    A run's adapter stays beside its base unless it was exported, or --merge is given. Raises UserError for
    what llama.cpp cannot compute.
    """
    path = Path(wants.path).expanduser().absolute()
    if not is_run(path) and (path.is_file() or any(path.glob("*.gguf"))):
        return _given(wants, path)
    exported = None if wants.adapter or wants.adapters or wants.merge else _exported(path)
    if exported is not None and wants.precision == "auto":
        return ServedGguf(resolve_model(wants.path), exported, merged=True)
    return _made(wants)


def newest_gguf(folder: Path) -> Path | None:
    """The GGUF file that `folder` is, or the newest in it."""
    if folder.is_file():
        return folder if is_gguf(folder) else None
    return max(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime, default=None)


def _given(wants: EngineWants, path: Path) -> ServedGguf:
    """A GGUF file, or a folder that holds one."""
    file = newest_gguf(path)
    if file is None:
        raise UserError(f"{path}: is no GGUF file", hint="give a model folder, a run or a GGUF file")
    if wants.precision != "auto" or wants.merge:
        option = "--merge" if wants.merge else f"--precision {wants.precision}"
        raise UserError(f"{option}: {file} is served as it is", hint="leave it out, or give the model itself")
    files = resolve_model(str(file))
    if wants.adapter is not None:
        files = with_given_adapter(files, wants.adapter)
    return _with_adapters(wants, files, file)


def _exported(path: Path) -> Path | None:
    """The newest GGUF file of a run's newest checkpoint; says so when there are only files of others."""
    if not is_run(path):
        return None
    run = RunFolder(path)
    latest = run.latest_checkpoint()
    found = [folder for folder in run.path.glob("export/gguf/*") if (folder / EXPORT).is_file()]
    fresh = [
        folder
        for folder in found
        if latest is None or latest == run.checkpoint(read_json_file(folder / EXPORT).get("step") or 0)
    ]
    files = [file for folder in fresh if (file := newest_gguf(folder)) is not None]
    if found and not files:
        say(f"{path}: its GGUF exports are not of the newest checkpoint, and are passed over")
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def _made(wants: EngineWants) -> ServedGguf:
    files, quant = resolve_model(wants.path), QUANTS[wants.precision]
    if wants.merge or (files.base_adapters and wants.adapter is None and not wants.adapters):
        return _folded(wants, files, quant)
    if wants.adapter is not None:
        files = with_given_adapter(files, wants.adapter)
    if files.base_adapters:
        raise UserError(
            f"{wants.path}: it was trained on a tuned run, and llama.cpp computes one adapter for a request",
            hint="leave out --adapter: then all are folded into the weights",
        )
    job = model_job(str(files.folder), _without_adapter(files), quant)
    return _with_adapters(wants, files, job)


def _without_adapter(files: ModelFiles) -> ModelFiles:
    """The base by itself, with the tokenizer that lies beside its weights."""
    return ModelFiles(files.folder, files.folder.name, "folder", str(files.folder), files.folder)


def _folded(wants: EngineWants, files: ModelFiles, quant: str | None) -> ServedGguf:
    """One file of the model with all of its adapters in the weights."""
    if wants.adapter is not None or wants.adapters:
        raise UserError(
            f"{wants.path}: with its own adapter folded in there is no base for --adapter",
            hint="leave out --merge or --adapter",
        )
    job = model_job(wants.path, files, quant)
    make_gguf_files([job])
    return ServedGguf(files, job.file, merged=files.adapter is not None)


def _with_adapters(wants: EngineWants, files: ModelFiles, weights: GgufJob | Path) -> ServedGguf:
    """The base's file and one for every adapter, made where they are not there yet."""
    own = {wants.model_name or files.name: files.adapter} if files.adapter else {}
    folders = own | {name: _adapter(path, files) for name, path in wants.adapters.items()}
    jobs = {name: adapter_job(path, files.folder) for name, path in folders.items() if path.is_dir()}
    make_gguf_files([*([weights] if isinstance(weights, GgufJob) else []), *jobs.values()])
    adapters = {name: jobs[name].file if name in jobs else path for name, path in folders.items()}
    return ServedGguf(files, weights.file if isinstance(weights, GgufJob) else weights, adapters, folders)


def _adapter(path: str, files: ModelFiles) -> Path:
    """An adapter's folder, or its GGUF file."""
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        return adapter_beside(path, files)
    if not is_gguf(file):
        raise UserError(f"adapter {path}: is no GGUF file", hint="give an adapter folder or a run")
    return file

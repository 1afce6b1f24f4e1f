"""Turn a run or a model into a GGUF file for llama.cpp and Ollama, with a Modelfile beside it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.paths import new_folder, write_json, write_text
from tunesmith.core.proc import run as run_program
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, is_run, open_run, write_manifest
from tunesmith.export.check import Check
from tunesmith.export.gguf import (
    BY_LLAMA_QUANTIZE,
    DIRECT,
    K_BLOCK,
    GgufModel,
    check_family,
    check_gguf,
    end_ids,
    error_bound,
    estimated_bytes,
    usable_context,
    write_gguf,
)
from tunesmith.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from tunesmith.export.merge import merge_checked
from tunesmith.export.ollama import Render, match_form, modelfile
from tunesmith.export.save import EXPORT, check_target
from tunesmith.hub.lock import versions
from tunesmith.hub.made import check_disk
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import resolve_model
from tunesmith.model.config import load_config
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.recipe.resolve import SERVE_MAX_LENGTH
from tunesmith.workflows.export import (
    OTHER_FILES_BYTES,
    ExportResult,
    merged_bytes,
    open_job,
    probes,
    stop_ids_of,
)
from tunesmith.workflows.open_model import load_weights

MODELFILE = "Modelfile"
QUANTIZE = "llama-quantize"
LLAMA_QUANTIZE = "TUNESMITH_LLAMA_QUANTIZE"
_OWN_FORMAT = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class _Source:
    """What is exported: `files` with a trained adapter on top or not; run and step: None for a model."""

    files: ModelFiles
    tokenizer: Any
    stop_ids: tuple[int, ...]
    base: str
    run: RunFolder | None = None
    step: int | None = None
    prompts: tuple[list[int], ...] = ()

    @property
    def name(self) -> str:
        """A file name of the run's or model's name."""
        name = self.run.path.resolve().name if self.run else self.files.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def export_gguf(
    path: str, *, quant: str | None = None, output: Path | None = None, checkpoint: int | None = None
) -> ExportResult:
    """Write the newest (or given) checkpoint of the run `path`, or the model `path`, as one GGUF file.

    quant: a format of DIRECT or BY_LLAMA_QUANTIZE; default the weights' own. output: a new folder; default
    export/gguf/QUANT of the run, needed for a model. Raises UserError for what llama.cpp would not compute
    or tokenise as the model does, and where the program that writes the format is not installed; RunFailed
    when the file read back is not the model.
    """
    if quant is not None:
        _check_format(quant)
    source = _open_source(path, checkpoint)
    config = load_config(source.files.folder)
    check_family(config)
    fmt = quant or _OWN_FORMAT.get(config.dtype, "f32")
    target = _target(source, output, fmt)
    words = gguf_tokenizer(source.tokenizer, config.vocab_size)
    if not source.stop_ids:
        raise UserError(f"{path}: neither the tokenizer nor the template has a token that ends an answer")
    num_values = merged_bytes(source.files.folder, torch.float32) // torch.float32.itemsize
    need = estimated_bytes(num_values, fmt) + OTHER_FILES_BYTES
    check_disk(target.parent, need, what="the GGUF export")
    say(f"write {source.name} as GGUF, {fmt}")
    state, checks = _weights(source, config)
    model = _model(source, config, state, words)
    notes = _notes(words, model, config, fmt)
    with new_folder(target) as folder:
        file = folder / f"{source.name}-{fmt.upper()}.gguf"
        checks.append(_write(model, file, fmt))
        _write_others(folder, file, source, model, checks, notes)
    return ExportResult(
        "gguf", target, source.run.path if source.run else None, source.step, fmt, source.base, checks, notes
    )


def _check_format(fmt: str) -> None:
    if fmt not in (*DIRECT, *BY_LLAMA_QUANTIZE):
        raise UserError(
            f"--quant: '{fmt}' is not a format of GGUF weights",
            hint=f"take one of {', '.join((*DIRECT, *BY_LLAMA_QUANTIZE))}",
        )
    if fmt in BY_LLAMA_QUANTIZE:
        llama_quantize(fmt)


def llama_quantize(fmt: str) -> str:
    """The program that writes the format `fmt`: $TUNESMITH_LLAMA_QUANTIZE, else llama-quantize on PATH.

    Raises UserError when there is none.
    """
    named = os.environ.get(LLAMA_QUANTIZE)
    found = shutil.which(str(Path(named).expanduser()) if named else QUANTIZE)
    if found is None:
        where = f"'{named}' of ${LLAMA_QUANTIZE} is no program" if named else "it is not on PATH"
        raise UserError(
            f"--quant {fmt}: only llama.cpp's program '{QUANTIZE}' writes this format, and {where}",
            hint=f"install llama.cpp, name it in ${LLAMA_QUANTIZE}, or take one of {', '.join(DIRECT)}",
        )
    return found


def _open_source(path: str, checkpoint: int | None) -> _Source:
    folder = Path(path).expanduser()
    if is_run(folder):
        job = open_job(open_run(folder), checkpoint)
        prompts = tuple(probes(job))
        return _Source(job.trained, job.tokenizer, job.stop_ids, job.base_name, job.run, job.step, prompts)
    if checkpoint is not None:
        raise UserError(f"--checkpoint {checkpoint}: {path} is no run folder", hint="leave it out")
    files = resolve_model(path)
    tokenizer = load_tokenizer(files.tokenizer)
    base = files.name if files.source in ("hub", "builtin") else files.origin
    return _Source(files, tokenizer, stop_ids_of(tokenizer, files.folder), base)


def _target(source: _Source, output: Path | None, fmt: str) -> Path:
    if output is None:
        if source.run is None:
            raise UserError("--to gguf: a model that is no run needs a place", hint="give --output FOLDER")
        return (source.run.path / "export" / "gguf" / fmt).absolute()
    target = output.expanduser().absolute()
    check_target(target)
    return target


def _weights(source: _Source, config: Any) -> tuple[dict[str, torch.Tensor], list[Check]]:
    """The weights as trained: fp32 where an adapter is folded in, else as stored; nothing is rounded."""
    files = source.files
    tuned = files.adapter is not None or bool(files.base_adapters)
    dtype = torch.float32 if tuned or config.dtype not in _OWN_FORMAT else config.dtype
    model = load_weights(files, dtype=dtype, device="cpu", merge=not source.prompts)
    checks = []
    if files.adapter is not None and source.prompts:
        model, _, check = merge_checked(model, source.prompts)
        checks.append(check)
    return model.state_dict(), checks


def _model(source: _Source, config: Any, state: dict[str, torch.Tensor], words: GgufTokenizer) -> GgufModel:
    tokenizer = source.tokenizer
    return GgufModel(
        name=source.name,
        config=config,
        state=state,
        tokenizer=words,
        chat_template=tokenizer.chat_template,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        stop_ids=source.stop_ids,
    )


def _write(model: GgufModel, file: Path, fmt: str) -> Check:
    """Write and check the file; a format of llama-quantize goes through a file of full precision."""
    if fmt in DIRECT:
        error = write_gguf(model, file, fmt)
    else:
        full = file.with_name("full.gguf")
        write_gguf(model, full, "f32")
        run_program([llama_quantize(fmt), str(full), str(file), fmt.upper()])
        full.unlink()
        error = check_gguf(model, file, fmt)
    source = "every value within its format's rounding, by Frobenius norm of the worst tensor"
    return Check("GGUF read back against the weights", error, error_bound(fmt), source)


def _notes(words: GgufTokenizer, model: GgufModel, config: Any, fmt: str) -> tuple[str, ...]:
    notes = list(words.notes)
    widths = [tensor.shape[-1] for tensor in model.state.values() if tensor.ndim > 1]
    odd = sorted({width for width in widths if width % K_BLOCK})
    if fmt in BY_LLAMA_QUANTIZE and odd:
        notes.append(
            f"{fmt} has blocks of {K_BLOCK}: llama.cpp stores {sum(w in odd for w in widths)} of "
            f"{len(widths)} matrices, with rows of {', '.join(map(str, odd))}, in an older and larger format"
        )
    if len(end_ids(model)) > 3:
        left = [words.tokens[number] for number in end_ids(model)[3:]]
        notes.append(f"GGUF has room for three stop tokens: stop at {', '.join(left)} too")
    if usable_context(config) < config.max_position_embeddings:
        notes.append(f"attention slides over {usable_context(config)} tokens: the context is cut to that")
    for note in notes:
        say(f"note: {note}")
    return tuple(notes)


def _renderer(tokenizer: Any) -> Render:
    def render(messages: list[dict[str, str]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render


def _write_others(
    folder: Path,
    file: Path,
    source: _Source,
    model: GgufModel,
    checks: list[Check],
    notes: tuple[str, ...],
) -> None:
    stops = [model.tokenizer.tokens[number] for number in source.stop_ids]
    context = min(usable_context(model.config), SERVE_MAX_LENGTH)
    bos = source.tokenizer.bos_token if model.tokenizer.add_bos else None
    match = match_form(_renderer(source.tokenizer), bos)
    if match is None:
        say("warning: the chat template is none that is known for Ollama: the Modelfile has no TEMPLATE")
    write_text(folder / MODELFILE, modelfile(file.name, match=match, stops=stops, context=context))
    facts = {
        "to": "gguf",
        "file": file.name,
        "run": source.run.path.name if source.run else None,
        "step": source.step,
        "base": source.base,
        "base_revision": source.files.revision,
        "stop_ids": list(source.stop_ids),
        "ollama_template": match.form.name if match else None,
        "checks": [check.as_dict() for check in checks],
        "notes": list(notes),
        "versions": versions(),
    }
    write_json(folder / EXPORT, facts)
    for path in folder.iterdir():
        path.chmod(0o644)
    write_manifest(folder)

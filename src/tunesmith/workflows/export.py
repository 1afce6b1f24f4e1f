"""Turn a run into a folder that everyone can load: a peft adapter or a plain transformers model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.paths import new_folder, write_json, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, manifest_holds, open_run, read_manifest
from tunesmith.export.card import card
from tunesmith.export.check import Check
from tunesmith.export.merge import write_merged, write_plain
from tunesmith.export.probes import PROMPTS
from tunesmith.export.save import (
    EXPORT,
    check_target,
    copy_tokenizer,
    write_generation_config,
)
from tunesmith.hub.lock import read_lock, verify_model, versions
from tunesmith.hub.made import check_disk
from tunesmith.hub.model_files import ModelFiles
from tunesmith.hub.sources import run_base
from tunesmith.model.config import load_config
from tunesmith.model.hardware import DTYPES
from tunesmith.model.template import encode_prompt, stop_token_ids
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.weights import (
    ADAPTER_CONFIG,
    has_tokenizer,
    is_adapter,
    read_json_file,
    tensor_shapes,
    weight_files,
)
from tunesmith.workflows.open_model import load_weights
from tunesmith.workflows.run_facts import card_facts, run_recipe

Kind = Literal["adapter", "merged", "gguf", "int8", "awq"]
OTHER_FILES_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class ExportResult:
    """A published export; `checks` hold for a merged model, an adapter is copied as trained.

    run, step: None for an exported model that no run made. notes: what a user of the files should know.
    figures: how a quantised model compares with the trained one.
    """

    kind: Kind
    folder: Path
    run: Path | None
    step: int | None
    dtype: str
    base: str
    checks: list[Check]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "to": self.kind,
            "folder": str(self.folder),
            "run": str(self.run) if self.run else None,
            "step": self.step,
            "dtype": self.dtype,
            "base": self.base,
            "bytes": sum(path.stat().st_size for path in self.folder.iterdir()),
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Draft:
    """A folder being filled; what is put into checks and figures is told in its card."""

    folder: Path
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportJob:
    """What is exported: a whole checkpoint of a run, and the verified base it belongs to."""

    run: RunFolder
    checkpoint: Path
    base: ModelFiles
    tokenizer_folder: Path
    tokenizer: Any
    stop_ids: tuple[int, ...]
    trust_remote_code: bool

    @property
    def step(self) -> int:
        manifest = read_manifest(self.checkpoint) or {}
        return int(manifest.get("step", self.checkpoint.name.removeprefix("step-")))

    @property
    def adapter(self) -> Path | None:
        folder = self.checkpoint / "adapter"
        return folder if is_adapter(folder) else None

    @property
    def trained(self) -> ModelFiles:
        """The base with the checkpoint's adapter on top, or the checkpoint's own weights."""
        if self.adapter is not None:
            return self.base.with_adapter(self.adapter, origin=self.run.path, tokenizer=self.tokenizer_folder)
        return replace(
            self.base,
            folder=self.checkpoint / "model",
            tokenizer=self.tokenizer_folder,
            adapter=None,
            base_adapters=(),
        )

    @property
    def base_name(self) -> str:
        """What the base is called, so that it means the same on another machine where it can."""
        return self.base.name if self.base.source in ("hub", "builtin") else self.base.origin


def export_run(
    run: Path,
    to: Literal["adapter", "merged"],
    *,
    output: Path | None = None,
    checkpoint: int | None = None,
    dtype: str | None = None,
) -> ExportResult:
    """Write the adapter or the merged model of a run's newest (or the given) checkpoint, atomically.

    output: default export/adapter or export/merged of the run. dtype: fp32, bf16 or fp16 for merged weights;
    default the base's. Raises UserError when there is no such checkpoint, the base has changed since the
    training, or a full run is asked for an adapter; RunFailed when a merged model does not answer as the
    trained one.
    """
    job = open_job(open_run(run), checkpoint)
    target = (output or (job.run.adapter if to == "adapter" else job.run.merged)).expanduser().absolute()
    if output is not None:
        check_target(target)
    return _export_adapter(job, target, dtype) if to == "adapter" else _export_merged(job, target, dtype)


def open_job(run: RunFolder, step: int | None) -> ExportJob:
    checkpoint = _checkpoint(run, step)
    base = run_base(run)
    changed = verify_model(read_lock(run.lock), base)
    if changed:
        raise UserError(
            f"{run.path}: the base model has changed since the training: {'; '.join(changed[:3])}",
            hint=f"bring back the base model that {run.lock} describes",
        )
    own = run.path / "tokenizer"
    folder = own if has_tokenizer(own) else base.tokenizer
    trust = run_recipe(run).model.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    return ExportJob(run, checkpoint, base, folder, tokenizer, stop_ids_of(tokenizer, base.folder), trust)


def stop_ids_of(tokenizer: Any, base: Path) -> tuple[int, ...]:
    from transformers import GenerationConfig

    known = (base / "generation_config.json").is_file()
    return stop_token_ids(tokenizer, GenerationConfig.from_pretrained(base) if known else None)


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    if step is None:
        found = run.latest_checkpoint()
        if found is None:
            raise UserError(
                f"{run.path}: the run has no complete checkpoint to export",
                hint=f"let it train until it has saved one: tunesmith train {run.recipe}",
            )
        return found
    wanted = run.checkpoint(step)
    if not manifest_holds(wanted):
        names = ", ".join(str(int(p.name.removeprefix("step-"))) for p in run.complete_checkpoints())
        raise UserError(
            f"--checkpoint {step}: {run.path} has no complete checkpoint of that step",
            hint=f"complete are: {names or 'none'}",
        )
    return wanted


def _export_adapter(job: ExportJob, target: Path, dtype: str | None) -> ExportResult:
    if job.adapter is None:
        raise UserError(
            f"{job.run.path}: the run trained all weights, so it has no adapter",
            hint="export it with --to merged",
        )
    if dtype is not None:
        raise UserError("--dtype is for merged models: an adapter is exported as trained, in fp32")
    size = sum(path.stat().st_size for path in job.adapter.iterdir())
    with publish(job, "adapter", target, size, "float32") as draft:
        for path in sorted(job.adapter.iterdir()):
            shutil.copyfile(path, draft.folder / path.name)
        _name_base(draft.folder, job)
    return ExportResult("adapter", target, job.run.path, job.step, "float32", job.base_name, draft.checks)


def _name_base(folder: Path, job: ExportJob) -> None:
    """An adapter trained over a tuned run has that run as its base: the plain model below would be wrong."""
    if job.base.adapter is None:
        return
    config = read_json_file(folder / ADAPTER_CONFIG)
    write_json(
        folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": job.base.origin, "revision": None}
    )


def _export_merged(job: ExportJob, target: Path, dtype: str | None) -> ExportResult:
    wanted = weights_dtype(dtype, job.base.folder, job.trust_remote_code)
    name = str(wanted).removeprefix("torch.")
    size = merged_bytes(job.trained.folder, wanted)
    prompts = probes(job)
    with publish(job, "merged", target, size, name) as draft:
        say(f"merge and check {job.run.path.name}, step {job.step}, as {name}")
        model = load_weights(
            job.trained, dtype=torch.float32, device="cpu", trust_remote_code=job.trust_remote_code
        )
        write = write_merged if job.adapter else _write_full
        draft.checks.extend(
            write(
                model,
                draft.folder,
                dtype=wanted,
                prompts=prompts,
                trust_remote_code=job.trust_remote_code,
            )
        )
    return ExportResult("merged", target, job.run.path, job.step, name, job.base_name, draft.checks)


def _write_full(model: Any, folder: Path, **how: Any) -> list[Check]:
    return [write_plain(model, folder, **how)]


@contextmanager
def publish(job: ExportJob, kind: Kind, target: Path, weight_bytes: int, dtype: str) -> Iterator[Draft]:
    """Yield a new folder for the weights; add all other files, then rename it to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    check_disk(target.parent, weight_bytes + OTHER_FILES_BYTES, what=f"the {kind} export")
    with new_folder(target) as folder:
        draft = Draft(folder)
        yield draft
        (folder / "generation_config.json").unlink(missing_ok=True)
        copy_tokenizer(job.tokenizer_folder, folder)
        write_generation_config(job.base.folder, folder, job.stop_ids, job.tokenizer.pad_token_id)
        facts = card_facts(
            job.run, kind=kind, step=job.step, base=job.base, base_name=job.base_name, checks=draft.checks
        )
        write_text(folder / "README.md", card(replace(facts, quantised=draft.figures)))
        write_json(folder / EXPORT, _about(job, kind, dtype, draft))
        for path in folder.iterdir():
            path.chmod(0o644)


def _about(job: ExportJob, kind: Kind, dtype: str, draft: Draft) -> dict[str, Any]:
    return {
        "to": kind,
        "run": job.run.path.name,
        "step": job.step,
        "dtype": dtype,
        "base": job.base_name,
        "base_revision": job.base.revision,
        "checks": [check.as_dict() for check in draft.checks],
        "figures": draft.figures,
        "versions": versions(),
    }


def weights_dtype(wanted: str | None, base: Path, trust: bool) -> torch.dtype:
    """The format that `wanted` names, else the base's own. Raises UserError for another name."""
    if wanted is None:
        found = load_config(base, trust_remote_code=trust).dtype
        return found if isinstance(found, torch.dtype) else torch.float32
    if wanted not in ("fp32", "bf16", "fp16"):
        raise UserError(f"--dtype: '{wanted}' is not a format of weights", hint="take fp32, bf16 or fp16")
    return DTYPES[wanted]


def merged_bytes(folder: Path, dtype: torch.dtype) -> int:
    shapes = [shape for path in weight_files(folder) for shape in tensor_shapes(path).values()]
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def probes(job: ExportJob) -> list[list[int]]:
    """Token ids that the merge is checked on: the recipe's own sample prompts, and fixed ones."""
    texts = [*run_recipe(job.run).samples.prompts, *PROMPTS]
    if not job.tokenizer.chat_template:
        return [job.tokenizer(text).input_ids for text in texts]
    return [encode_prompt(job.tokenizer, [{"role": "user", "content": text}]) for text in texts]

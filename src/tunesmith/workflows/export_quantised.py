"""Turn a run into a folder of int8 or 4-bit weights for vLLM, judged beside the weights as trained."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.core.run_folder import open_run
from tunesmith.core.units import bytes_text
from tunesmith.export.awq import BITS, write_awq
from tunesmith.export.check import Check
from tunesmith.export.int8 import write_int8
from tunesmith.export.linears import GROUP_SIZES, check_linears, empty_model, quantised_bytes
from tunesmith.export.merge import merge_checked
from tunesmith.export.quality import Behaviour, behaviour, compared, load_quantised
from tunesmith.export.save import check_target
from tunesmith.model.config import load_config
from tunesmith.workflows.calibration import RunRows, run_rows
from tunesmith.workflows.export import (
    Draft,
    ExportJob,
    ExportResult,
    open_job,
    probes,
    publish,
    weights_dtype,
)
from tunesmith.workflows.open_model import load_weights
from tunesmith.workflows.run_facts import run_recipe

To = Literal["int8", "awq"]
# Of the process at its largest: fp32 weights with what is read back, for awq also layers being searched.
PROGRAM_BYTES = 512 * 1024**2
BYTES_PER_VALUE = {"int8": 8, "awq": 12}
PACKAGES = {"int8": ("compressed_tensors",), "awq": ("compressed_tensors", "llmcompressor")}


@dataclass(frozen=True)
class _Plan:
    """group_size: inputs that share a scale, None for whole rows; size: bytes of the weights to come;
    num_values: of the whole model."""

    job: ExportJob
    to: To
    target: Path
    dtype: torch.dtype
    group_size: int | None
    size: int
    num_values: int
    rows: RunRows
    note: str | None

    @property
    def dtype_name(self) -> str:
        kind = "int8" if self.to == "int8" else f"int{BITS}, groups of {self.group_size}"
        return f"{kind}; the rest {str(self.dtype).removeprefix('torch.')}"


def export_quantised(
    run: Path,
    to: To,
    *,
    output: Path | None = None,
    checkpoint: int | None = None,
    dtype: str | None = None,
    group_size: int | None = None,
) -> ExportResult:
    """Write the newest (or given) checkpoint with int8 or, by AWQ, 4-bit linear layers, atomically.

    output: default export/int8 or export/awq of the run. dtype: of what is not quantised; default the base's.
    group_size: of awq, one of GROUP_SIZES, default the first. Raises UserError for a model that cannot be
    quantised so, a package that is not installed, and rows for awq that are not there any more; RunFailed
    when the folder read back is not the model that was trained.
    """
    _check_installed(to)
    plan = _plan(run, to, output, checkpoint, dtype, _group_size(to, group_size))
    job, prompts = plan.job, probes(plan.job)
    with publish(job, to, plan.target, plan.size, plan.dtype_name) as draft:
        say(_announced(plan))
        model, checks = _merged(job, prompts)
        draft.checks.extend(checks)
        before = behaviour(model, plan.rows.judged, prompts, job.stop_ids)
        _write(plan, model, draft.folder)
        del model
        gc.collect()
        _judge(plan, draft, before, prompts)
    notes = (plan.note,) if plan.note else ()
    return ExportResult(
        to,
        plan.target,
        job.run.path,
        job.step,
        plan.dtype_name,
        job.base_name,
        draft.checks,
        notes,
        draft.figures,
    )


def _check_installed(to: To) -> None:
    missing = [name for name in PACKAGES[to] if importlib.util.find_spec(name) is None]
    if not missing:
        return
    own = " in an environment of its own: llm-compressor wants an older transformers" if to == "awq" else ""
    raise UserError(
        f"--to {to}: the package {missing[-1].replace('_', '-')} is not installed",
        hint=f"pip install 'tunesmith[{to}]'{own}",
    )


def _group_size(to: To, wanted: int | None) -> int | None:
    if to == "int8":
        if wanted is not None:
            raise UserError(f"--group-size {wanted}: is for awq; int8 has a scale for each whole row")
        return None
    if wanted is not None and wanted not in GROUP_SIZES:
        raise UserError(f"--group-size {wanted}: vLLM has no such groups", hint=f"take one of {GROUP_SIZES}")
    return wanted or GROUP_SIZES[0]


def _plan(
    run: Path, to: To, output: Path | None, step: int | None, dtype: str | None, group_size: int | None
) -> _Plan:
    job = open_job(open_run(run), step)
    target = (output or job.run.path / "export" / to).expanduser().absolute()
    check_target(target)
    trust = job.trust_remote_code
    shape = empty_model(load_config(job.trained.folder, trust_remote_code=trust), trust_remote_code=trust)
    check_linears(shape, to, group_size)
    wanted = weights_dtype(dtype, job.base.folder, trust)
    size = quantised_bytes(shape, BITS if to == "awq" else 8, group_size, wanted)
    rows, note = _rows(job, to)
    num_values = sum(p.numel() for p in shape.parameters())
    return _Plan(job, to, target, wanted, group_size, size, num_values, rows, note)


def _rows(job: ExportJob, to: To) -> tuple[RunRows, str | None]:
    """awq cannot do without the run's rows; int8 is then judged on the probes alone, and says so."""
    try:
        rows = run_rows(run_recipe(job.run), job.tokenizer)
    except UserError as error:
        if to == "awq":
            raise UserError(
                f"--to awq: calibrates on the run's own rows: {error.what}",
                hint="bring the data back to its place, or take --to int8, which needs none",
            ) from error
        return RunRows(), f"the loss was not compared: {error.what}"
    return rows, None if rows.judged else "the loss was not compared: the run held out no rows"


def _announced(plan: _Plan) -> str:
    memory = PROGRAM_BYTES + BYTES_PER_VALUE[plan.to] * plan.num_values
    calibrated = f", calibrated on {len(plan.rows.trained)} rows of its training" if plan.to == "awq" else ""
    return (
        f"quantise {plan.job.run.path.name}, step {plan.job.step}, to {plan.dtype_name}{calibrated}: "
        f"{bytes_text(plan.size)} of disk, some {bytes_text(memory)} of memory"
    )


def _merged(job: ExportJob, prompts: list[list[int]]) -> tuple[Any, list[Check]]:
    model = load_weights(
        job.trained, dtype=torch.float32, device="cpu", trust_remote_code=job.trust_remote_code
    )
    if job.adapter is None:
        return model, []
    merged, _, check = merge_checked(model, prompts)
    return merged, [check]


def _write(plan: _Plan, model: Any, folder: Path) -> None:
    if plan.group_size is None:
        write_int8(model, folder, dtype=plan.dtype)
        return
    write_awq(
        model,
        folder,
        tokenizer=plan.job.tokenizer,
        rows=plan.rows.trained,
        group_size=plan.group_size,
        dtype=plan.dtype,
    )


def _judge(plan: _Plan, draft: Draft, before: Behaviour, prompts: list[list[int]]) -> None:
    after = behaviour(load_quantised(draft.folder), plan.rows.judged, prompts, plan.job.stop_ids)
    draft.figures.update(compared(before, after, len(plan.rows.judged)))

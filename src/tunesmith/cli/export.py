"""tunesmith export: a run as an adapter, a merged or quantised model folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.loading import first_load
from tunesmith.core.units import bytes_text

if TYPE_CHECKING:
    from tunesmith.workflows.export import ExportResult

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith export runs/orders --to merged

tunesmith export runs/orders --to adapter --checkpoint 500 --output my-adapter

tunesmith export runs/orders --to gguf --quant q8_0

tunesmith export runs/orders --to awq --group-size 64

tunesmith export s3://bucket/runs/orders --to merged --output s3://bucket/models/orders
"""


@app.command(epilog=EXAMPLES)
def export(
    run: str = typer.Argument(
        metavar="RUN|MODEL",
        help="The run folder or its URL; for gguf also whatever model.path of a recipe takes.",
    ),
    to: Literal["adapter", "merged", "gguf", "int8", "awq"] = typer.Option(
        help="adapter: peft's two files; merged: a plain transformers model; gguf: one file for llama.cpp, "
        "with a Modelfile for Ollama; int8, awq: linear layers of 8 or 4 bits, for vLLM."
    ),
    output: str | None = typer.Option(
        None, help="New folder to write, or its URL in an object store; default: export/ in the run folder."
    ),
    checkpoint: int | None = typer.Option(None, help="Step of the checkpoint; default: the newest."),
    dtype: Literal["fp32", "bf16", "fp16"] | None = typer.Option(
        None, help="Number format of merged weights, and of what int8 and awq leave; default: the base's."
    ),
    quant: str | None = typer.Option(
        None,
        metavar="FORMAT",
        help="Number format of GGUF weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; with llama.cpp "
        "installed also q2_k to q6_k, such as q4_k_m. Default: the weights' own.",
    ),
    group_size: int | None = typer.Option(
        None,
        help="Of awq: inputs that share a scale, 128 (the default), 64 or 32.",
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a run's trained weights as a folder that peft, transformers, llama.cpp or Ollama load.

    What is written is read back and compared with the trained model before it gets its name.
    """
    with first_load("torch"):
        from tunesmith.workflows.export import export_run
        from tunesmith.workflows.export_gguf import export_gguf
        from tunesmith.workflows.export_quantised import export_quantised
        from tunesmith.workflows.export_store import export_anywhere

    if to == "gguf":
        _refuse("--dtype", dtype, "the format of GGUF weights is --quant")
    else:
        _refuse("--quant", quant, "only --to gguf has formats of that kind; take --dtype")
    if to != "awq":
        _refuse("--group-size", group_size, "only --to awq has groups to choose")

    def write(path: str, folder: Path | None) -> ExportResult:
        if to == "gguf":
            return export_gguf(path, quant=quant, output=folder, checkpoint=checkpoint)
        if to == "adapter" or to == "merged":
            return export_run(Path(path), to, output=folder, checkpoint=checkpoint, dtype=dtype)
        return export_quantised(
            Path(path), to, output=folder, checkpoint=checkpoint, dtype=dtype, group_size=group_size
        )

    default = f"gguf/{quant or 'own'}" if to == "gguf" else to
    done = export_anywhere(run, output, write, default=default, checkpoint=checkpoint)
    if json:
        print_json(done)
        return
    of = "" if done["step"] is None else f" of step {done['step']}"
    typer.echo(f"{to}{of}, {done['dtype']}, {bytes_text(done['bytes'])}: {done['folder']}")
    for check in done["checks"]:
        typer.echo(f"  {check['name']}: differ by {check['difference']:.1e}, bound {check['bound']:.1e}")
    for name, value in done["figures"].items():
        typer.echo(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")


def _refuse(option: str, value: str | int | None, hint: str) -> None:
    if value is not None:
        raise UserError(f"{option} {value}: does not go with this --to", hint=hint)

"""tunesmith export: a run as an adapter folder or a merged model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load
from tunesmith.core.units import bytes_text

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith export runs/orders --to merged

tunesmith export runs/orders --to adapter --checkpoint 500 --output my-adapter
"""


@app.command(epilog=EXAMPLES)
def export(
    run: Path = typer.Argument(help="The run folder."),
    to: Literal["adapter", "merged"] = typer.Option(
        help="adapter: peft's two files; merged: a plain transformers model."
    ),
    output: Path | None = typer.Option(None, help="New folder to write; default: export/ in the run folder."),
    checkpoint: int | None = typer.Option(None, help="Step of the checkpoint; default: the newest."),
    dtype: Literal["fp32", "bf16", "fp16"] | None = typer.Option(
        None, help="Number format of merged weights; default: the base model's."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a run's trained weights as a folder that peft or transformers load.

    A merged model is read back and compared with the adapter before it gets its name.
    """
    with first_load("torch"):
        from tunesmith.workflows.export import export_run

    done = export_run(run, to, output=output, checkpoint=checkpoint, dtype=dtype).as_dict()
    if json:
        print_json(done)
        return
    typer.echo(f"{to} of step {done['step']}, {done['dtype']}, {bytes_text(done['bytes'])}: {done['folder']}")
    for check in done["checks"]:
        typer.echo(f"  {check['name']}: differ by {check['difference']:.1e}, bound {check['bound']:.1e}")

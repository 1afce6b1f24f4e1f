"""tunesmith bench: measure training on this machine, beside other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Measure training on this machine, beside other tools.",
    epilog="Example: tunesmith bench train --peer plain",
)

EXAMPLES = """Examples:

tunesmith bench train --peer plain

tunesmith bench train --peer trl-packed --peer llamafactory --install --repeat 3

tunesmith bench train --data my_rows.json --method full --set train.gradient_checkpointing=full
"""


@app.callback()
def bench() -> None:
    """Measure training on this machine, beside other tools."""


@app.command(epilog=EXAMPLES)
def train(
    model: str = typer.Option("smollm2-135m-instruct", help="The model: a folder, hub id or built-in name."),
    data: Path | None = typer.Option(None, help="A file of rows; default: made-up rows of Alpaca's shape."),
    method: list[str] | None = typer.Option(None, help="lora or full; repeat it for both. Default: both."),
    peer: list[str] | None = typer.Option(
        None, help="Whom to compare with: plain, trl, trl-packed, llamafactory, …; repeatable."
    ),
    envs: Path | None = typer.Option(None, help="Folder of the peers' environments; default: in the cache."),
    install: bool = typer.Option(
        False, "--install", help="Make the environments that are missing, with pip."
    ),
    rows: int = typer.Option(72, min=2, help="Rows to train on."),
    rows_per_step: int = typer.Option(8, min=1, help="Rows of an optimizer step."),
    max_length: int = typer.Option(512, min=8, help="Longer rows are left out, in tokens."),
    rank: int = typer.Option(8, min=1, help="Rank of the adapters."),
    lr: float = typer.Option(1e-4, help="Learning rate, constant."),
    precision: str = typer.Option("auto", help="fp32 or bf16; auto: bf16 where the hardware multiplies it."),
    device: str = typer.Option("auto", help="cpu or cuda; auto: a GPU when there is one."),
    threads: int | None = typer.Option(
        None, min=1, help="CPU threads of every contender; default: all cores."
    ),
    repeat: int = typer.Option(3, min=1, help="Runs of every contender, in turns."),
    reference: bool = typer.Option(True, help="Also run the plain loop once in fp32 and compare the losses."),
    seed: int = typer.Option(0, help="Seed of rows, order and adapters."),
    output: Path = typer.Option(
        Path("bench-train"), help="Folder for results.json, curves.svg and the logs."
    ),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of our recipe; repeatable."
    ),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train the same rows with tunesmith and its peers, in turns; tokens/s, memory, start-up and losses."""
    with first_load("torch"):
        from tunesmith.workflows.bench import BenchOptions, bench_train

    values: dict[str, Any] = {
        "model": model, "data": data, "methods": tuple(method or ("lora", "full")),
        "peers": tuple(peer or ()),
        "envs": envs, "install": install, "rows": rows, "rows_per_step": rows_per_step,
        "max_length": max_length, "rank": rank, "lr": lr, "precision": precision, "device": device,
        "threads": threads, "repeat": repeat, "reference": reference, "seed": seed, "output": output,
        "overrides": tuple(set_ or ()),
    }  # fmt: skip
    found = bench_train(BenchOptions(**values))
    if json:
        print_json(found)
    else:
        typer.echo(found["table"])

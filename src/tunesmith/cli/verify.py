"""tunesmith verify: proofs on the user's own recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from tunesmith.cli.main import print_json
from tunesmith.core.loading import first_load

if TYPE_CHECKING:
    from tunesmith.workflows.parity import Parity
    from tunesmith.workflows.verify import Verified

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Prove on your own recipe what is promised.",
    epilog="Examples: tunesmith verify resume recipe.yaml | tunesmith verify parity runs/orders --url "
    "http://127.0.0.1:8000",
)


@app.callback()
def verify() -> None:
    """Prove on your own recipe what is promised."""


@app.command(
    epilog="Examples: tunesmith verify resume recipe.yaml | tunesmith verify resume recipe.yaml --kills 5 "
    "--steps 40 --set train.micro_batch_size=1"
)
def resume(
    recipe: Path = typer.Argument(metavar="RECIPE", help="The recipe file."),
    set_: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."
    ),
    steps: int = typer.Option(12, min=4, help="Optimizer steps of the short run."),
    kills: int = typer.Option(3, min=1, help="How often it is killed."),
    seed: int | None = typer.Option(None, help="Seed of the instants; default: other ones each time."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Train a few steps twice: once through, once killed with SIGKILL at random and resumed. Exit code 0 if
    every loss, weight and optimizer state is the same bit for bit, else 1."""
    from tunesmith.workflows.verify import verify_resume

    found = verify_resume(recipe, set_ or [], steps=steps, kills=kills, seed=seed)
    if json:
        print_json(found.as_dict())
    else:
        show(found)
    raise typer.Exit(0 if found.equal else 1)


@app.command(
    epilog="Examples: tunesmith verify parity runs/orders --url http://127.0.0.1:8000 | tunesmith verify "
    'parity runs/orders --url https://example.org --api-key "$KEY" --rows 32'
)
def parity(
    run: str = typer.Argument(metavar="RUN", help="The run folder, or its URL."),
    url: str = typer.Option(..., help="Address of the endpoint; ours, vLLM's or another."),
    api_key: str | None = typer.Option(
        None, envvar="TUNESMITH_API_KEY", show_envvar=True, help="Key that the endpoint asks for."
    ),
    model: str | None = typer.Option(None, help="Name of the model there; default: its first."),
    data: Path | None = typer.Option(None, help="A file of rows; default: rows that the run held out."),
    rows: int = typer.Option(8, min=1, help="Rows to compare; one more is as long as the run's context."),
    new_tokens: int = typer.Option(32, min=1, help="Tokens of the greedy answers."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Compare an endpoint with the run that it should serve: token ids, log-probabilities, greedy answers and
    their ends. Exit code 0 if all are the same, else 1."""
    with first_load("torch"):
        from tunesmith.workflows.parity import verify_parity

    found = verify_parity(run, url, api_key=api_key, model=model, data=data, rows=rows, new_tokens=new_tokens)
    if json:
        print_json(found.as_dict())
    else:
        show_parity(found)
    raise typer.Exit(0 if found.equal else 1)


def show_parity(found: Parity) -> None:
    console = Console(highlight=False)
    table = Table("check", "rows", "faults", "", box=None, pad_edge=False)
    for check, count in found.checked.items():
        faults = sum(finding.check == check for finding in found.findings)
        table.add_row(check, str(count), str(faults), found.skipped.get(check, ""))
    console.print(table)
    for finding in found.findings:
        console.print(f"{finding.place}: {finding.why}", soft_wrap=True, markup=False)
    verdict = "the same as in training" if found.equal else f"{len(found.findings)} differences"
    console.print(f"{found.model} at {found.url}: {verdict}", soft_wrap=True, markup=False)


def show(found: Verified) -> None:
    table = Table("step", "once through", "killed and resumed", "", box=None, pad_edge=False)
    resumed = {kill.resumed_from: kill for kill in found.kills}
    notes = {kill.after_step: "killed" for kill in found.kills}
    for step in resumed:
        notes[step] = ", ".join(filter(None, [notes.get(step), "resumed from here"]))
    for step, loss in sorted(found.once.losses.items()):
        other = found.killed.losses.get(step)
        mark = "" if loss == other else "DIFFERENT"
        shown = "-" if other is None else f"{other:.9f}"
        table.add_row(str(step), f"{loss:.9f}", shown, " ".join(filter(None, [mark, notes.get(step)])))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{found.steps} steps, {len(found.kills)} kills: {verdict(found)}", soft_wrap=True)


def verdict(found: Verified) -> str:
    if not found.equal:
        return f"NOT the same: {found.first_difference}"
    held = f", {len(found.once.others)} held-out losses and answers" if found.once.others else ""
    files = f"{len(found.once.files)} files of weights and optimizer state"
    return f"{len(found.once.losses)} losses{held} and {files} are the same, bit for bit"

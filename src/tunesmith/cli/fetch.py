"""tunesmith fetch: bring a model or data set to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.errors import UserError
from tunesmith.core.units import bytes_text

app = typer.Typer(add_completion=False)

EXAMPLES = """Examples:

tunesmith fetch smollm2-135m-instruct

tunesmith fetch Qwen/Qwen2.5-0.5B-Instruct --endpoint hf-mirror --endpoint modelscope

tunesmith fetch --dataset tatsu-lab/alpaca --dry-run

tunesmith fetch --recipe recipe.yaml --lock lock.json
"""


@app.command(epilog=EXAMPLES)
def fetch(
    what: str | None = typer.Argument(
        None,
        metavar="[MODEL|DATASET|RECIPE]",
        help="Hub id (owner/name), built-in name, GGUF file, folder of a model, adapter or run; a data set "
        "with --dataset or as datasets/owner/name; or a recipe.",
    ),
    recipe: Path | None = typer.Option(None, help="Bring all that this recipe needs: model and data sets."),
    dataset: bool = typer.Option(False, "--dataset", help="The id is a data set's."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit of a hub id."),
    endpoint: list[str] | None = typer.Option(
        None,
        help="Where to fetch: a URL, hub, hf-mirror, modelscope, modelscope:URL, or a folder; repeat it to "
        "try several in order. Default: $HF_ENDPOINT, else the hub.",
    ),
    allow: list[str] | None = typer.Option(
        None, help="Pattern of files to bring in place of the default choice; repeatable."
    ),
    deny: list[str] | None = typer.Option(None, help="Pattern of files to leave out; repeatable."),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Also bring pickles (.bin, .pt, .pkl, .ckpt), which can run any code."
    ),
    jobs: int = typer.Option(8, help="Files that come at the same time."),
    min_speed: float = typer.Option(
        32.0, help="KiB/s; an endpoint slower than this for 15 s is left while another is there. 0: never."
    ),
    offline: bool = typer.Option(False, "--offline", help="Use only what is in the cache."),
    lock: Path | None = typer.Option(None, help="Write the lock (revision, hashes, versions) to this file."),
    dry_run: bool = typer.Option(False, "--dry-run", help="List files and sizes, and bring nothing."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Bring a model, a data set, or all that a recipe needs; every file is checked before it is in place."""
    from tunesmith.workflows import fetch as work

    if (what is None) == (recipe is None):
        raise UserError(
            "tunesmith fetch: give one thing to fetch", hint="a hub id, or a recipe: --recipe recipe.yaml"
        )
    name, is_dataset = work.kind_by_prefix(str(recipe or what))
    is_dataset = is_dataset or dataset
    how = work.how(
        revision=revision,
        endpoints=endpoint or (),
        offline=offline,
        allow=allow or (),
        deny=deny or (),
        allow_pickle=allow_pickle,
        jobs=jobs,
        slow_kib_per_s=min_speed,
    )
    if dry_run:
        found = work.plan_fetch(name, dataset=is_dataset, recipe=recipe, how=how)
    elif recipe is not None:
        found = work.fetch_recipe(recipe, how=how, lock=lock).as_dict()
    elif is_dataset:
        found = work.fetch_dataset(name, how=how, lock=lock).as_dict()
    else:
        found = work.fetch(name, how=how, lock=lock).as_dict()
    if json:
        print_json(found)
        return
    (show_plan if dry_run else show)(found)


def show(found: dict[str, Any]) -> None:
    kind = "model" if "model" in found else "dataset"
    typer.echo(f"{kind:<9} {found[kind]} ({found['source']}), {bytes_text(found['bytes'])}")
    typer.echo(f"folder    {found['folder']}")
    if found["revision"]:
        typer.echo(f"revision  {found['revision']}")
    if found.get("adapter"):
        typer.echo(f"adapter   {found['adapter']}")
    for name, entry in found["files"].items():
        typer.echo(f"  {entry['sha256']}  {bytes_text(entry['bytes']):>10}  {name}")
    for below in found.get("datasets", []):
        show(below)
    if found["lock"]:
        typer.echo(f"lock      {found['lock']}")


def show_plan(found: dict[str, Any]) -> None:
    kind = "model" if "model" in found else "dataset"
    typer.echo(f"{kind:<9} {found[kind]}: {found['note'] if 'note' in found else found['endpoint']}")
    if found["revision"]:
        typer.echo(f"revision  {found['revision']}")
    for name, entry in found["files"].items():
        size = "unknown" if entry["bytes"] is None else bytes_text(entry["bytes"])
        typer.echo(f"  {size:>10}  {name}{'  (here)' if entry['here'] else ''}")
    typer.echo(f"total     {bytes_text(found['bytes'])}, to come {bytes_text(found['missing_bytes'])}")
    for below in found.get("datasets", []):
        show_plan(below)

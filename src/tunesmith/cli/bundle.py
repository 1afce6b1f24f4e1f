"""tunesmith bundle: collect all that a machine without network needs, check it, and install it there."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.cli.setup import confirm, show_outcome, show_plans
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.units import bytes_text

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Carry tunesmith, models and data to a machine without network: create, verify, install.",
    epilog="Example: tunesmith bundle create /media/usb/bundle recipe.yaml --distro ubuntu-22.04 --split 4G",
)

DIR = typer.Argument(metavar="DIR", help="The folder of the bundle.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(iB|B)?$", re.IGNORECASE)
SMALLEST_VOLUME = 1_000_000

CREATE_EXAMPLES = """Examples:

tunesmith bundle create bundle

tunesmith bundle create bundle recipe.yaml --distro ubuntu-22.04 --image tunesmith:train --split 4G

tunesmith bundle create bundle --parts wheels --platform manylinux_2_28_x86_64 --python 3.12
"""


def volume_bytes(text: str) -> int:
    """`4G` -> 4000000000, `700MiB` -> 734003200. Raises UserError for what is no size, or less than 1 MB."""
    found = SIZE.match(text.strip())
    if found is None:
        raise UserError(f"--split '{text}': is no size", hint="write it as 4G, 700M or 2GiB")
    base = 1024 if (found[3] or "").lower() == "ib" else 1000
    num_bytes = int(float(found[1]) * base ** ("KMGT".index(found[2].upper()) + 1 if found[2] else 0))
    if num_bytes < SMALLEST_VOLUME:
        raise UserError(f"--split '{text}': is less than 1 MB", hint="a FAT32 stick takes files below 4G")
    return num_bytes


def names(text: str | None) -> tuple[str, ...] | None:
    """`a,b` -> ("a", "b"); None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@app.command(epilog=CREATE_EXAMPLES)
def create(
    folder: Path = DIR,
    recipe: Path | None = typer.Argument(None, help="Carry what this recipe needs; default: the quickstart."),
    parts: str | None = typer.Option(
        None,
        metavar="LIST",
        help="Of packages,wheels,images,model,data,project; default: the last three and wheels, and what "
        "--distro and --image name.",
    ),
    distro: list[str] = typer.Option([], metavar="NAME", help="Host packages of ubuntu-22.04, rocky-9, …"),
    gpu: bool = typer.Option(True, help="With the packages of the NVIDIA Container Toolkit."),
    mirror: str | None = typer.Option(None, metavar="URL", help="Archive of the host packages (apt)."),
    platform: list[str] = typer.Option(
        [], metavar="TAG", help="Wheels for this platform, such as manylinux_2_28_x86_64; default: this one."
    ),
    python: str | None = typer.Option(None, metavar="X.Y", help="Wheels for this Python; default: this one."),
    extras: str = typer.Option("serve", metavar="LIST", help="Extras of tunesmith; serve includes train."),
    image: list[str] = typer.Option([], metavar="TAG", help="A container image of this docker; repeatable."),
    model: list[str] = typer.Option([], metavar="MODEL", help="Another model, as for fetch; repeatable."),
    split: str | None = typer.Option(None, metavar="SIZE", help="Cut larger files: 4G suits a USB stick."),
    json: bool = JSON,
) -> None:
    """Collect everything into DIR, and write its manifest last. Call it again to go on where it stopped."""
    from tunesmith.workflows.bundle import CreateOptions
    from tunesmith.workflows.bundle import create as run

    found = run(
        CreateOptions(
            bundle=folder,
            recipe=recipe,
            parts=names(parts),
            distros=tuple(distro),
            platforms=tuple(platform),
            python=python,
            extras=extras,
            images=tuple(image),
            models=tuple(model),
            split_bytes=volume_bytes(split) if split else None,
            gpu=gpu,
            mirror=mirror,
        )
    ).as_dict()
    if json:
        print_json(found)
        return
    _show(found)
    typer.echo(f"on the machine without network:  sh {Path(str(found['bundle'])).name}/install.sh")


@app.command(epilog="Example: tunesmith bundle verify /media/usb/bundle --json")
def verify(
    folder: Path = DIR,
    expect: str | None = typer.Option(
        None, metavar="SHA256", help="The hash of the manifest that 'create' printed: no other bundle passes."
    ),
    json: bool = JSON,
) -> int:
    """Read every byte; name every file that is changed, missing, extra or cut short. Exit code 1 for any."""
    from tunesmith.workflows.bundle import verify as run

    found = run(folder, expect=expect).as_dict()
    if json:
        print_json(found)
    else:
        _show(found)
        for fault in found["faults"]:
            typer.echo(f"{fault['path']}: {fault['what']}")
        typer.echo("whole" if found["ok"] else f"DAMAGED: {len(found['faults'])} faults")
    return 0 if found["ok"] else 1


@app.command(epilog="Example: tunesmith bundle install /media/usb/bundle --project work")
def install(
    folder: Path = DIR,
    parts: str | None = typer.Option(None, metavar="LIST", help="Only these parts; default: all it holds."),
    venv: Path | None = typer.Option(None, help="Make a Python environment there from the wheels."),
    project: Path = typer.Option(
        Path("tunesmith"), help="Folder for the recipe, its data, and the examples."
    ),
    yes: bool = typer.Option(False, "--yes", help="Do not ask before host packages are installed (as root)."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Verify, and say what would be done."),
    verified: bool = typer.Option(
        False, "--verified", help="The bundle was verified just now; files put in place are checked anyway."
    ),
    json: bool = JSON,
) -> None:
    """Verify the bundle, then put packages, images, models and data in place. It can be called again."""
    from tunesmith.workflows.bundle_install import InstallOptions
    from tunesmith.workflows.bundle_install import install as run

    may = os.geteuid() == 0 and (yes or sys.stdin.isatty())
    options = InstallOptions(
        bundle=folder,
        parts=names(parts),
        venv=venv,
        project=project,
        dry_run=dry_run,
        verified=verified,
        set_up=partial(_set_up, yes=yes, to_stderr=json) if may else None,
    )
    found = run(options).as_dict()
    if json:
        print_json(found)
        return
    for step in found["steps"]:
        size = bytes_text(step["bytes"])
        typer.echo(f"{step['state']:<14}{step['part']:<10}{step['name']}  {size}  {step['place']}")
    for command in found["then"]:
        typer.echo(f"then:  {command}")


def _set_up(bundle: Path, *, yes: bool, to_stderr: bool) -> None:
    """What `tunesmith setup --bundle` does on this host."""
    from tunesmith.workflows.setup import SetupOptions, Where, setup

    hosts = setup(
        Where(),
        SetupOptions(bundle=bundle),
        show=lambda found: show_plans(found, None, to_stderr=to_stderr),
        confirm=lambda: yes or confirm(),
    )
    for host in hosts:
        show_outcome(host, to_stderr=to_stderr)
    if not all(host.ok for host in hosts):
        raise TunesmithError(
            "the host packages of the bundle are not in place",
            hint=f"tunesmith setup --bundle {bundle}; the rest: --parts images,model,data,project",
        )


def _show(found: dict[str, Any]) -> None:
    for item in found["items"]:
        typer.echo(f"{item['part']:<10}{bytes_text(item['bytes']):>10}  {item['name']}")
    typer.echo(f"{'all':<10}{bytes_text(found['bytes']):>10}  {found['files']} files in {found['bundle']}")
    typer.echo(f"manifest  {found['manifest_sha256']}")

"""tunesmith image: the container image that holds the locked environment."""

from __future__ import annotations

import shlex
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.main import print_json
from tunesmith.core.units import bytes_text

if TYPE_CHECKING:
    from tunesmith.workflows.image import ImageOptions

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Show, build, check, save and load the locked container image.",
    epilog="Example: tunesmith image build --stage train",
)


class Family(StrEnum):
    auto = "auto"
    ngc = "ngc"
    cuda = "cuda"
    cpu = "cpu"


class Stage(StrEnum):
    all = "all"
    train = "train"
    serve = "serve"


JSON = typer.Option(False, "--json", help="Print one JSON object.")
STAGE = typer.Option(Stage.all, help="Which image: train (with JupyterLab), serve, or both.")
FAMILY = typer.Option(
    Family.auto,
    help="Where the base comes from: NVIDIA's PyTorch images (ngc), nvidia/cuda, plain Python (cpu). "
    "auto: ngc with a GPU, else cpu.",
)
BASE = typer.Option(None, metavar="IMAGE", help="Take this base image, whatever the driver.")
DRIVER = typer.Option(
    None, metavar="VERSION", help="NVIDIA driver where the image will run. Default: this machine's."
)
FACTS = typer.Option(None, metavar="FILE", help="Choose the base for the host of this facts file.")
EXTRAS = typer.Option(
    None, metavar="A,B", help="tunesmith's extras to install, 'base' for none. Default: the stage's own."
)
TAG = typer.Option(None, help="Name of the images (they get :train and :serve), or of the one image.")
USER = typer.Option(None, metavar="UID:GID", help="Who runs in it. Default: you; behind sudo, who called it.")
INDEX = typer.Option(
    None, "--pip-index", envvar="PIP_INDEX_URL", show_envvar=True, help="Package index to install from."
)
TORCH_INDEX = typer.Option(
    None, metavar="URL", help="PyTorch's own index, for its CPU build or an older CUDA."
)
TRUSTED = typer.Option(None, metavar="HOST", help="Index host without a known certificate; repeatable.")
WHEELHOUSE = typer.Option(None, metavar="DIR", help="Install from the wheels in DIR alone: no network.")
APT_MIRROR = typer.Option(None, metavar="URL", help="Debian or Ubuntu mirror, such as https://your.mirror.")
APT = typer.Option(None, metavar="PACKAGE", help="Debian package to add; repeatable.")
VLLM = typer.Option("auto", metavar="VERSION", help="vLLM in the serve image: a version, or none.")
RECIPE = typer.Option(None, metavar="FILE", help="Recipe that the image is for; its hash becomes a label.")
CONSTRAINTS = typer.Option(None, metavar="FILE", help="Pinned versions. Default: those of this tunesmith.")
LOCK = typer.Option(
    Path("image.lock.json"), metavar="FILE", help="Image lock: digest of the base, read and written."
)


def _options(given: dict[str, Any]) -> ImageOptions:
    """The options that `show` and `build` share, from all of a command's parameters."""
    from tunesmith.workflows.image import ImageOptions

    stage, extras = given["stage"], given["extras"]
    own = {
        "stages": ("train", "serve") if stage is Stage.all else (stage.value,),
        "family": given["family"].value,
        "extras": None if extras is None else tuple(part.strip() for part in extras.split(",")),
        "trusted_hosts": tuple(given["trusted_host"] or ()),
        "apt_packages": tuple(given["apt"] or ()),
    }
    same = {entry.name: given[entry.name] for entry in fields(ImageOptions) if entry.name not in own}
    return ImageOptions(**same, **own)


@app.command(epilog="Example: tunesmith image show --driver 550.54.14 --stage train > Dockerfile")
def show(
    stage: Stage = STAGE,
    family: Family = FAMILY,
    base: str | None = BASE,
    driver: str | None = DRIVER,
    facts: Path | None = FACTS,
    extras: str | None = EXTRAS,
    tag: str | None = TAG,
    user: str | None = USER,
    pip_index: str | None = INDEX,
    torch_index: str | None = TORCH_INDEX,
    trusted_host: list[str] | None = TRUSTED,
    wheelhouse: Path | None = WHEELHOUSE,
    apt_mirror: str | None = APT_MIRROR,
    apt: list[str] | None = APT,
    vllm: str = VLLM,
    recipe: Path | None = RECIPE,
    constraints: Path | None = CONSTRAINTS,
    lock: Path = LOCK,
    json: bool = JSON,
) -> None:
    """Print the Dockerfile for this host, or for the one that --driver or --facts describe."""
    given = dict(locals())
    from tunesmith.workflows.image import show as run

    found = run(_options(given))
    if json:
        print_json(found)
    else:
        typer.echo(found["dockerfile"], nl=False)


@app.command(epilog="Example: tunesmith image build --stage train --pip-index https://your.mirror/simple")
def build(
    stage: Stage = STAGE,
    family: Family = FAMILY,
    base: str | None = BASE,
    driver: str | None = DRIVER,
    facts: Path | None = FACTS,
    extras: str | None = EXTRAS,
    tag: str | None = TAG,
    user: str | None = USER,
    pip_index: str | None = INDEX,
    torch_index: str | None = TORCH_INDEX,
    trusted_host: list[str] | None = TRUSTED,
    wheelhouse: Path | None = WHEELHOUSE,
    apt_mirror: str | None = APT_MIRROR,
    apt: list[str] | None = APT,
    vllm: str = VLLM,
    recipe: Path | None = RECIPE,
    constraints: Path | None = CONSTRAINTS,
    lock: Path = LOCK,
    network: str | None = typer.Option(None, help="Network of the build: host, or none."),
    context: Path | None = typer.Option(None, metavar="DIR", help="Write the build context here; keep it."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the commands; docker is not asked."),
    json: bool = JSON,
) -> None:
    """Build the images with docker; its log goes to stderr."""
    given = dict(locals())
    from tunesmith.workflows.image import build as run

    found = run(_options(given), network=network, context=context, dry_run=dry_run)
    if json:
        print_json(found)
        return
    if dry_run:
        typer.echo(f"cd {shlex.quote(str(context or 'CONTEXT'))}")
        for command in found["commands"]:
            typer.echo(shlex.join(command))
        return
    for image in found["built"]:
        typer.echo(f"{image['name']}  {image['id'][:19]}  {bytes_text(image['bytes'])}")
    typer.echo(f"base  {found['base']['image']}, recorded in {found['lock']}")


@app.command(epilog="Example: tunesmith image check tunesmith:train --gpus all")
def check(
    image: str = typer.Argument("tunesmith:train", help="Name or id of an image on this machine."),
    gpus: str | None = typer.Option(None, help="GPUs for the container: all, or as docker run --gpus takes."),
    json: bool = JSON,
) -> None:
    """Import each package in a fresh process inside the image, start threads, look for CUDA."""
    from tunesmith.workflows.image import check_image, findings

    found = check_image(image, gpus)
    answer = findings(found)
    if json:
        print_json(answer)
    else:
        for item in found:
            typer.echo(f"{item.status:<8}{item.id:<20}{item.found}")
            if item.fix:
                typer.echo(f"{'':<28}fix: {item.fix}")
    if not answer["ok"]:
        raise typer.Exit(1)


@app.command(epilog="Example: tunesmith image save /media/usb/tunesmith.tar.gz tunesmith:train")
def save(
    file: Path = typer.Argument(help="File to write: .tar, .tar.gz or .tar.zst; FILE.sha256 goes beside it."),
    images: list[str] | None = typer.Argument(
        None, metavar="[IMAGE]...", help="Default: tunesmith:train tunesmith:serve."
    ),
    json: bool = JSON,
) -> None:
    """Save images into a file, with its SHA-256 beside it."""
    from tunesmith.workflows.image import save as run

    saved = run(images or [], file)
    if json:
        print_json(
            {
                "file": str(saved.file),
                "bytes": saved.bytes,
                "sha256": saved.sha256,
                "images": saved.images,
            }
        )
        return
    typer.echo(f"{saved.file}  {bytes_text(saved.bytes)}  {', '.join(saved.images)}")
    typer.echo(f"sha256  {saved.sha256}")


@app.command(epilog="Example: tunesmith image load /media/usb/tunesmith.tar.gz")
def load(
    file: Path = typer.Argument(help="What 'tunesmith image save' wrote."),
    sha256: str | None = typer.Option(None, help="Expected SHA-256. Default: that of FILE.sha256."),
    json: bool = JSON,
) -> None:
    """Verify a file's SHA-256, then load its images into docker."""
    from tunesmith.workflows.image import load_images

    found = load_images(file, sha256)
    if json:
        print_json({"file": str(file), "images": found})
        return
    for name, identity in found.items():
        typer.echo(f"{name}  {identity[:19]}")


@app.command(epilog="Example: tunesmith image compose lab train --recipe recipe.yaml > compose.yaml")
def compose(
    services: list[str] | None = typer.Argument(
        None, metavar="[SERVICE]...", help="lab, train, serve. Default: lab."
    ),
    image: str | None = typer.Option(None, help="Image of all services. Default: tunesmith:train or :serve."),
    recipe: Path | None = typer.Option(None, metavar="FILE", help="What the service train runs."),
    run: str | None = typer.Option(None, metavar="MODEL|RUN", help="What the service serve serves."),
    user: str | None = USER,
    project: Path | None = typer.Option(None, metavar="DIR", help="Folder of the compose file."),
    json: bool = JSON,
) -> None:
    """Print the compose file that 'tunesmith up' would write; it is yours to keep and change."""
    from tunesmith.workflows.compose_project import Wanted
    from tunesmith.workflows.containers import render_compose

    wanted = Wanted(image=image, recipe=recipe, run=run, user=user)
    text = render_compose(services or ["lab"], wanted, project=project)
    if json:
        print_json({"compose": text})
    else:
        typer.echo(text, nl=False)

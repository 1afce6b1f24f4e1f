"""tunesmith image: from what is known of a host to a Dockerfile, an image, and a file that holds it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import cache_dir, sha256_file, sha256_json
from tunesmith.core.proc import run
from tunesmith.core.progress import say
from tunesmith.host.checks_host import SMI
from tunesmith.host.facts import Answer, load_facts
from tunesmith.hub.wheels import build_own_wheel, constraints
from tunesmith.image.archive import Saved, load_images, save_images
from tunesmith.image.bases import Base, Family, Gpu, choose_base, own_base
from tunesmith.image.build import (
    Built,
    build_commands,
    built,
    check_wheelhouse,
    image_names,
    make_context,
    run_builds,
)
from tunesmith.image.check import Finding, check_image
from tunesmith.image.docker import docker_version, find_image
from tunesmith.image.dockerfile import LABEL, STAGES, ImageSpec, Stage, render
from tunesmith.image.lock import LOCK, pinned, present_base, read_lock
from tunesmith.workflows.compose_project import caller

__all__ = ["LOCK", "ImageOptions", "build", "check_image", "load_images", "save", "show"]

WHEEL = f"tunesmith-{__version__}-py3-none-any.whl"


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """What the caller asked for; None where nothing was said.

    base: an image in place of the chosen one. driver: version of the NVIDIA driver where the image will run;
    facts: a facts file of that machine; else this machine is asked. vllm: `auto`, `none` or a version.
    user: UID:GID. lock: the image lock, read when it is there and written by a build.
    """

    base: str | None = None
    family: Family = "auto"
    driver: str | None = None
    facts: Path | None = None
    stages: tuple[Stage, ...] = STAGES
    extras: tuple[str, ...] | None = None
    tag: str | None = None
    user: str | None = None
    pip_index: str | None = None
    torch_index: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    wheelhouse: Path | None = None
    apt_mirror: str | None = None
    apt_packages: tuple[str, ...] = ()
    vllm: str = "auto"
    recipe: Path | None = None
    constraints: Path | None = None
    lock: Path = Path(LOCK)


@dataclass(frozen=True)
class Planned:
    """An image before it is built."""

    spec: ImageSpec
    names: dict[Stage, str]
    constraints: str

    def as_dict(self) -> dict[str, Any]:
        base = self.spec.base
        return {
            "dockerfile": render(self.spec),
            "base": {
                "image": base.name,
                "digest": base.digest,
                "kind": base.kind,
                "cuda": ".".join(map(str, base.cuda)) if base.cuda else None,
                "minor_compatibility": base.minor_compat,
                "notes": list(base.notes),
            },
            "stages": list(self.spec.stages),
            "images": dict(self.names),
            "extras": {stage: list(self.spec.extras_of(stage)) or ["base"] for stage in self.spec.stages},
            "labels": {stage: self.spec.labels_of(stage) for stage in self.spec.stages},
            "user": f"{self.spec.uid}:{self.spec.gid}",
            "vllm": self.spec.vllm,
        }


def show(options: ImageOptions) -> dict[str, Any]:
    """The Dockerfile and all that it was made from. Raises UserError for what cannot be built."""
    return _plan(options).as_dict()


def build(
    options: ImageOptions, *, network: str | None = None, context: Path | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Build the images of all stages and record the base in the lock.

    context: a new or empty folder for the build context, which is kept. dry_run: docker is not asked.
    Returns `images` (name, id, bytes, labels of each stage), `base`, `lock` and `commands`.
    """
    planned = _plan(options)
    commands = build_commands(planned.spec, planned.names, network)
    if not dry_run:
        docker_version()
        planned = _plan(options, present_base(planned.spec.base, options.lock))
    answer = planned.as_dict() | {"commands": [["docker", *command] for command in commands], "built": []}
    if dry_run and context is None:
        return answer
    with _folder(context) as folder:
        _fill(folder, planned, options)
        answer["context"] = None if context is None else str(context)
        if dry_run:
            return answer
        run_builds(folder, commands)
    made = [built(stage, planned.names[stage]) for stage in planned.spec.stages]
    return answer | {"built": [_made(image) for image in made], "lock": str(options.lock)}


def save(names: Sequence[str], file: Path) -> Saved:
    """Save images into a file; without names, those of tunesmith's own that this machine has."""
    docker_version()
    own = list(image_names(STAGES).values())
    return save_images(list(names) or [name for name in own if find_image(name)] or own, file)


def _plan(options: ImageOptions, base: Base | None = None) -> Planned:
    base = base or pinned(_base(options), read_lock(options.lock))
    text = _constraints(options.constraints)
    uid, gid = caller(options.user)
    vllm = _vllm(options, base)
    spec = ImageSpec(
        base=base,
        wheel=WHEEL,
        stages=options.stages,
        extras=options.extras,
        uid=uid,
        gid=gid,
        pip_index=options.pip_index,
        torch_index=options.torch_index,
        trusted_hosts=options.trusted_hosts,
        wheelhouse=options.wheelhouse is not None,
        apt_mirror=options.apt_mirror,
        apt_packages=options.apt_packages,
        vllm=vllm,
        labels=_labels(options, base, text, vllm),
    )
    return Planned(spec, image_names(spec.stages, options.tag), text)


def _labels(options: ImageOptions, base: Base, text: str, vllm: str | None) -> dict[str, str]:
    """`lock` is one hash over the pins, the base and vLLM: two images with the same have the same parts."""
    labels = {
        "org.opencontainers.image.version": __version__,
        f"{LABEL}.version": __version__,
        f"{LABEL}.lock": sha256_json({"constraints": text, "base": base.reference, "vllm": vllm}),
    }
    if options.recipe is not None:
        if not options.recipe.is_file():
            raise UserError(f"--recipe {options.recipe}: no such file", hint="give the path of a recipe file")
        labels[f"{LABEL}.recipe"] = sha256_file(options.recipe)
    return labels


def _base(options: ImageOptions) -> Base:
    if options.base is not None:
        return own_base(options.base)
    if options.family == "cpu":
        return choose_base(None, family="cpu")
    if options.driver is not None:
        return choose_base(options.driver, family=options.family)
    answer = _ask_driver(options.facts)
    if answer is None:
        return choose_base(None, family=options.family)
    driver, gpus = read_gpus(answer)
    return choose_base(driver, gpus, options.family)


def _ask_driver(facts: Path | None) -> Answer | None:
    """What nvidia-smi says here, or in a facts file; None where there is no such program."""
    if facts is not None:
        known = load_facts(facts)
        return known.answer(SMI) if known.has(SMI) else None
    if shutil.which("nvidia-smi") is None:
        return None
    done = run(SMI.split(), timeout_s=30, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def read_gpus(answer: Answer) -> tuple[str, list[Gpu]]:
    """Driver version and GPUs from nvidia-smi's `name, driver, capability, memory` lines.

    Raises UserError when nvidia-smi failed: an image chosen without the driver would be the wrong one.
    """
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if not answer.ok or not rows or any(len(row) < 3 for row in rows):
        last = (answer.text.splitlines() or ["no answer"])[-1]
        raise UserError(
            f"nvidia-smi is here, but says: {last}",
            hint="'tunesmith doctor' finds the cause; or give --driver VERSION, or --family cpu",
        )
    gpus = [Gpu(row[0], float(row[2]) if row[2].replace(".", "", 1).isdigit() else None) for row in rows]
    return rows[0][1], gpus


def _constraints(path: Path | None) -> str:
    if path is None:
        return constraints()
    if not path.is_file():
        raise UserError(f"--constraints {path}: no such file", hint="'pip freeze' writes such a file")
    return path.read_text(encoding="utf-8")


def _vllm(options: ImageOptions, base: Base) -> str | None:
    """The vLLM of the serve stage: the one that suits the base's CUDA, unless said otherwise."""
    if options.vllm == "none" or "serve" not in options.stages:
        return None
    if options.vllm != "auto":
        return options.vllm
    here = options.wheelhouse
    if base.vllm and here is not None and not list(here.glob(f"vllm-{base.vllm}[-+]*.whl")):
        say(f"the wheelhouse has no vLLM {base.vllm}: the serve image is built without it")
        return None
    return base.vllm


@contextmanager
def _folder(context: Path | None) -> Iterator[Path]:
    """The context's folder: the caller's, or one in the cache that is removed afterwards."""
    if context is None:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="image-context-", dir=cache_dir()) as name:
            yield Path(name)
        return
    if context.exists() and (not context.is_dir() or any(context.iterdir())):
        raise UserError(f"--context {context}: is not an empty folder", hint="give a new one")
    context.mkdir(parents=True, exist_ok=True)
    yield context


def _fill(folder: Path, planned: Planned, options: ImageOptions) -> None:
    make_context(
        folder,
        planned.spec,
        constraints=planned.constraints,
        own_wheel=partial(_own_wheel, options.wheelhouse),
        wheelhouse=options.wheelhouse,
    )


def _own_wheel(wheelhouse: Path | None, folder: Path) -> Path:
    """tunesmith's wheel: the wheelhouse's, so that no network is needed; else made from this installation."""
    if wheelhouse is not None:
        for path in check_wheelhouse(wheelhouse):
            if path.name.startswith(f"tunesmith-{__version__}-"):
                return Path(shutil.copyfile(path, folder / path.name))
    try:
        return build_own_wheel(folder)
    except TunesmithError as error:
        raise TunesmithError(
            error.what, hint=f"or put tunesmith-{__version__}-py3-none-any.whl into a --wheelhouse"
        ) from None


def _made(image: Built) -> dict[str, Any]:
    return {
        "stage": image.stage,
        "name": image.name,
        "id": image.id,
        "bytes": image.bytes,
        "labels": image.labels,
    }


def findings(found: Sequence[Finding]) -> dict[str, Any]:
    """What `check --json` prints; `ok` is false when anything fails."""
    return {
        "ok": all(item.status != "fail" for item in found),
        "checks": [item.as_dict() for item in found],
    }

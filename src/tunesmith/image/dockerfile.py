"""The Dockerfile as text, from a typed description.

The legacy builder takes it as well as BuildKit: Debian's docker has no buildx. Environments are made in
stages of their own and copied into the final ones, so wheels, pins and pip's cache are in no layer that is
kept. Values of users are checked against a grammar here: none can hold a space, a quote or a newline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Literal, get_args

from tunesmith.core.errors import UserError
from tunesmith.image.bases import Base
from tunesmith.image.docker import check_reference

Stage = Literal["train", "serve"]
STAGES: tuple[Stage, ...] = get_args(Stage)
STAGE_EXTRAS: dict[Stage, tuple[str, ...]] = {"train": ("train", "serve", "host"), "serve": ("serve",)}
EXTRAS = ("base", "train", "serve", "host", "tensorboard", "cluster", "all")
ABOUT = {"train": "trains and evaluates, with JupyterLab", "serve": "serves an OpenAI-compatible API"}

ENVIRONMENT = "/opt/tunesmith"
VLLM_ENVIRONMENT = "/opt/vllm"
WORKSPACE = "/workspace"
HOME = "/home/tunesmith"
SERVE_PORT = 8000
LABEL = "org.tunesmith"
# What nvidia/cuda images lack: Python, and the compiler and headers that Triton needs at run time.
CUDA_PACKAGES = ("gcc", "libc6-dev", "python3", "python3-dev", "python3-venv")
# An archive's address in a sources file; what follows the host, such as /ubuntu, is the same on a mirror.
ARCHIVE = r"https?://[^/ ]+/(debian-security|debian|ubuntu-ports|ubuntu)(/| |$)"
READY = (
    "import http.client as h, sys; c = h.HTTPConnection('127.0.0.1', {port}, timeout=4); "
    "c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"
)

URL = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~/+-]*)?")
HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
VERSION = re.compile(r"[0-9]+(\.[0-9a-z]+)*")
WHEEL = re.compile(r"tunesmith-[\w.+-]+\.whl")
LABEL_KEY = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
MAX_ID = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """All that a Dockerfile depends on; wrong values raise UserError at birth.

    wheel: file name of tunesmith's wheel in the build context. extras: tunesmith's extras in every stage,
    None for each stage's own. uid, gid: owner of what is written in mounts. vllm: its version in the serve
    stage, None for none. wheelhouse: install from the context's folder `wheels` alone.
    """

    base: Base
    wheel: str
    stages: tuple[Stage, ...] = STAGES
    extras: tuple[str, ...] | None = None
    uid: int = 0
    gid: int = 0
    pip_index: str | None = None
    torch_index: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    wheelhouse: bool = False
    apt_mirror: str | None = None
    apt_packages: tuple[str, ...] = ()
    vllm: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_reference(self.base.reference, "base")
        for name in ("pip_index", "torch_index", "apt_mirror"):
            _check_url(getattr(self, name), name)
        _check_all(self.trusted_hosts, HOST, "--trusted-host", "a host name, with a port at most")
        _check_all(self.apt_packages, PACKAGE, "--apt", "the name of a Debian package")
        _check_all((self.wheel,), WHEEL, "wheel", "the name of a wheel of tunesmith")
        _check_all([self.vllm] if self.vllm else [], VERSION, "--vllm", "a version such as 0.33.0")
        _check_all(self.labels, LABEL_KEY, "label", "a label's key")
        _check_values(self.labels)
        for extra in self.extras or ():
            if extra not in EXTRAS:
                raise UserError(f"--extras '{extra}': tunesmith has no such extra", hint=f"take {EXTRAS}")
        for name in ("uid", "gid"):
            if not 0 <= getattr(self, name) <= MAX_ID:
                raise UserError(f"{name} {getattr(self, name)} is not a number from 0 to {MAX_ID}")
        self._check_stages()

    def _check_stages(self) -> None:
        if not self.stages or len(set(self.stages)) < len(self.stages) or set(self.stages) - set(STAGES):
            raise UserError(f"stages {self.stages}: take each of {STAGES} once at most, and one at least")
        needs_torch = any({"train", "serve", "all"} & set(self.extras_of(stage)) for stage in self.stages)
        old_cuda = self.base.kind == "cuda" and self.base.cuda is not None and self.base.cuda[0] < 13
        if needs_torch and old_cuda and not (self.torch_index or self.wheelhouse):
            raise UserError(
                f"base {self.base.name}: pip's own torch is built for CUDA 13, which this driver cannot run",
                hint="take --family ngc, whose images bring torch; or --torch-index with PyTorch's index"
                " for CUDA 12 (its 'Get started' page names it); or a --wheelhouse",
            )

    def extras_of(self, stage: Stage) -> tuple[str, ...]:
        """The extras that a stage installs; none for the base install."""
        wanted = STAGE_EXTRAS[stage] if self.extras is None else self.extras
        return tuple(extra for extra in wanted if extra != "base")

    def labels_of(self, stage: Stage) -> dict[str, str]:
        """Every label of a stage's image."""
        named = {
            "org.opencontainers.image.title": f"tunesmith {stage}",
            "org.opencontainers.image.description": f"tunesmith: {ABOUT[stage]}",
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.opencontainers.image.base.name": self.base.name,
            f"{LABEL}.stage": stage,
            f"{LABEL}.extras": ",".join(self.extras_of(stage)) or "base",
            f"{LABEL}.cuda": ".".join(map(str, self.base.cuda)) if self.base.cuda else "none",
        }
        if stage == "serve" and self.vllm:
            named[f"{LABEL}.vllm"] = self.vllm
        if self.base.digest:
            named["org.opencontainers.image.base.digest"] = self.base.digest
        return dict(sorted((named | dict(self.labels)).items()))


def render(spec: ImageSpec) -> str:
    """The Dockerfile's text."""
    parts = [_head(spec), _base_stage(spec)]
    for stage in spec.stages:
        parts += [_environment_stage(spec, stage), _final_stage(spec, stage)]
    return "\n".join(parts)


def quoted(value: str) -> str:
    """A value in double quotes in which a Dockerfile replaces nothing."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return f'"{escaped}"'


# -- stages ----------------------------------------------------------------------------------------------


def _head(spec: ImageSpec) -> str:
    notes = "".join(f"# {note}\n" for note in spec.base.notes)
    return (
        "# Written by 'tunesmith image'; yours to read and keep. 'tunesmith image build --context DIR'\n"
        "# writes it with all that it copies; then, in DIR: docker build --target train .\n" + notes
    )


def _base_stage(spec: ImageSpec) -> str:
    lines = [f"FROM {spec.base.reference} AS base", "USER 0:0"]
    packages = (*(CUDA_PACKAGES if spec.base.kind == "cuda" else ()), *spec.apt_packages)
    if packages:
        lines += _apt(spec.apt_mirror, sorted(set(packages)))
    lines += _user(spec.uid, spec.gid)
    values = {
        "HOME": HOME if spec.uid else "/root",
        "PYTHONUNBUFFERED": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if spec.base.minor_compat:
        # nvidia/cuda images refuse to start where their CUDA is newer than the driver's, even in one major.
        values["NVIDIA_DISABLE_REQUIRE"] = "true"
    if spec.uid:
        # torch.compile asks for the user's name, which a uid without an entry in /etc/passwd does not have.
        values |= {"USER": "tunesmith", "LOGNAME": "tunesmith"}
    lines.append("ENV " + " \\\n    ".join(f"{key}={value}" for key, value in values.items()))
    lines.append(f"WORKDIR {WORKSPACE}")
    return "\n".join(lines) + "\n"


def _apt(mirror: str | None, packages: Sequence[str]) -> list[str]:
    lines = []
    if mirror:
        change = f"s#{ARCHIVE}#{mirror.rstrip('/')}/\\1\\2#g"
        files = ["/etc/apt/sources.list", "/etc/apt/sources.list.d"]
        # Only one of the two is there: Debian's images have no sources.list.
        lines.append(f"RUN sed -i -E {quote(change)} $(find {' '.join(files)} -type f 2>/dev/null)")
    names = " ".join(packages)
    lines.append(
        "RUN apt-get update \\\n"
        f" && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {names} \\\n"
        " && rm -rf /var/lib/apt/lists/*"
    )
    return lines


def _user(uid: int, gid: int) -> list[str]:
    """The caller's uid, even where the base has a user with it already (Ubuntu 24.04: 1000).

    --no-log-init: with a large uid, useradd otherwise writes /var/log/lastlog of that many entries.
    """
    if uid == 0:
        return [f"RUN mkdir -p {WORKSPACE}"]
    ids = f"--uid {uid} --gid {gid}"
    return [
        f"RUN (grep -q ^tunesmith: /etc/group || groupadd --non-unique --gid {gid} tunesmith) \\\n"
        f" && (grep -q ^tunesmith: /etc/passwd || useradd --non-unique --no-log-init {ids} \\\n"
        f"      --create-home --home-dir {HOME} --shell /bin/bash tunesmith) \\\n"
        f" && mkdir -p {WORKSPACE} && chown {uid}:{gid} {WORKSPACE}"
    ]


def _environment_stage(spec: ImageSpec, stage: Stage) -> str:
    extras = ",".join(spec.extras_of(stage))
    wheel = f"/build/{spec.wheel}[{extras}]" if extras else f"/build/{spec.wheel}"
    lines = [f"FROM base AS {stage}-env", "COPY build/ /build/"]
    lines.append(_exec(*_venv(spec, ENVIRONMENT, shared=spec.base.kind == "ngc")))
    lines.append(_exec(f"{ENVIRONMENT}/bin/python", "/build/pins.py", "write", "/build"))
    lines.append("ENV PIP_CONSTRAINT=/build/pins.txt")
    lines.append(_exec(*_pip(spec, ENVIRONMENT), wheel))
    lines.append(_exec(f"{ENVIRONMENT}/bin/python", "/build/pins.py", "check", "/build"))
    if stage == "serve" and spec.vllm:
        lines.append("# vLLM in an environment of its own: its pins and ours never meet.")
        lines.append("ENV PIP_CONSTRAINT=")
        lines.append(_exec(*_venv(spec, VLLM_ENVIRONMENT, shared=False)))
        lines.append(_exec(*_pip(spec, VLLM_ENVIRONMENT), f"vllm=={spec.vllm}"))
    return "\n".join(lines) + "\n"


def _venv(spec: ImageSpec, folder: str, *, shared: bool) -> list[str]:
    """`shared`: with the packages of the base image. NGC images have pip but not venv's own copy of it."""
    options = ["--system-site-packages"] if shared else []
    options += ["--without-pip"] if spec.base.kind == "ngc" else []
    return ["python3", "-m", "venv", *options, folder]


def _pip(spec: ImageSpec, folder: str) -> list[str]:
    python = f"{folder}/bin/python"
    pip = ["python3", "-m", "pip", "--python", python] if spec.base.kind == "ngc" else [python, "-m", "pip"]
    found = [*pip, "install", "--no-cache-dir", "--no-input"]
    if spec.wheelhouse:
        return [*found, "--no-index", "--find-links", "/build/wheels"]
    if spec.pip_index:
        found += ["--index-url", spec.pip_index]
    if spec.torch_index:
        found += ["--extra-index-url", spec.torch_index]
    return found + [part for host in spec.trusted_hosts for part in ("--trusted-host", host)]


def _final_stage(spec: ImageSpec, stage: Stage) -> str:
    lines = [f"FROM base AS {stage}", f"COPY --from={stage}-env {ENVIRONMENT} {ENVIRONMENT}"]
    lines.append(f"ENV PATH={ENVIRONMENT}/bin:$PATH")
    if stage == "serve" and spec.vllm:
        lines.append(f"COPY --from=serve-env {VLLM_ENVIRONMENT} {VLLM_ENVIRONMENT}")
        lines.append(f"ENV TUNESMITH_VLLM={VLLM_ENVIRONMENT}/bin/vllm")
    labels = (f"{key}={quoted(value)}" for key, value in spec.labels_of(stage).items())
    lines.append("LABEL " + " \\\n    ".join(labels))
    if stage == "serve":
        check = json.dumps(["python3", "-c", READY.format(port=SERVE_PORT)])
        lines.append(f"EXPOSE {SERVE_PORT}")
        lines.append(
            f"HEALTHCHECK --interval=10s --timeout=6s --start-period=600s --retries=3 \\\n    CMD {check}"
        )
    lines.append(f"USER {spec.uid}:{spec.gid}")
    lines.append("CMD " + json.dumps(["tunesmith", "serve" if stage == "serve" else "train", "--help"]))
    return "\n".join(lines) + "\n"


def _exec(*args: str) -> str:
    """RUN in exec form: no shell in between."""
    return "RUN " + json.dumps(list(args))


# -- values ----------------------------------------------------------------------------------------------


def _check_url(url: str | None, name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    if url is None:
        return
    if re.match(r"[a-z]+://[^/]*@", url):
        raise UserError(
            f"{option}: the URL holds a user name or password, which would stay in the image's build",
            hint="collect the wheels with pip download and give them by --wheelhouse",
        )
    if not URL.fullmatch(url):
        raise UserError(f"{option}: {url!r} is not an http or https URL", hint="https://your.mirror/simple")


def _check_all(values: Iterable[str], pattern: re.Pattern[str], what: str, is_: str) -> None:
    for value in values:
        if not pattern.fullmatch(value):
            raise UserError(f"{what}: {value!r} is not {is_}")


def _check_values(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        if not value.isprintable():
            raise UserError(f"label {key}: {value!r} has characters that cannot be printed")

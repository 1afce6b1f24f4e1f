"""Which base image suits a host: an explicit table from driver to CUDA to image.

Sources (read November 2026):
- Major floors: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1: CUDA 13.x
  runs on drivers >= 580, 12.x on >= 525, 11.x on >= 450; newer drivers run older CUDA.
- Driver that comes with a toolkit: CUDA release notes, table "CUDA Toolkit and Corresponding Driver
  Versions": 12.8 570, 12.9 575, 13.0 580, 13.1 590.
- NGC PyTorch releases, their CUDA and PyTorch: the release notes below
  docs.nvidia.com/deeplearning/frameworks/pytorch-release-notes (25.12: CUDA 13.1.0, PyTorch 2.10.0a0).
  Since 25.03 they hold their own packages by /etc/pip/constraint.txt; older ones are not in the table, as
  their Python (3.10 until 24.10) or PyTorch is too old for tunesmith.
- Forward compatibility (a newer CUDA major than the driver's, through the cuda-compat package) exists for
  data centre GPUs only; on a GeForce it ends in error 804. It is never chosen here.
- CUDA 13 compiles for compute capability 7.5 and later (its release notes: no Maxwell, Pascal, Volta).
- vLLM wheels: 0.33.0 needs torch 2.13 and CUDA 13 packages (its metadata); 0.11.0 was built with CUDA 12.8
  (its installation page).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.errors import UserError

Family = Literal["auto", "ngc", "cuda", "cpu"]
Kind = Literal["ngc", "cuda", "cpu", "own"]

MAJOR_FLOORS = {13: 580, 12: 525, 11: 450}
OLDEST_DRIVER = 525
FIRST_CAPABILITY_OF_CUDA_13 = 7.5
VLLM = {13: "0.33.0", 12: "0.11.0"}
CPU_IMAGE = "python:3.11-slim"


@dataclass(frozen=True)
class Row:
    """An image; `driver`: the branch of the driver that came with its CUDA."""

    name: str
    kind: Literal["ngc", "cuda"]
    cuda: tuple[int, int]
    driver: int


TABLE = (
    Row("nvcr.io/nvidia/pytorch:25.12-py3", "ngc", (13, 1), 590),
    Row("nvcr.io/nvidia/pytorch:25.10-py3", "ngc", (13, 0), 580),
    Row("nvcr.io/nvidia/pytorch:25.06-py3", "ngc", (12, 9), 575),
    Row("nvcr.io/nvidia/pytorch:25.03-py3", "ngc", (12, 8), 570),
    Row("nvidia/cuda:13.0.2-devel-ubuntu24.04", "cuda", (13, 0), 580),
    Row("nvidia/cuda:12.9.1-devel-ubuntu24.04", "cuda", (12, 9), 575),
    Row("nvidia/cuda:12.8.1-devel-ubuntu24.04", "cuda", (12, 8), 570),
)


@dataclass(frozen=True)
class Gpu:
    """`capability`: compute capability, such as 8.6; None when it is not known."""

    name: str
    capability: float | None = None


@dataclass(frozen=True)
class Base:
    """A base image and why it was chosen.

    `cuda` is None without a GPU, or for an image that is not in the table. `minor_compat`: the driver is
    older than the image's CUDA but of the same major. `digest` pins the image (from the image lock).
    """

    name: str
    kind: Kind
    cuda: tuple[int, int] | None = None
    minor_compat: bool = False
    notes: tuple[str, ...] = ()
    digest: str | None = None

    @property
    def reference(self) -> str:
        """What FROM takes."""
        return f"{self.name}@{self.digest}" if self.digest else self.name

    @property
    def vllm(self) -> str | None:
        """The vLLM release that runs with this CUDA; None without a GPU."""
        return VLLM.get(self.cuda[0]) if self.cuda else None


def own_base(name: str) -> Base:
    """A base that the user names. An image of the table brings what the table knows."""
    for row in TABLE:
        if name.partition("@")[0] == row.name:
            return Base(name=name, kind=row.kind, cuda=row.cuda)
    if re.match(r"nvcr\.io/nvidia/pytorch[:@]", name):
        return Base(name=name, kind="ngc", notes=("this NGC release is not in tunesmith's table",))
    return Base(name=name, kind="cpu" if name == CPU_IMAGE else "own")


def driver_branch(version: str) -> int:
    """`550.54.14` -> 550. Raises UserError for a text that is no driver version."""
    if not re.fullmatch(r"[0-9]{3,4}(\.[0-9]+){0,3}", version):
        raise UserError(f"driver {version!r} is not a driver version", hint="nvidia-smi prints it: 550.54.14")
    return int(version.partition(".")[0])


def cuda_major(branch: int) -> int | None:
    """The newest CUDA major that a driver branch runs; None when it is older than all in the table."""
    return next((major for major, floor in MAJOR_FLOORS.items() if branch >= floor), None)


def choose_base(driver: str | None, gpus: Sequence[Gpu] = (), family: Family = "auto") -> Base:
    """The base image for a host; `driver` is the version that nvidia-smi prints, None without one.

    The newest image whose CUDA the driver brings itself; else, of the driver's CUDA major, the image that is
    nearest to the driver (minor version compatibility). Raises UserError when the driver is too old, and for
    a GPU family without a driver.
    """
    if family == "cpu" or (family == "auto" and driver is None):
        return Base(name=CPU_IMAGE, kind="cpu")
    if driver is None:
        raise UserError(
            f"the base family '{family}' is for GPUs, and no NVIDIA driver answers here",
            hint="give --driver with the version where the image will run, or take --family cpu",
        )
    branch = driver_branch(driver)
    major = cuda_major(branch)
    if branch < OLDEST_DRIVER or major is None:
        raise _too_old(driver)
    major = min(major, _newest_major(gpus))
    kind = "cuda" if family == "cuda" else "ngc"
    rows = [row for row in TABLE if row.kind == kind and row.cuda[0] <= major]
    native = [row for row in rows if row.driver <= branch]
    if native:
        return _base(max(native, key=lambda row: row.cuda), driver, gpus, minor=False)
    near = [row for row in rows if row.cuda[0] == major]
    return _base(min(near, key=lambda row: row.cuda), driver, gpus, minor=True)


def _newest_major(gpus: Sequence[Gpu]) -> int:
    """The newest CUDA major that still compiles for all these GPUs."""
    known = [gpu.capability for gpu in gpus if gpu.capability is not None]
    return 12 if known and min(known) < FIRST_CAPABILITY_OF_CUDA_13 else max(MAJOR_FLOORS)


def _base(row: Row, driver: str, gpus: Sequence[Gpu], *, minor: bool) -> Base:
    notes = []
    if minor:
        notes.append(
            f"driver {driver} is older than CUDA {row.cuda[0]}.{row.cuda[1]}'s own ({row.driver}): the image"
            " runs in CUDA minor version compatibility, which cannot compile PTX on the fly"
        )
    if minor and any("geforce" in gpu.name.lower() for gpu in gpus):
        notes.append("forward compatibility is not for GeForce (error 804); this image does without it")
    return Base(name=row.name, kind=row.kind, cuda=row.cuda, minor_compat=minor, notes=tuple(notes))


def _too_old(driver: str) -> UserError:
    return UserError(
        f"NVIDIA driver {driver} is too old: CUDA 12 needs {MAJOR_FLOORS[12]} or later, CUDA 13 needs"
        f" {MAJOR_FLOORS[13]}",
        hint=f"upgrade the driver to {MAJOR_FLOORS[13]} or later ('tunesmith doctor' has the commands); until"
        " then --family cpu, or --base with an image of your own that has torch 2.6 for CUDA 11",
    )

"""The C++ kernels compiled on the machine that runs them, for its CPU, once.

The library lies in the cache folder under a hash of sources, flags and CPU. It has no threads of its own: it
is handed the function by which torch's OpenMP library shares out work.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import tempfile
from pathlib import Path

import torch

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError
from tunesmith.core.paths import cache_dir, locked, sha256_json, sync_tree

SOURCES = ("cpu_kernels.cpp", "cpu_products.cpp", "cpu_adapters.cpp", "cpu_layers.cpp", "cpu_decode.cpp")
HEADERS = ("cpu_kernels.h", "cpu_adapters.h", "cpu_products.h")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
BUILD_S = 300.0
FOLDER = "TUNESMITH_KERNELS"


def open_library() -> ctypes.CDLL:
    """The library, compiled now when the cache folder does not have it (about six seconds).

    Raises TunesmithError when there is no compiler or it fails, OSError when the folder cannot be written,
    AttributeError when torch computes with an OpenMP library that cannot be shared.
    """
    gomp_parallel = _gomp_parallel()
    here = Path(__file__).parent
    sources = {name: (here / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)}
    flags = [*FLAGS, _native()]
    key = sha256_json({"sources": sources, "flags": flags, "cpu": _cpu()})[:32]
    target = folder() / f"{key}.so"
    library = _opened(target)
    if library is None:
        with locked(target):
            library = _opened(target) or _built(flags, [here / name for name in SOURCES], target)
    library.use_threads_of(ctypes.c_void_p(gomp_parallel))
    return library


def folder() -> Path:
    """Where compiled libraries lie: $TUNESMITH_KERNELS, else a folder of the cache."""
    given = os.environ.get(FOLDER)
    return Path(given).expanduser() if given else cache_dir() / "kernels"


def _opened(target: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(target))
    except OSError:  # not there, or no library
        return None


def _built(flags: list[str], sources: list[Path], target: Path) -> ctypes.CDLL:
    """Compile into `target`, which appears whole or not at all. The caller holds its lock."""
    compiler = _compiler()
    for left in target.parent.glob(f".{target.name}.partial-*"):
        left.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.partial-")
    os.close(handle)
    try:
        proc.run([*compiler, *flags, *map(str, sources), "-o", temporary], timeout_s=BUILD_S)
        os.chmod(temporary, 0o755)
        # Loading a library that a crash cut short would end the process.
        sync_tree(target.parent)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return ctypes.CDLL(str(target))


def _compiler() -> list[str]:
    for text in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        command = shlex.split(text)
        if command and shutil.which(command[0]) is not None:
            return command
    raise TunesmithError("no C++ compiler is installed (g++ or clang++, or what $CXX names)")


def _native() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _cpu() -> str:
    """What tells this CPU's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *kept])


def _gomp_parallel() -> int:
    """Address of the function by which torch's own OpenMP library starts a parallel region."""
    name = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    function = ctypes.CDLL(str(name)).GOMP_parallel
    return ctypes.cast(function, ctypes.c_void_p).value or 0

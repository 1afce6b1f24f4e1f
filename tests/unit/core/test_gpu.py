"""What the GPU driver tells; a library with its functions, compiled here, stands in for the driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.gpu import gpu_memory, gpus

DRIVER = """
#include <stddef.h>
static void *current;
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int number) { *device = 7; return number; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &current; return device != 7; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device != 7; }
int cuCtxSetCurrent(void *context) { current = context; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *free = (size_t)20 << 30; *total = (size_t)24 << 30; return current == NULL;
}
"""


def driver(folder: Path, count: int) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "driver.c", folder / f"libdriver{count}.so"
    source.write_text(DRIVER.replace("COUNT", str(count)))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def test_where_there_is_no_driver_there_is_no_gpu(tmp_path: Path) -> None:
    assert gpus(str(tmp_path / "nothing.so")) == 0
    assert gpu_memory(str(tmp_path / "nothing.so")) is None


def test_count_and_memory_are_the_drivers(tmp_path: Path) -> None:
    two, none = driver(tmp_path, 2), driver(tmp_path, 0)
    assert (gpus(two), gpus(none)) == (2, 0)
    assert gpu_memory(two) == (20 << 30, 24 << 30)
    assert gpu_memory(none) is None

"""What the GPU driver tells; a library with its functions, compiled here, stands in for the driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.gpu import Gpu, first_gpu, gpu_memory, gpus

DRIVER = """
#include <stddef.h>
#include <string.h>
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
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, "NVIDIA GeForce RTX 3090", length); return device != 7;
}
int cuDeviceTotalMem_v2(size_t *total, int device) { *total = (size_t)23 << 30; return device != 7; }
int cuDeviceGetAttribute(int *value, int number, int device) {
    switch (number) {
        case 16: *value = 82; break;
        case 36: if (COUNT == 3) return 1; *value = 9750000; break;
        case 37: *value = 384; break;
        case 75: *value = 8; break;
        case 76: *value = 6; break;
        default: return 1;
    }
    return device != 7;
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


def test_the_first_gpu_is_as_its_driver_tells(tmp_path: Path) -> None:
    assert first_gpu(driver(tmp_path, 1)) == Gpu(
        name="NVIDIA GeForce RTX 3090",
        memory_bytes=23 << 30,
        memory_gb_s=936.0,  # 9.75 GHz, two transfers, 48 bytes
        multiprocessors=82,
        capability=(8, 6),
    )
    assert first_gpu(driver(tmp_path, 0)) is None
    assert first_gpu(str(tmp_path / "nothing.so")) is None


def test_a_clock_that_the_driver_does_not_tell_is_no_rate(tmp_path: Path) -> None:
    found = first_gpu(driver(tmp_path, 3))
    assert found is not None and (found.memory_gb_s, found.multiprocessors) == (0, 82)

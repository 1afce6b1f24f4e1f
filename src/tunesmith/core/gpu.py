"""The NVIDIA GPUs of this machine, asked of their driver itself, without torch.

By the functions of https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"
# of CUdevice_attribute
MULTIPROCESSOR_COUNT, MEMORY_CLOCK_KHZ, MEMORY_BUS_BITS, CAPABILITY_MAJOR, CAPABILITY_MINOR = (
    16,
    36,
    37,
    75,
    76,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the driver tells of a GPU. memory_bytes: what it has for programs; memory_gb_s: its memory's peak
    rate, two transfers a clock; 0 where the driver does not tell clock or width."""

    name: str
    memory_bytes: int
    memory_gb_s: float
    multiprocessors: int
    capability: tuple[int, int]


def gpus(driver: str = DRIVER) -> int:
    """How many GPUs a program may use ($CUDA_VISIBLE_DEVICES counts); 0 where there is no working driver."""
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def gpu_memory(driver: str = DRIVER) -> tuple[int, int] | None:
    """(free bytes, all bytes) of the first GPU; None where there is none, or it is out of order."""
    if gpus(driver) == 0:
        return None
    library = ctypes.CDLL(driver)
    context, device = ctypes.c_void_p(), ctypes.c_int(0)
    if library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    try:
        failed = library.cuCtxSetCurrent(context) or library.cuMemGetInfo_v2(
            ctypes.byref(free), ctypes.byref(total)
        )
    finally:
        library.cuCtxSetCurrent(None)
        library.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else (free.value, total.value)


def first_gpu(driver: str = DRIVER) -> Gpu | None:
    """The first GPU that a program may use; None where there is none, or it is out of order."""
    if gpus(driver) == 0:
        return None
    library = ctypes.CDLL(driver)
    device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    if (
        library.cuDeviceGet(ctypes.byref(device), 0)
        or library.cuDeviceGetName(name, len(name), device)
        or library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    ):
        return None
    clock = _attribute(library, MEMORY_CLOCK_KHZ, device)
    return Gpu(
        name=name.value.decode("utf-8", "replace"),
        memory_bytes=memory.value,
        memory_gb_s=2e3 * clock * _attribute(library, MEMORY_BUS_BITS, device) / 8 / 1e9,
        multiprocessors=_attribute(library, MULTIPROCESSOR_COUNT, device),
        capability=(
            _attribute(library, CAPABILITY_MAJOR, device),
            _attribute(library, CAPABILITY_MINOR, device),
        ),
    )


def _attribute(library: ctypes.CDLL, number: int, device: ctypes.c_int) -> int:
    """A CUdevice_attribute; 0 where the driver does not know it."""
    value = ctypes.c_int(0)
    return 0 if library.cuDeviceGetAttribute(ctypes.byref(value), number, device) else value.value

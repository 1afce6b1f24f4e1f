"""The NVIDIA GPUs of this machine, asked of their driver itself, without torch.

By the functions of https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"


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

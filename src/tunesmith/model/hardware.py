"""What this machine computes with: device, threads, number formats, seeds."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from tunesmith.core.cpu import physical_cores
from tunesmith.core.errors import UserError
from tunesmith.recipe.schema import Precision

P = ParamSpec("P")
T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-pure": torch.bfloat16, "fp16": torch.float16}


_pretended: ContextVar[Literal["cpu", "cuda"] | None] = ContextVar("_pretended", default=None)


def computes_on(device: torch.device) -> str:
    """The kind of device whose way of computing is taken for tensors on `device`."""
    return _pretended.get() or device.type


@contextmanager
def pretending(kind: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Within it, code that chooses by device takes the way of `kind`: for steps that are traced, not run."""
    token = _pretended.set(kind)
    try:
        with afresh():
            yield
    finally:
        _pretended.reset(token)


_made: ContextVar[dict[Any, Any] | None] = ContextVar("_made", default=None)


@contextmanager
def afresh() -> Iterator[None]:
    """Within it, what `made_once` has made outside is not known, nor outside what it makes here."""
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """`make`, called once for the same arguments. What is made while a step is traced is forgotten with it:
    a fake tensor must never be met by a real step."""
    found: dict[Any, T] = {}

    @wraps(make)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        traced = _made.get()
        known = found if traced is None else traced
        key = make, args, tuple(kwargs.items())
        if key not in known:
            known[key] = make(*args, **kwargs)
        result: T = known[key]
        return result

    return again


_repeats: ContextVar[int] = ContextVar("_repeats", default=1)


def abridged(parts: Sequence[T]) -> Iterator[T]:
    """All of the parts of a piece of work; of a step that is only traced the first, which stands for all but
    the last (`repeats`), and the last."""
    if _pretended.get() is None or len(parts) <= 2:
        yield from parts
        return
    token = _repeats.set((len(parts) - 1) * _repeats.get())
    yield parts[0]
    _repeats.reset(token)
    yield parts[-1]


def repeats() -> int:
    """How many times over the operation that is traced now would be done."""
    return _repeats.get()


def pick_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to compute on. Raises UserError when a GPU is asked for and none can be used."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "hardware.device: 'cuda': torch sees no GPU on this machine",
            hint="take 'auto' or 'cpu', or check the driver with nvidia-smi and torch's CUDA build",
        )
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted)


def set_threads(wanted: int | Literal["auto"]) -> int:
    """Let torch compute with this many CPU threads; returns the number."""
    if wanted == "auto":
        given = os.environ.get("OMP_NUM_THREADS", "")
        count = int(given) if given.isdigit() and int(given) > 0 else physical_cores()
    else:
        count = wanted
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of giving it back to the system; True where it can.

    A training step frees and takes the same large blocks again and again, and each would be given back and
    zeroed anew by the system: up to a fifth of a step's time. The process keeps its peak until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library other than glibc
        return False
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of <malloc.h>.
    return bool(mallopt(-3, 1 << 30)) and bool(mallopt(-1, (1 << 31) - 1))


def settle_vector_math() -> None:
    """Make the first cosine of this process on one thread.

    Made by several at once, it is off by up to 1.5e-4 in one process of seven (torch 2.13, MKL's vector
    functions), and so are the first rotary embeddings, which would not be computed again.
    """
    torch.cos(torch.ones(1))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The format of products with `x`: what autocast says on its device, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cpu_multiplies_bf16() -> bool:
    """True when the CPU has bf16 matrix instructions; without them bf16 is several times slower than fp32."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def pick_training_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def pick_kernels(device: torch.device) -> Literal["torch", "liger"]:
    """Liger's fused kernels on a GPU where the package is installed, else our own."""
    found = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    return "liger" if found else "torch"


def pick_serving_dtype(wanted: Literal["fp32", "bf16", "fp16", "auto"], device: torch.device) -> torch.dtype:
    """The dtype of served weights; on a CPU fp32, whose greedy answers do not depend on the batch."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

"""Measures a step's own operations on this machine: each distinct one, on operands that lie as far away.

An operand that the step touched a moment ago lies in a core's cache, one that it left long ago in main
memory, and the same product takes up to twice as long. So operands are views of an arena, and each place in
it comes round again after about as many bytes as in the step.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tunesmith.plan.duration import Operation
from tunesmith.plan.operations import FAR, NEAR_BYTES, Call, Operand, Operands

# What is used again after more bytes than these comes from main memory.
FAR_SPAN_BYTES = 256 << 20
# Operations on more bytes than these, element by element, are measured on a part of them.
LARGE_BYTES = 64 << 20
LEAST_S, LEAST_TIMES, MOST_TIMES = 2e-3, 3, 40
ALIGN = 64
# A first guess of what takes long. It gives the order of measuring, and shares out what is not measured.
GUESS_FLOPS_PER_S, GUESS_BYTES_PER_S, GUESS_CALL_S = 2e11, 2e10, 4e-6
# What an operator says that cannot be repeated with other values or on this device.
CANNOT = (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError, OSError, MemoryError)

Make = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of every call. share: of the time, by the first guess, that was measured; what was not is
    scaled as the rest came out. probe_s: what the measuring took."""

    seconds: Mapping[Call, float]
    share: float
    probe_s: float


def guess_s(operation: Operation) -> float:
    """Seconds on a machine of a few cores, to no great exactness."""
    work = operation.flops / GUESS_FLOPS_PER_S + operation.num_bytes / GUESS_BYTES_PER_S
    return work + GUESS_CALL_S


def measure(
    counts: Mapping[Call, int],
    operations: Mapping[Call, Operation],
    *,
    device: str = "cpu",
    budget_s: float,
) -> Measured:
    """Time the calls of a step on this machine with torch's number of threads, those that take most first,
    until `budget_s` seconds are over or all are done. counts: how often each call comes."""
    began, bench = time.perf_counter(), Bench(device)
    guesses = {call: guess_s(operations[call]) * count for call, count in counts.items()}
    found: dict[Call, float] = {}
    alike: dict[Any, float | None] = {}
    for call in sorted(counts, key=lambda call: -guesses[call]):
        if time.perf_counter() - began > budget_s:
            break
        key = call.func if operations[call].kind == "none" else call
        if key not in alike:
            alike[key] = bench.seconds(call, operations[call])
        seconds = alike[key]
        if seconds is not None:
            found[call] = seconds
    known = sum(guesses[call] for call in found)
    factor = sum(seconds * counts[call] for call, seconds in found.items()) / known if known else 1.0
    filled = {call: found.get(call, factor * guess_s(operations[call])) for call in counts}
    share = known / (sum(guesses.values()) or 1.0)
    return Measured(seconds=filled, share=share, probe_s=time.perf_counter() - began)


class Bench:
    """Repeats calls on operands of its own."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.arenas: dict[torch.dtype, _Arena] = {}

    def seconds(self, call: Call, operation: Operation) -> float | None:
        """Median time of the call; None for one that cannot be repeated."""
        times, short = shortened(call, operation)
        try:
            return times * self._seconds(short)
        except CANNOT:
            return None

    def _seconds(self, call: Call) -> float:
        places, found = self._places(call), [0.0]
        self._once(call, places)
        found[0] = self._once(call, places)
        while len(found) < LEAST_TIMES or (sum(found) < LEAST_S and len(found) < MOST_TIMES):
            found.append(self._once(call, places))
        return median(found)

    def _once(self, call: Call, places: list[Make]) -> float:
        tensors = [make() for make in places]
        left = iter(tensors)
        args = [self._filled(value, left) for value in call.args]
        kwargs = {name: self._filled(value, left) for name, value in call.kwargs}
        self._wait()
        began = time.perf_counter()
        call.func(*args, **kwargs)
        self._wait()
        seconds = time.perf_counter() - began
        for tensor in _written_to(call, args, kwargs):
            if tensor.is_floating_point():  # no infinities for the next one
                tensor.fill_(0.5)
        return seconds

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _filled(self, value: Any, tensors: Iterator[Tensor]) -> Any:
        if isinstance(value, Operand):
            return next(tensors)
        if isinstance(value, Operands):
            return [self._filled(part, tensors) for part in value]
        return torch.device(self.device) if isinstance(value, torch.device) else value

    def _places(self, call: Call) -> list[Make]:
        """For every operand a function that gives its place the next time."""
        operands = call.operands
        rooms = [_room(operand) for operand in operands]
        turns = [_turns(operand, sum(rooms)) for operand in operands]
        for dtype in {operand.dtype for operand in operands}:
            mine = [each for each in zip(operands, rooms, turns, strict=True) if each[0].dtype == dtype]
            near = sum(room * times for o, room, times in mine if o.far < FAR)
            self._arena(dtype).lay_out(near, sum(room for o, room, _ in mine if o.far >= FAR))
        places = []
        for operand, room, times in zip(operands, rooms, turns, strict=True):
            places.append(self._arena(operand.dtype).place(operand, room, times))
        varies = "flash_attention" in call.func.name()
        return [
            _starts(call, o) if varies and _is_starts(o) else p for o, p in zip(operands, places, strict=True)
        ]

    def _arena(self, dtype: torch.dtype) -> _Arena:
        if dtype not in self.arenas:
            self.arenas[dtype] = _Arena(dtype, self.device)
        return self.arenas[dtype]


class _Arena:
    """Memory of one format: at its beginning places that are near, one after the other; behind them those
    that are far, given out in turn."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.values = torch.empty(0, dtype=dtype)
        self.near = self.near_end = self.far = 0

    def lay_out(self, near_bytes: int, far_bytes: int) -> None:
        """Room for a call's operands; an arena that is too small is made anew."""
        needed = near_bytes + (max(far_bytes, FAR_SPAN_BYTES) if far_bytes else 0)
        if self.values.nbytes < needed:
            self.values = torch.empty(0, dtype=self.dtype)
            self.values = _memory(needed, self.dtype, self.device)
        self.near, self.near_end = 0, near_bytes
        self.far = max(self.far, near_bytes)

    def place(self, operand: Operand, room: int, turns: int) -> Make:
        if operand.far >= FAR:
            return lambda: self._view(operand, self._next(room))
        base, span = self.near, room * turns
        self.near += span
        views = [self._view(operand, base + at) for at in range(0, span, room)]
        if len(views) > 1:
            self.values[base // self.dtype.itemsize : (base + span) // self.dtype.itemsize].clone()
        turn = -1

        def near() -> Tensor:
            nonlocal turn
            turn = (turn + 1) % len(views)
            return views[turn]

        return near

    def _next(self, room: int) -> int:
        if self.far + room > self.values.nbytes:
            self.far = self.near_end
        at = self.far
        self.far += room
        return at

    def _view(self, operand: Operand, at: int) -> Tensor:
        return self.values.as_strided(operand.shape, operand.stride, at // self.dtype.itemsize)


def _memory(num_bytes: int, dtype: torch.dtype, device: str) -> Tensor:
    """Memory that goes back to the system as soon as nothing looks at it, whatever the C library keeps."""
    count = -(-num_bytes // dtype.itemsize)
    if device == "cuda":
        return torch.full((count,), _value(dtype), dtype=dtype, device=device)
    values = torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)
    return values.fill_(_value(dtype))


def _value(dtype: torch.dtype) -> float | int:
    """0.5 is an ordinary number whatever is computed with it; 0 is a place that every tensor has."""
    return 0.5 if dtype.is_floating_point else 0


def _room(operand: Operand) -> int:
    """Bytes from the operand's first element to its last, rounded up; never none."""
    reach = sum((size - 1) * step for size, step in zip(operand.shape, operand.stride, strict=True))
    last = 0 if 0 in operand.shape else reach + 1
    return max(1, -(-last * operand.dtype.itemsize // ALIGN)) * ALIGN


def _turns(operand: Operand, call_bytes: int) -> int:
    """How many places a near operand takes in turn, so that between two uses of one as much is touched as the
    middle of what its `far` stands for. call_bytes: of all operands of the call."""
    ring = NEAR_BYTES * 2 * 4 ** (operand.far - 1) if operand.far else 0
    return max(1, ring // call_bytes)


def _is_starts(operand: Operand) -> bool:
    """The int32 list of where documents start that attention kernels of varying lengths take."""
    return operand.dtype == torch.int32 and len(operand.shape) == 1


def _starts(call: Call, operand: Operand) -> Make:
    """Documents of equal lengths over all tokens of the call's first operand."""
    starts = torch.linspace(0, call.operands[0].shape[0], operand.shape[0]).to(torch.int32)
    return lambda: starts


def _written_to(call: Call, args: list[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for place, argument in enumerate(call.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            yield from (t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor))


# -- large operations ----------------------------------------------------------------------------------------


def shortened(call: Call, operation: Operation) -> tuple[float, Call]:
    """A call on a part of the operands of one that works element by element on very much, and how many times
    as long that one takes; (1.0, the call itself) for all others."""
    if operation.kind not in ("memory", "optimizer") or operation.num_bytes <= LARGE_BYTES:
        return 1.0, call
    lists = [v for v in call.args if isinstance(v, Operands) and v and isinstance(v[0], Operand)]
    return _fewer_tensors(call, lists) if lists else _fewer_rows(call)


def _fewer_tensors(call: Call, lists: list[Operands]) -> tuple[float, Call]:
    """The first tensors of every list, the largest left out, to LARGE_BYTES."""
    length = len(lists[0])
    if length < 8 or any(len(each) not in (0, length) for each in lists) or not call.func.name().count("_f"):
        return 1.0, call
    sizes = [sum(each[number].num_bytes for each in lists) for number in range(length)]
    chosen: list[int] = []
    for number in sorted(range(length), key=lambda number: sizes[number] > LARGE_BYTES / 2):
        if sum(sizes[n] for n in chosen) < LARGE_BYTES:
            chosen.append(number)
    args = Operands(
        Operands(v[n] for n in chosen) if isinstance(v, Operands) and len(v) == length else v
        for v in call.args
    )
    return sum(sizes) / sum(sizes[n] for n in chosen), call._replace(args=args)


def _fewer_rows(call: Call) -> tuple[float, Call]:
    """The first rows of all operands, where all have as many and no shape is asked for."""
    large = [o for o in call.operands if o.shape]
    rows = {o.shape[0] for o in large}
    plain = not any(isinstance(v, Operands) for v in call.args)
    if len(rows) != 1 or not plain or any(len(o.shape) < 2 for o in large):
        return 1.0, call
    total = rows.pop()
    fewer = max(1, total * LARGE_BYTES // sum(o.num_bytes for o in large))
    if fewer >= total:
        return 1.0, call

    def cut(value: Any) -> Any:
        is_large = isinstance(value, Operand) and value.shape
        return value._replace(shape=(fewer, *value.shape[1:])) if is_large else value

    args, kwargs = Operands(map(cut, call.args)), tuple((name, cut(value)) for name, value in call.kwargs)
    return total / fewer, Call(call.func, args, kwargs)


# -- the disk ------------------------------------------------------------------------------------------------


def write_rate(folder: Path, num_bytes: int = 32 << 20) -> float:
    """Bytes a second at which a file is written to `folder` and is safe there; the file is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, block = folder / ".write-rate", bytes(1 << 20)
    began = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(num_bytes // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)

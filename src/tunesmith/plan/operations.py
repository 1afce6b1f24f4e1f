"""What a traced training step computes: every operation with its kind, its arithmetic and its memory traffic.

    calls = Calls(trace)
    trace.listeners.append(calls)

Arithmetic is counted exactly, a multiplication and an addition as two operations; a causal mask halves an
attention kernel's work. Whatever has no products in it is counted by the bytes that it reads and writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from tunesmith.model.hardware import repeats
from tunesmith.plan.duration import Kind, Operation

ATEN = torch.ops.aten
# Names of operators of attention as one kernel, forward and backward.
ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "varlen_attn")
NO_WORK = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift")


class Operand(NamedTuple):
    """A tensor as an operation gets it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the elements that it looks at, each counted once."""
        return _extent(self.shape, self.stride) * self.dtype.itemsize


class Operands(tuple[Any, ...]):
    """A list among the arguments."""

    __slots__ = ()


class Call(NamedTuple):
    """An operator with its arguments, every tensor among them an Operand."""

    func: Any
    args: Operands
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def operands(self) -> list[Operand]:
        return list(_operands((*self.args, *(value for _, value in self.kwargs))))


class Phased(Protocol):
    """What says where the step is (`plan.trace.Trace`)."""

    phase: str


class Calls:
    """A listener of a trace. counts: how often each call comes in each phase; operations: what each is."""

    def __init__(self, trace: Phased) -> None:
        self.trace = trace
        self.counts: Counter[tuple[str, Call]] = Counter()
        self.operations: dict[Call, Operation] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func.namespace == "profiler":
            return
        given = Operands(map(described, args))
        named = tuple((name, described(value)) for name, value in kwargs.items())
        call = Call(func, given, named)
        if call not in self.operations:
            self.operations[call] = operation_of(func, args, kwargs, out)
        self.counts[self.trace.phase, call] += repeats()

    def of(self, *phases: str) -> Counter[Call]:
        """How often each call comes in these phases together."""
        found: Counter[Call] = Counter()
        for (phase, call), count in self.counts.items():
            if phase in phases:
                found[call] += count
        return found

    def flops(self, *phases: str) -> int:
        return sum(self.operations[call].flops * count for call, count in self.of(*phases).items())


def described(value: Any) -> Any:
    """An argument with an Operand for every tensor, hashable."""
    if isinstance(value, Tensor):
        return Operand(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (tuple, list)):
        return Operands(map(described, value))
    return value


def _operands(values: Iterable[Any]) -> Iterator[Operand]:
    for value in values:
        if isinstance(value, Operand):
            yield value
        elif isinstance(value, Operands):
            yield from _operands(value)


def operation_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Operation:
    """The kind, arithmetic and traffic of a call. out: what it returned."""
    name = func.name().removeprefix("aten::")
    if func.namespace == "c10d":
        return Operation(name=name, kind="message", dtype="other", flops=0, num_bytes=_message_bytes(args))
    flops = flops_of(func, args, kwargs, out)
    kind = _kind(func, name, flops)
    read = list(tensors_of((args, kwargs)))
    num_bytes = 0 if kind == "none" else sum(map(_num_bytes, read)) + _written(func, args, kwargs, out)
    dtype = next((t.dtype for t in read if t.is_floating_point()), None)
    return Operation(name=name, kind=kind, dtype=_dtype_name(dtype), flops=flops, num_bytes=num_bytes)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of the products in a call; 0 for one that has none."""
    name = func.name()
    if name in PRODUCTS:
        return PRODUCTS[name](args, out)
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0
    given = {key: value for key, value in kwargs.items() if key != "out"}
    full = int(formula(*args, **given, out_val=out))
    return full // 2 if _is_causal(func, args, kwargs) else full


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Every tensor among nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_of(value)
    elif isinstance(values, dict):
        yield from tensors_of(list(values.values()))


# -- arithmetic that torch's registry does not count ---------------------------------------------------------


def _onto(args: tuple[Any, ...], out: Any) -> int:
    left, right = args[1:3]
    return int(2 * left.numel() * right.shape[-1])


def _vector(args: tuple[Any, ...], out: Any) -> int:
    return int(2 * args[-2].numel())


def _attention_on_cpu(args: tuple[Any, ...], out: Any) -> int:
    q, k, v = args[:3]
    batch, heads, queries, width = q.shape
    causal = (args[4:5] or (False,))[0]
    full = 2 * batch * heads * queries * k.shape[2] * (width + v.shape[3])
    return int(full // 2 if causal else full)


def _attention_on_cpu_backward(args: tuple[Any, ...], out: Any) -> int:
    """Five products of the size of the forward pass's two: Dao et al. 2022, arXiv:2205.14135, appendix B."""
    _, q, k, v = args[:4]
    batch, heads, queries, width = q.shape
    full = 2 * batch * heads * queries * k.shape[2] * (3 * width + 2 * v.shape[3])
    return int(full // 2 if args[7] else full)


def _linear(args: tuple[Any, ...], out: Any) -> int:
    return int(2 * out.numel() * args[0].shape[-1])


PRODUCTS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "aten::addmm_": _onto,
    "aten::mv": lambda args, out: int(2 * args[0].numel()),
    "aten::addmv_": _vector,
    "aten::addmv": _vector,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention_on_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_on_cpu_backward,
    "aten::linear": _linear,
    "bitsandbytes::gemm_4bit": _linear,
}


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("is_causal", "causal"):
            return bool(kwargs.get(argument.name, args[place] if place < len(args) else False))
    return False


# -- kinds and traffic ---------------------------------------------------------------------------------------


def _kind(func: Any, name: str, flops: int) -> Kind:
    base = name.split(".")[0]
    if any(part in base for part in ATTENTION):
        return "attention"
    if flops:
        return "matmul"
    if base.startswith("bitsandbytes::"):
        return "dequantise"
    if base.startswith("_fused_adam"):
        return "optimizer"
    return "none" if base in NO_WORK or _is_view(func) else "memory"


def _is_view(func: Any) -> bool:
    """True where what is returned looks at what was given and nothing is written."""
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of new results, and of arguments that are written to."""
    total = 0
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
            value = kwargs.get(argument.name, args[place] if place < len(args) else None)
            total += sum(map(_num_bytes, tensors_of(value)))
    fresh = [value.alias_info is None for value in func._schema.returns]
    if fresh and all(fresh):
        total += sum(map(_num_bytes, tensors_of(out)))
    return total


def _message_bytes(args: tuple[Any, ...]) -> int:
    """Of a message as all processes together have it: what is given or what comes, whichever is more."""
    return max((sum(map(_num_bytes, tensors_of(value))) for value in args), default=0)


def _num_bytes(tensor: Tensor) -> int:
    return _extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements, those of an expanded dimension counted once."""
    return prod(size if step else min(size, 1) for size, step in zip(shape, stride, strict=True))


def _dtype_name(dtype: torch.dtype | None) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    return names.get(dtype, "other") if dtype is not None else "other"

"""The training steps of torchtune, LitGPT and torchtitan, as they compute them, on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from tunesmith.plan.decoder import Shape
from tunesmith.plan.stock_native_model import Decoder, Style, angles
from tunesmith.plan.stock_sharded_fsdp import ShardedModel, Sharding
from tunesmith.plan.trace import Trace

# bitsandbytes and torchao: values that share a scale; what is smaller keeps states of its own format.
EIGHT_BIT_BLOCK, FOUR_BIT_BLOCK, SMALL = 256, 128, 4096
TORCHTUNE_CHUNKS, LITGPT_CHUNK = 8, 128
Optimizer = Literal["fused", "foreach", "8bit", "4bit", "paged", "sgd"]


@dataclass(frozen=True, kw_only=True)
class NativeStack:
    """One GPU's share of a native training.

    loss: of all logits at once in fp32, or of chunks of them; compiled_loss: in one kernel; in_backward:
    each weight is updated as soon as its gradient is there; expandable: the allocator's segments are.
    """

    shape: Shape
    style: Style
    batch: int
    length: int
    accumulation: int
    loss: Literal["whole", "chunked"]
    compiled_loss: bool
    optimizer: Optimizer
    in_backward: bool
    sharding: Sharding | None
    workspace_bytes: int
    expandable: bool
    metric: Literal["allocated", "reserved"]


class NativeStep:
    """A step at which every optimizer state is there."""

    def __init__(self, stack: NativeStack, layers: int) -> None:
        self.stack, self.layers = stack, layers

    def run(self, trace: Trace) -> None:
        stack = self.stack
        with _Default(torch.bfloat16):
            model = Decoder(stack.shape, stack.style, self.layers)
        table = angles(stack.shape, stack.style, stack.length)
        workspace = torch.empty(stack.workspace_bytes, dtype=torch.uint8)
        shared = None
        trained = [p for p in model.parameters() if p.requires_grad]
        if stack.sharding is not None:
            shared = ShardedModel(trace, model, list(model.layers), stack.sharding)
            trained = shared.parts
        trace.watch(model, stack.shape.vocab, list(model.layers))
        trace.hold([workspace, table], "temporaries")
        states = [state for p in trained for state in _states(p, stack.optimizer)]
        trace.hold(states, "optimizer state")
        if stack.in_backward:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(_drop)
        if stack.accumulation > 1 and shared is None:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        _micro_batch(trace, model, table, stack, shared)
        trace.at("update")
        _update(trained, stack.optimizer)


class _Default:
    """Within it new tensors are of this format."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


def _micro_batch(
    trace: Trace, model: Decoder, table: Tensor, stack: NativeStack, shared: ShardedModel | None
) -> None:
    tokens = torch.zeros(stack.batch, stack.length, dtype=torch.int64)
    trace.at("forward")
    if shared is not None:
        shared.begin()
    loss, kept = _forward(trace, model, tokens, table, stack)
    trace.at("backward", "loss")
    if shared is not None:
        shared.turn()
    loss.backward()
    del kept
    if shared is not None:
        shared.finish()


def _forward(
    trace: Trace, model: Decoder, tokens: Tensor, table: Tensor, stack: NativeStack
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what lives beside its graph until the backward pass is over."""
    offloading = _offloaded(trace) if stack.style.offload else nullcontext()
    with trace.saving(), offloading:
        hidden = model(tokens, table)
    with trace.saving():
        return LOSSES[stack.style.framework, stack.loss](model, hidden, tokens, stack.compiled_loss)


def _offloaded(trace: Trace) -> saved_tensors_hooks:
    """What is saved lies in host memory until it is needed (torchtune's OffloadActivations)."""

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < 1024:
            return tensor
        with trace.on("pinned"):
            return tensor.clone()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()

    return saved_tensors_hooks(pack, unpack)


# -- losses -----------------------------------------------------------------------------------------------


class CompiledCrossEntropy(torch.autograd.Function):
    """logits [N, V] -> sum of the losses: the logits are saved as they are, and two fp32 numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, logits.new_empty(logits.shape[0], 2, dtype=torch.float32))
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


Made = tuple[Tensor, list[Tensor]]


def _whole(model: Decoder, hidden: Tensor, tokens: Tensor, compiled: bool) -> Made:
    """torchtune: the logits in fp32 leave the model; they are let go before the backward pass."""
    logits = model.output(hidden).float()
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)), []


def _cast_within(model: Decoder, hidden: Tensor, tokens: Tensor, compiled: bool) -> Made:
    """torchtitan: the fp32 copy is the loss function's own."""
    logits = model.output(hidden)
    if compiled:
        return CompiledCrossEntropy.apply(logits.flatten(0, 1)), []
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(0, 1)), []


def _chunked(model: Decoder, hidden: Tensor, tokens: Tensor, compiled: bool) -> Made:
    """torchtune's CEWithChunkedOutputLoss: the output layer by eighths, each eighth's loss by itself."""
    logits = [model.output(part) for part in hidden.chunk(TORCHTUNE_CHUNKS, dim=1)]
    labels = tokens.chunk(TORCHTUNE_CHUNKS, dim=1)
    losses = [_sum(part, label, compiled) for part, label in zip(logits, labels, strict=True)]
    return torch.stack(losses).sum(), []


def _sum(logits: Tensor, labels: Tensor, compiled: bool) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    if compiled:
        return CompiledCrossEntropy.apply(flat)
    return functional.cross_entropy(flat.float(), labels.reshape(-1), reduction="sum")


def _litgpt(model: Decoder, hidden: Tensor, tokens: Tensor, compiled: bool) -> Made:
    """LitGPT: 128 tokens at a time; Fabric casts what the model returns to fp32, and the loop keeps it."""
    made = [model.output(part) for part in hidden.split(LITGPT_CHUNK, dim=1)]
    logits = [part.float() for part in made]
    del made
    labels = tokens.split(LITGPT_CHUNK, dim=1)
    losses = [
        functional.cross_entropy(part.reshape(-1, part.shape[-1]), label.reshape(-1), reduction="none")
        for part, label in zip(logits, labels, strict=True)
    ]
    return torch.cat(losses).mean(), logits


Loss = Callable[[Decoder, Tensor, Tensor, bool], Made]
LOSSES: dict[tuple[str, str], Loss] = {
    ("torchtune", "whole"): _whole,
    ("torchtune", "chunked"): _chunked,
    ("torchtitan", "whole"): _cast_within,
    ("litgpt", "chunked"): _litgpt,
}


# -- optimizers -------------------------------------------------------------------------------------------


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _states(parameter: nn.Parameter, optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer keeps of a weight between steps, on the device."""
    count = parameter.numel()
    if optimizer == "sgd" or (optimizer == "paged" and count >= 100_000):  # managed memory is not torch's
        return []
    if optimizer in ("fused", "foreach", "paged") or count < SMALL:
        return [torch.empty_like(parameter) for _ in range(2)]
    block, bits = (FOUR_BIT_BLOCK, 4) if optimizer == "4bit" else (EIGHT_BIT_BLOCK, 8)
    num_bytes = count * bits // 8 + 4 * -(-count // block)
    return [torch.empty(num_bytes, dtype=torch.uint8) for _ in range(2)]


def _update(trained: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """torch's foreach AdamW takes the roots of all squares at once; the others nothing."""
    if optimizer == "foreach":
        roots = [torch.empty_like(p) for p in trained if p.grad is not None]
        del roots
    for parameter in trained:
        parameter.grad = None

"""The training step of the Hugging Face Trainer, as its versions compute it, on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tunesmith.model.shape import make_fake
from tunesmith.plan.stack import Stack
from tunesmith.plan.stock_model import DTYPES, QuantisedLinear, blocks, build, fused_rotation
from tunesmith.plan.stock_ops import FusedCrossEntropy, LinearCrossEntropy
from tunesmith.plan.trace import Trace

# bitsandbytes' states: 8-bit values that share a scale; smaller tensors have states of fp32, and stay on the
# device when the rest is paged.
EIGHT_BIT_BLOCK, EIGHT_BIT_FROM, PAGED_FROM = 256, 4096, 100_000


class StockStep:
    """A step at which every state is there: forward, backward, clipping, AdamW."""

    def __init__(self, stack: Stack, layers: int) -> None:
        self.stack = stack
        self.model = build(stack, layers)

    def run(self, trace: Trace) -> None:
        stack, model = self.stack, self.model
        make_fake(model)
        model.config.stock_attention = stack.attention, stack.repeats_keys, DTYPES[stack.compute]
        listed = blocks(model)
        if stack.checkpointing:
            _checkpoint(model, listed, frozen=stack.method == "lora")
        trained = self.divide(trace, listed)
        trace.watch(model, stack.shape.vocab, listed)
        for module in model.modules():
            if isinstance(module, QuantisedLinear):
                trace.hold(module.buffers(), "quantised weights")
        workspace = torch.empty(stack.workspace_bytes, dtype=torch.uint8)
        trace.hold([workspace], "temporaries")
        update = Update(trained, stack)
        trace.hold(update.states, "optimizer state")
        if stack.accumulation > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        with fused_rotation(model, stack.fused_kernels):
            self._train(trace)
        trace.at("update")
        update.step()
        for parameter in trained:
            parameter.grad = None

    def _train(self, trace: Trace) -> None:
        ids = torch.zeros(self.stack.batch, self.stack.length, dtype=torch.int64)
        trace.at("forward")
        self.enter_forward()
        with trace.saving():
            loss = trainer_loss(self.model, self.stack, ids)
        trace.at("backward", "loss")
        self.enter_backward()
        loss.backward()
        self.leave_backward()

    def divide(self, trace: Trace, layers: Sequence[nn.Module]) -> list[nn.Parameter]:
        """What this process trains: all, or its part of a model that several hold together."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def enter_forward(self) -> None: ...

    def enter_backward(self) -> None: ...

    def leave_backward(self) -> None: ...


def trainer_loss(model: Any, stack: Stack, ids: Tensor) -> Tensor:
    """The loss; what it leaves behind is what the backward pass needs."""
    with _autocast(stack), _cache(model, stack) as kept:
        loss, logits = _forward(model, stack, ids)
    if stack.fp32_outputs:  # accelerate casts all that a model returns
        loss, logits = loss.float(), None if logits is None else logits.float()
    if stack.counts_hits and logits is not None:
        with torch.no_grad():
            logits[..., :-1, :].contiguous().argmax(dim=-1)
    del logits, kept
    return loss


@contextmanager
def _cache(model: Any, stack: Stack) -> Iterator[list[Tensor]]:
    """BigCode's keys and values of the forward pass: parts of its fused product, which they keep whole."""
    kept: list[Tensor] = []
    hooks = []
    if stack.keeps_cache:
        fused = [block.attn.c_attn for block in blocks(model)]
        hooks = [module.register_forward_hook(lambda *given: kept.append(given[-1])) for module in fused]
    yield kept
    for hook in hooks:
        hook.remove()


def _autocast(stack: Stack) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", DTYPES[stack.autocast]) if stack.autocast else nullcontext()


def _forward(model: Any, stack: Stack, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    if stack.loss == "liger":
        kept = hidden[..., :-1, :].contiguous().view(-1, hidden.shape[-1])
        return LinearCrossEntropy.apply(kept, head.weight.to(kept.dtype), _labels(ids)), None
    logits = head(hidden)
    if scaling := getattr(model.config, "logits_scaling", None):
        logits = logits / scaling
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if stack.upcast_logits and not stack.held_logits:
        logits = logits.float()
    return _loss(logits, ids, stack), logits


def _labels(ids: Tensor) -> Tensor:
    return ids[..., 1:].contiguous().view(-1)


def _loss(logits: Tensor, ids: Tensor, stack: Stack) -> Tensor:
    if stack.upcast_logits:
        logits = logits.float()
    if stack.shifted:
        shifted, labels = logits[..., :-1, :].contiguous(), _labels(ids)
    else:
        shifted, labels = logits, functional.pad(ids, (0, 1))[..., 1:].contiguous().view(-1)
    flat = shifted.view(-1, shifted.shape[-1])
    if stack.loss == "triton":
        return FusedCrossEntropy.apply(flat, labels)
    # CUDA's autocast makes it in fp32; that of fake CPU tensors would not.
    return functional.cross_entropy(flat.float() if stack.autocast else flat, labels)


def _checkpoint(model: Any, listed: Sequence[Any], *, frozen: bool) -> None:
    """Every decoder layer keeps its input alone; adapters need the embeddings to ask for gradients."""
    for block in listed:
        block.forward = partial(_recomputed, block.forward)
    if frozen:
        model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_(True))


def _recomputed(forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), hidden, *args, use_reentrant=True, preserve_rng_state=False)


class Update:
    """Clipping and the optimizer, by what they allocate. states: what they keep between steps."""

    def __init__(self, trained: Sequence[nn.Parameter], stack: Stack) -> None:
        self.trained, self.stack = list(trained), stack
        self.averages, self.squares = ([self._state(p) for p in trained] for _ in range(2))
        if stack.optimizer == "sgd":
            self.squares = []

    @property
    def states(self) -> list[Tensor]:
        return self.averages + self.squares

    def _state(self, parameter: nn.Parameter) -> Tensor:
        if self.stack.optimizer != "bnb":
            return torch.empty_like(parameter)
        count = parameter.numel()
        if self.stack.paged and count >= PAGED_FROM:  # managed memory, outside torch's
            return parameter.new_empty(0)
        if self.stack.state_bits == 8 and count >= EIGHT_BIT_FROM:
            return parameter.new_empty(count + 4 * -(-count // EIGHT_BIT_BLOCK), dtype=torch.uint8)
        return parameter.new_empty(count, dtype=torch.float32)

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.trained if p.grad is not None]
        torch._foreach_mul_(grads, 0.5)
        if self.stack.optimizer != "adamw":
            return
        # torch's foreach AdamW: the roots of all squares at once, and up to 2.0 a second list for epsilon.
        roots = torch._foreach_sqrt(self.squares)
        denominators = torch._foreach_add(roots, 1e-8) if self.stack.denominator_copy else roots
        torch._foreach_addcdiv_(list(self.trained), self.averages, denominators)

"""Follows every storage of a training step: on fake tensors, which take no memory, or on real ones.

    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        trace.watch(model, vocabulary)
        trace.at("forward")
        ...
    trace.timeline.peak()

What a kernel takes for itself and gives back is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunesmith.model.quant import four_bit_tensors, product_of_four_bits
from tunesmith.plan.timeline import Category, Mark, Place, Record, Timeline

ATEN = torch.ops.aten
DEVICE = torch.ops.prim.device.default
Listener = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


class Trace(TorchDispatchMode):
    """While it is active, every tensor that an operation makes is a record until it is freed.

    A storage counts once, whatever number of tensors look at it; tensors made before count from `hold` on.
    listeners: called after every operation with (operation, args, kwargs, result). num_nonzero: how many
    places `nonzero` finds in fake tensors; a number that is asked of a fake tensor (`.item()`) is 1.
    """

    def __init__(self, *, num_nonzero: int = 0) -> None:
        super().__init__()
        self.listeners: list[Listener] = []
        self.num_nonzero = num_nonzero
        self.vocabulary = self.num_layers = 0
        self.phase, self.part = "load", ""
        self._records: list[Record] = []
        self._marks: list[Mark] = []
        self._numbers: dict[int, int] = {}  # of the records of living storages, by their addresses
        self._watched: dict[int, Any] = {}
        self._now = 0
        self._models: list[nn.Module] = []
        self._place: Place = "device"

    @property
    def timeline(self) -> Timeline:
        return Timeline(self._records, self._marks)

    # -- what is told -------------------------------------------------------------------------------------

    def at(self, phase: str, part: str = "") -> None:
        """From now on the step is in this phase and part. Gradients that are there get their name."""
        self._name_gradients()
        if (phase, part) == (self.phase, self.part):
            return
        self.phase, self.part = phase, part
        self._marks.append(Mark(self._now + 1, phase, part))

    def hold(self, tensors: Iterable[Tensor | None], category: Category, place: Place | None = None) -> None:
        """These tensors are there, and are of this category; place: where, if it is to change."""
        for tensor in tensors:
            if tensor is None:
                continue
            self._track(tensor, "held")
            number = self._numbers.get(_holder(tensor).untyped_storage()._cdata)
            if number is not None:
                record = self._records[number]
                if (record.category, category) != ("quantised weights", "weights"):
                    record.category = category
                record.place = place or record.place

    @contextmanager
    def on(self, place: Place) -> Iterator[None]:
        """What is made within it lies there."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def watch(self, model: nn.Module, vocabulary: int, layers: Iterable[nn.Module] = ()) -> None:
        """Name the weights and buffers of `model`, its gradients when they come, and its decoder layers.

        vocabulary: what is as wide is logits or of the loss.
        """
        self.vocabulary = vocabulary
        self._models.append(model)
        self.hold(model.parameters(), "weights")
        self.hold(model.buffers(), "weights")
        for module in model.modules():
            self.hold(four_bit_tensors(module), "quantised weights")
        listed = list(layers)
        self.num_layers = len(listed)
        for number, layer in enumerate(listed):
            self._name_layer(layer, _layer_name(number, len(listed)))

    def _name_layer(self, layer: nn.Module, name: str) -> None:
        def before(_: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            self._in_backward(hidden, "")
            if self.phase != "backward":
                self.at(self.phase, name)

        def after(_: Any, args: Any, out: Any) -> None:
            self._in_backward(out[0] if isinstance(out, tuple) else out, name)
            if self.phase != "backward":
                self.at(self.phase, "")

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after)

    def _in_backward(self, tensor: Any, part: str) -> None:
        """When the gradient of `tensor` is there, the backward pass comes to `part`."""
        if isinstance(tensor, Tensor) and tensor.requires_grad and self.phase != "backward":
            tensor.register_hook(lambda _: self.at("backward", part))

    def saving(self) -> Any:
        """A context for the forward pass: what is saved for the backward pass is named activations."""
        return torch.autograd.graph.saved_tensors_hooks(self._saved, lambda tensor: tensor)

    def _saved(self, tensor: Tensor) -> Tensor:
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None and self._records[number].category == "temporaries":
            self._records[number].category = "activations"
        return tensor

    def _name_gradients(self) -> None:
        for model in self._models:
            grads = (p.grad for p in model.parameters() if p.grad is not None)
            self.hold((grad for grad in grads if not self._is_sent(grad)), "gradients")

    def _is_sent(self, grad: Tensor) -> bool:
        """True for a part of a buffer in which gradients are sent to other processes."""
        number = self._numbers.get(_holder(grad).untyped_storage()._cdata)
        return number is not None and self._records[number].category == "communication"

    # -- what is seen -------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is DEVICE and isinstance(args[0], FakeTensor):
            # Only a tensor that is not real asks this, and more often than all else: no part of the step.
            return args[0].fake_device
        if func.name() == "bitsandbytes::gemm_4bit":
            return self._product_of_four_bits(args, kwargs)
        out = self._answer(func, args)
        if out is None:
            out = func(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._track(value, name)
        for listener in self.listeners:
            listener(func, args, kwargs, out)
        return out

    def _answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What a fake tensor cannot know; None for all else."""
        if not args or not isinstance(args[0], FakeTensor):
            return None
        if func is ATEN._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is ATEN.nonzero.default:
            return args[0].new_zeros((self.num_nonzero, args[0].dim()), dtype=torch.int64)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        return None

    def _product_of_four_bits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """bitsandbytes' product, its steps seen one by one."""
        with self:
            return product_of_four_bits(*args, **kwargs)

    def _track(self, tensor: Tensor, maker: str) -> None:
        tensor = _holder(tensor)
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._numbers or num_bytes == 0 or tensor.device.type == "meta":
            return
        wide = self.vocabulary > 1 and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        label = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} by {maker}"
        category: Category = "logits and loss" if wide else "temporaries"
        self._numbers[key] = len(self._records)
        self._watched[key] = weakref.ref(storage, self._forgetter(key))
        self._records.append(
            Record(num_bytes, self._tick(), None, category, self.phase, self.part, label, self._place)
        )

    def _forgetter(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            del self._watched[key]
            record = self._records[self._numbers.pop(key)]
            if record.freed is None:
                record.freed = self._tick()

        return forget

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage was given or lost its memory where it is, as those of sharded weights are."""
        key = storage._cdata
        if key not in self._numbers:
            return
        record = self._records[self._numbers[key]]
        if record.freed is None:
            record.freed = self._tick()
        if storage.nbytes():
            self._numbers[key] = len(self._records)
            again = replace(record, num_bytes=storage.nbytes(), made=self._tick(), freed=None)
            again.phase, again.part = self.phase, self.part
            self._records.append(again)

    def _tick(self) -> int:
        self._now += 1
        return self._now


def _holder(tensor: Tensor) -> Tensor:
    """The tensor that has the memory: of a sharded one its part here, of one still to come its place."""
    for name in ("_local_tensor", "elem"):
        part = getattr(tensor, name, None)
        if isinstance(part, Tensor):
            return _holder(part)
    return tensor


def _layer_name(number: int, count: int) -> str:
    """The first two and the last two layers by themselves: a peak is at an end of what is linear between."""
    if number < 2:
        return f"layer {number}"
    return f"layer {number - count}" if number >= count - 2 else "layers between"

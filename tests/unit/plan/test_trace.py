from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.plan.timeline import Timeline
from tunesmith.plan.trace import Trace

KIB = 1024


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 256, bias=False)
        self.second = nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def step(trace: Trace, net: Net) -> Timeline:
    """Forward, backward and an SGD-like update of 8 rows."""
    trace.watch(net, vocabulary=0, layers=[net.first, net.second])
    trace.at("forward")
    with trace.saving():
        loss = net(torch.ones(8, 64)).sum()
    trace.at("backward", "head")
    loss.backward()
    trace.at("update")
    with torch.no_grad():
        torch._foreach_add_(list(net.parameters()), [p.grad for p in net.parameters()], alpha=-0.1)
    return trace.timeline


def test_fake_tensors_tell_what_real_ones_do() -> None:
    net = Net()
    fake = copy.deepcopy(net)
    with Trace() as trace:
        real = step(trace, net)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (fake.first, fake.second):
            module.weight = nn.Parameter(mode.from_tensor(module.weight.detach()))
        with Trace() as trace:
            traced = step(trace, fake)
    assert traced.peaks() == real.peaks()
    assert traced.peak().num_bytes == real.peak().num_bytes > 0


def test_every_storage_gets_its_category() -> None:
    with Trace() as trace:
        timeline = step(trace, Net())
    sizes = {}
    for record in timeline.records:
        sizes.setdefault(record.category, []).append(record.num_bytes)
    assert sizes["weights"] == [64 * KIB, 64 * KIB]
    assert sorted(sizes["gradients"]) == [64 * KIB, 64 * KIB]
    assert 8 * KIB in sizes["activations"], "tanh's output is saved for the backward pass"
    assert timeline.peaks()["update", ""].parts["gradients"] == 128 * KIB


def test_the_backward_pass_is_told_by_layers() -> None:
    with Trace() as trace:
        timeline = step(trace, Net())
    keys = list(timeline.peaks())
    assert ("forward", "layer 0") in keys and ("forward", "layer 1") in keys
    assert keys.index(("backward", "layer 1")) < keys.index(("backward", "layer 0"))


def test_what_fake_tensors_cannot_know_has_an_answer() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Trace(num_nonzero=3) as trace:
        labels = torch.zeros(10, dtype=torch.int64)
        places = (labels != -100).nonzero().squeeze(1)
        assert places.shape == (3,)
        assert float(torch.zeros(()).sum()) == 1.0
        assert int(labels[0]) == 1
    assert trace.timeline.peak().num_bytes > 0


def test_a_storage_counts_once_and_until_its_last_tensor_goes() -> None:
    with Trace() as trace:
        whole = torch.zeros(1000, dtype=torch.float32)
        view = whole[:10].view(2, 5)
        del whole
        trace.at("forward")
        torch.zeros(1)
        del view
        trace.at("backward")
        torch.zeros(1)
    peaks = trace.timeline.peaks()
    assert peaks["load", ""].num_bytes == 4000
    assert peaks["forward", ""].num_bytes == 4004
    assert peaks["backward", ""].num_bytes <= 8


def test_listeners_hear_every_operation() -> None:
    heard = []
    with Trace() as trace:
        trace.listeners.append(lambda func, args, kwargs, out: heard.append((func.name(), tuple(out.shape))))
        torch.ones(2, 3) @ torch.ones(3, 4)
    assert ("aten::mm", (2, 4)) in heard


def test_host_memory_has_its_place() -> None:
    with Trace() as trace:
        held = torch.zeros(100)
        trace.hold([held], "optimizer state", place="host")
        with trace.on("pinned"):
            kept = torch.zeros(50)
    assert trace.timeline.peaks(place="host")["load", ""].parts == {"optimizer state": 400}
    assert trace.timeline.peaks(place="pinned")["load", ""].num_bytes == kept.nbytes == 200
    assert trace.timeline.peaks() == {}


def test_only_work_is_heard() -> None:
    """A fake tensor is asked for its device again and again, a real one never."""
    heard: list[str] = []
    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        trace.listeners.append(lambda func, *_: heard.append(func.name()))
        x = torch.ones(8, 8, requires_grad=True)
        (x @ x).sum().backward()
    assert "aten::mm" in heard and not [name for name in heard if name.startswith("prim::")]

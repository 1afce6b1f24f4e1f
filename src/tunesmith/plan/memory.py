"""Peak memory of a training: its step traced whole, or with a few layers and carried on to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.plan.allocator import round_block
from tunesmith.plan.host_memory import pinned_block
from tunesmith.plan.timeline import (
    CATEGORIES,
    PHASES,
    Category,
    Moment,
    Place,
    Rounding,
    Timeline,
    exactly,
)
from tunesmith.plan.trace import Trace

Key = tuple[str, str]
# Both ends with two layers each, and none or one between: the least from which all follows.
FEW = (4, 5)
# What torch's allocator holds beyond its segments' use differs from run to run by so much.
FRAGMENTATION = 0.03


class Step(Protocol):
    """A training step that can be traced."""

    def run(self, trace: Trace) -> None:
        """Load, two optimizer steps or one at which all states are there, evaluation, sample, save: each
        announced by `trace.at`, under FakeTensorMode."""
        ...


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The fullest moments of a step by (phase, part), on the device and in host memory.

    timeline: of the step with the most layers that was traced, all of them where `exact`.
    """

    device: Mapping[Key, Moment]
    host: Mapping[Key, Moment]
    pinned: Mapping[Key, Moment]
    timeline: Timeline
    exact: bool = True

    @property
    def by_phase(self) -> tuple[Moment, ...]:
        """The fullest moment of each phase, in order."""
        found = [
            max((m for (phase, _), m in self.device.items() if phase == wanted), key=_bytes, default=None)
            for wanted in PHASES
        ]
        return tuple(moment for moment in found if moment is not None)

    @property
    def peak(self) -> Moment:
        return max(self.device.values(), key=_bytes)

    @property
    def host_by_phase(self) -> dict[str, int]:
        """Host memory of each phase that takes any, pinned memory included."""
        found: dict[str, int] = {}
        for key in (*self.host, *self.pinned):
            held = [moments[key].num_bytes for moments in (self.host, self.pinned) if key in moments]
            found[key[0]] = max(found.get(key[0], 0), sum(held))
        return {phase: found[phase] for phase in PHASES if found.get(phase)}

    def bytes_in(self, place: Place) -> int:
        held: Mapping[Place, Mapping[Key, Moment]]
        held = {"device": self.device, "host": self.host, "pinned": self.pinned}
        return max((moment.num_bytes for moment in held[place].values()), default=0)


def trace_step(
    make: Callable[[int], Step],
    layers: int,
    *,
    exact: bool,
    device: Literal["cpu", "cuda"],
    few: tuple[int, int] = FEW,
) -> Peaks:
    """Trace the step that `make` builds for a number of decoder layers.

    exact: with all of them; else with a `few` and one more, and every moment carried on: between them lies
    one layer, and memory is linear in the number of equal layers wherever the step is. Raises whatever the
    step raises on fake tensors.
    """
    rounding = round_block if device == "cuda" else exactly
    if exact or layers <= max(few):
        return _traced(make(layers), rounding)
    least, more = (_traced(make(number), rounding) for number in few)
    return _carried(least, more, layers - few[1])


def _traced(step: Step, rounding: Rounding) -> Peaks:
    with FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        step.run(trace)
    timeline = trace.timeline
    pinned = exactly if rounding is exactly else pinned_block
    return Peaks(
        device=timeline.peaks(rounding),
        host=timeline.peaks(exactly, "host"),
        pinned=timeline.peaks(pinned, "pinned"),
        timeline=timeline,
    )


def _carried(few: Peaks, more: Peaks, steps: int) -> Peaks:
    """Where `few` and `more` lead, one layer after the other."""
    return Peaks(
        device=_line(few.device, more.device, steps),
        host=_line(few.host, more.host, steps),
        pinned=_line(few.pinned, more.pinned, steps),
        timeline=more.timeline,
        exact=False,
    )


def _line(few: Mapping[Key, Moment], more: Mapping[Key, Moment], steps: int) -> dict[Key, Moment]:
    return {key: _further(few.get(key), moment, steps) for key, moment in more.items()}


def _further(few: Moment | None, more: Moment, steps: int) -> Moment:
    """A moment of no counterpart is of the layers between, which the two ends enclose."""
    if few is None:
        return more
    parts: dict[Category, int] = {}
    for category in CATEGORIES:
        now = more.parts.get(category, 0)
        then = max(0, now + steps * (now - few.parts.get(category, 0)))
        if then:
            parts[category] = then
    return Moment(phase=more.phase, num_bytes=sum(parts.values()), parts=parts)


def _bytes(moment: Moment) -> int:
    return moment.num_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Memory of one process, in bytes.

    moments: the fullest of every phase; live: of tensors as they are; allocated: in the device's blocks;
    reserved: with what its allocator keeps beside them; context: of CUDA itself; margin: for what differs
    from run to run; host, pinned: host memory that tensors take, loaded, offloaded or gathered to be
    saved, and that of each phase in all, of rank 0. exact: every layer
    was traced.
    """

    device: Literal["cpu", "cuda"]
    moments: tuple[Moment, ...]
    live_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int = 0
    margin_bytes: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0
    host_by_phase: Mapping[str, int] = field(default_factory=dict)
    exact: bool = True

    @property
    def needed_bytes(self) -> int:
        """What must be free on the device."""
        return self.reserved_bytes + self.context_bytes + self.margin_bytes

    @property
    def binding(self) -> Moment:
        """The fullest moment."""
        return max(self.moments, key=_bytes)

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "moments": [moment.as_dict() for moment in self.moments],
            "live_bytes": self.live_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "context_bytes": self.context_bytes,
            "margin_bytes": self.margin_bytes,
            "needed_bytes": self.needed_bytes,
            "host_bytes": self.host_bytes,
            "pinned_bytes": self.pinned_bytes,
            "host_by_phase": dict(self.host_by_phase),
            "exact": self.exact,
        }

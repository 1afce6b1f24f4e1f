"""What lived when: every storage of a traced step, from its allocation to its end, and the fullest moments.

Time is the number of the allocation or release, counted from the start of the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Category = Literal[
    "weights",
    "quantised weights",
    "gradients",
    "optimizer state",
    "activations",
    "logits and loss",
    "temporaries",
    "communication",
]
Place = Literal["device", "host", "pinned"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
# In the order of a step.
PHASES = ("load", "forward", "backward", "update", "evaluate", "sample", "save")

Rounding = Callable[[int], int]


def exactly(num_bytes: int) -> int:
    """Bytes of a tensor as they are counted on a CPU."""
    return num_bytes


@dataclass(slots=True)
class Record:
    """One storage. made, freed: when, None for what lives to the end; phase, part: where it was made, part
    naming a layer or nothing; maker: the operation; place: where it lies, and only what lies on the device
    counts in peaks unless another place is asked for."""

    num_bytes: int
    made: int
    freed: int | None
    category: Category
    phase: str
    part: str
    maker: str
    place: Place = "device"


@dataclass(frozen=True, slots=True)
class Mark:
    """From the moment `at` on the step is in this phase and part."""

    at: int
    phase: str
    part: str


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is live at one moment: bytes in all, and by category."""

    phase: str
    num_bytes: int
    parts: Mapping[Category, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "bytes": self.num_bytes, "parts": dict(self.parts)}


class Timeline:
    """The records of a trace, and its marks in order of time."""

    def __init__(self, records: Sequence[Record], marks: Sequence[Mark]) -> None:
        self.records, self.marks = records, marks

    def events(self, rounding: Rounding = exactly, place: Place = "device") -> Iterator[tuple[int, int, int]]:
        """(time, number of the record, bytes: negative where they are released), in order of time."""
        here = [(number, r) for number, r in enumerate(self.records) if r.place == place]
        made = ((r.made, number, rounding(r.num_bytes)) for number, r in here)
        freed = ((r.freed, number, -rounding(r.num_bytes)) for number, r in here if r.freed is not None)
        return iter(sorted([*made, *freed]))

    def peaks(self, rounding: Rounding = exactly, place: Place = "device") -> dict[tuple[str, str], Moment]:
        """The fullest moment of every (phase, part), with what was held when it began."""
        found: dict[tuple[str, str], Moment] = {}
        for key, (_, held) in self._highest(rounding, place).items():
            parts = {category: held[category] for category in CATEGORIES if held[category]}
            found[key] = Moment(phase=key[0], num_bytes=sum(parts.values()), parts=parts)
        return found

    def _highest(
        self, rounding: Rounding, place: Place
    ) -> dict[tuple[str, str], tuple[int, Counter[Category]]]:
        highest: dict[tuple[str, str], tuple[int, Counter[Category]]] = {}
        held: Counter[Category] = Counter()
        key, live = ("load", ""), 0
        # At the same moment the step is in its phase first (number -1), and allocates then.
        marks = [(mark.at, -1, count) for count, mark in enumerate(self.marks)]
        for _, number, size in sorted([*marks, *self.events(rounding, place)]):
            if number < 0:
                key = self.marks[size].phase, self.marks[size].part
            else:
                live += size
                held[self.records[number].category] += size
            if live > 0 and (key not in highest or live > highest[key][0]):
                highest[key] = live, held.copy()
        return highest

    def peak(self, rounding: Rounding = exactly) -> Moment:
        """The fullest moment of all. Raises ValueError when nothing was allocated."""
        return max(self.peaks(rounding).values(), key=lambda moment: moment.num_bytes)

    def largest(self, rounding: Rounding = exactly, count: int = 10) -> list[tuple[int, str, int]]:
        """What took most at the fullest moment, as (bytes, category and maker, how many)."""
        time = self._time_of_peak(rounding)
        sizes: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for r in self.records:
            if r.made <= time and (r.freed is None or r.freed > time):
                label = f"{r.category}: {r.maker}"
                sizes[label] += rounding(r.num_bytes)
                numbers[label] += 1
        return [(size, label, numbers[label]) for label, size in sizes.most_common(count)]

    def _time_of_peak(self, rounding: Rounding) -> int:
        live = highest = at = 0
        for time, _, num_bytes in self.events(rounding):
            live += num_bytes
            if live > highest:
                highest, at = live, time
        return at

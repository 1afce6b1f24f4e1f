"""The cheapest change of a recipe that makes it fit: a search over `plan.changes`, memory being asked for as
seldom as possible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.units import bytes_text
from tunesmith.plan.changes import Option, applied, axes, layouts, methods, value_of
from tunesmith.recipe.schema import Recipe

Place = tuple[int, ...]
STATES, LENGTH = 2, 4  # places of `plan.changes.states` and `lengths` among the axes
# What `train.memory` says of the settings that are "auto".
OF_MEMORY = (
    "train.precision", "train.optimizer", "train.stochastic_rounding", "train.optimizer_in_backward",
    "train.gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a recipe shall fit.

    capacity_bytes: of one device, what others hold left out; gpus: devices that may be used; resolve: the
    recipe without "auto", raising UserError for settings that cannot work together; need: the bytes that a
    resolved recipe takes of one device, margin included; floor: bytes that it takes at least, known at once;
    speed: tokens per second of a resolved recipe; rows_lost: how many rows are longer than a length.
    """

    capacity_bytes: int
    resolve: Callable[[Recipe], Recipe]
    need: Callable[[Recipe], int]
    floor: Callable[[Recipe], int] = lambda resolved: 0
    gpus: int = 1
    speed: Callable[[Recipe], float] | None = None
    rows_lost: Callable[[int], int] | None = None


@dataclass(frozen=True)
class Fix:
    """Changes of a recipe, {key: (value before, value after)}, and what it needs then.

    slower: time over that of the recipe as it was (below 1: faster); notes: what the changes touch.
    """

    changes: dict[str, tuple[Any, Any]]
    needed_bytes: int
    slower: float
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        return {key: after for key, (_, after) in self.changes.items()}

    @property
    def set_arguments(self) -> list[str]:
        """What `--set` takes to lay the changes over the recipe."""
        return [f"{key}={plain(value)}" for key, value in self.settings.items()]

    def diff(self) -> str:
        """The changes as a difference of the recipe's file, section by section."""
        lines: list[str] = []
        for section in dict.fromkeys(key.split(".")[0] for key in self.changes):
            lines.append(f"  {section}:")
            for key, (before, after) in self.changes.items():
                if key.startswith(f"{section}."):
                    name = key.partition(".")[2]
                    lines += [f"-   {name}: {plain(before)}", f"+   {name}: {plain(after)}"]
        return "\n".join(lines)

    def text(self) -> str:
        """One sentence: the changes, the need and the price."""
        slower = round(100 * (self.slower - 1))
        time = f"about {slower}% slower" if slower > 0 else "no slower"
        return f"{', '.join(self.set_arguments)}: needs {bytes_text(self.needed_bytes)}, {time}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "changes": {key: list(pair) for key, pair in self.changes.items()},
            "set": self.set_arguments,
            "diff": self.diff(),
            "needed_bytes": self.needed_bytes,
            "slower": round(self.slower, 3),
            "notes": list(self.notes),
        }


def plain(value: Any) -> str:
    """A value as YAML reads it back, on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def cheapest_fix(recipe: Recipe, target: Target) -> Fix | None:
    """The cheapest change, or combination of changes, with which `recipe` fits `target`; None without one.

    recipe: as written, with its "auto"s. A fix without changes is returned for a recipe that fits. Candidates
    are tried from the cheapest on. What does not fit rules out all that saves less on every axis, and the
    most saving candidate of a family is tried first, so that a family that cannot fit costs one plan.
    """
    search = _Search(recipe, target)
    for candidate in search.candidates():
        if search.fits(candidate):
            return search.fix(candidate)
    return None


def most_saving(recipe: Recipe, target: Target) -> Fix:
    """What needs least without shorter rows and with as many devices as there are, whether it fits or not.

    Raises UserError when `recipe` itself cannot work.
    """
    search = _Search(recipe, target)
    corners = [corner for family in search.families for corner in family.corners(length=0)]
    best = min(corners, key=lambda corner: search.floor_of(corner))
    least = search.need_of(best)
    assert least is not None
    rivals = [corner for corner in corners if search.floor_of(corner) < least]
    return search.fix(min(rivals, key=lambda corner: search.need_of(corner) or math.inf))


@dataclass(frozen=True)
class Need:
    """What so many packs at once take. parts: bytes of each part of the step, each of which is about a
    straight line over the number of packs; fixed: those of them that do not depend on it, as far as is known;
    num_bytes: in all, which goes as the highest of the parts."""

    num_bytes: int
    parts: Mapping[str, int]
    fixed: Mapping[str, int]


def largest(need: Callable[[int], Need], room: int, most: int = 64) -> int:
    """The largest number up to `most` whose need is at most `room`, 0 if there is none, asking seldom.

    Both it and the number after it have been asked for, unless it is `most`: lines through what is known only
    say where to ask.
    """
    known: dict[int, Need] = {}
    low, high, at = 0, most + 1, 1
    while high - low > 1:
        known[at] = need(at)
        if known[at].num_bytes <= room:
            low = at
        else:
            high = at
        if at == 1:
            known[0] = Need(0, known[1].fixed, known[1].fixed)
        at = min(high - 1, max(low + 1, _last_below(known, at, room, most)))
    return low


def _last_below(known: Mapping[int, Need], at: int, room: int, most: int) -> int:
    """The last number whose need should be at most `room`, by lines through the two largest known numbers
    that are shifted to what is known of the number `at`."""
    one, two = sorted(known)[-2:]

    def line(number: int) -> float:
        before, after = known[one].parts, known[two].parts
        share = (number - one) / (two - one)
        return max(before.get(part, 0) + share * (top - before.get(part, 0)) for part, top in after.items())

    rise = line(two) - line(one)
    scale = (known[two].num_bytes - known[one].num_bytes) / rise if rise > 0 and one > 0 else 1.0
    limit = line(at) + (room - known[at].num_bytes) / max(scale, 1.0)
    return max((number for number in range(1, most + 1) if line(number) <= limit), default=1)


@dataclass
class _Family:
    """Candidates of one method and layout. failed: places that are known not to fit."""

    options: tuple[Option, ...]
    axes: list[list[Option]]
    failed: list[Place] = field(default_factory=list)

    def candidates(self) -> Iterator[_Candidate]:
        for place in product(*(range(len(axis)) for axis in self.axes)):
            yield _Candidate(self, place)

    def corner(self, state: int, length: int) -> _Candidate:
        """The most saving candidate with these options on the axes of states and of lengths."""
        place = [len(axis) - 1 for axis in self.axes]
        place[STATES], place[LENGTH] = state, length
        return _Candidate(self, tuple(place))

    def corners(self, length: int) -> list[_Candidate]:
        """From the most saving one on: some states cannot work at the ends of the other axes."""
        return [self.corner(state, length) for state in range(len(self.axes[STATES]) - 1, -1, -1)]

    def is_ruled_out(self, place: Place) -> bool:
        return any(all(a <= b for a, b in zip(place, worse, strict=True)) for worse in self.failed)


@dataclass(frozen=True)
class _Candidate:
    """One option on every axis of a family, by its place there."""

    family: _Family
    place: Place

    @property
    def options(self) -> list[Option]:
        chosen = [axis[at] for axis, at in zip(self.family.axes, self.place, strict=True)]
        return [*self.family.options, *chosen]

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for option in self.options for key, value in option.settings.items()}

    @property
    def cost(self) -> float:
        return sum(option.cost for option in self.options)


class _Search:
    """The candidates of a recipe, and the memory plans that were made of them, each once."""

    def __init__(self, recipe: Recipe, target: Target) -> None:
        self.recipe, self.target = recipe, target
        self.resolved = target.resolve(recipe)
        self.families = list(self._families())
        self._needs: dict[str, int] = {}

    def _families(self) -> Iterator[_Family]:
        kinds = methods(self.recipe, self.resolved), layouts(self.resolved, self.target.gpus)
        for options in product(*kinds):
            settings = {key: value for option in options for key, value in option.settings.items()}
            resolved = self._resolved(settings)
            if resolved is not None:
                yield _Family(options, axes(applied(self.recipe, settings), resolved))

    def candidates(self) -> list[_Candidate]:
        """All, from the cheapest on."""
        found = [candidate for family in self.families for candidate in family.candidates()]
        return sorted(found, key=lambda candidate: candidate.cost)

    def fits(self, candidate: _Candidate) -> bool:
        """Whether it fits; unless it is the recipe itself, more saving ones are asked for before it."""
        fitting = False
        for probe in (*(self._probes(candidate) if candidate.settings else []), candidate):
            if candidate.family.is_ruled_out(candidate.place):
                return False
            fitting = self._fits(probe)
        return fitting

    def _probes(self, candidate: _Candidate) -> Iterator[_Candidate]:
        """The most saving of its family, of its length, and of its states."""
        family, length = candidate.family, candidate.place[LENGTH]
        for end in (len(family.axes[LENGTH]) - 1, length) if length else (0,):
            possible = (corner for corner in family.corners(end) if self._resolved(corner.settings))
            yield next(possible, candidate)
        yield family.corner(candidate.place[STATES], length)

    def _fits(self, candidate: _Candidate) -> bool:
        resolved = self._resolved(candidate.settings)
        if resolved is None:
            return False
        room = self.target.capacity_bytes
        fitting = self.target.floor(resolved) <= room and self._need(resolved) <= room
        if not fitting:
            candidate.family.failed.append(candidate.place)
        return fitting

    def need_of(self, candidate: _Candidate) -> int | None:
        """Bytes; None for settings that cannot work together."""
        resolved = self._resolved(candidate.settings)
        return None if resolved is None else self._need(resolved)

    def floor_of(self, candidate: _Candidate) -> float:
        """Bytes that it needs at least; infinite for settings that cannot work together."""
        resolved = self._resolved(candidate.settings)
        return math.inf if resolved is None else self.target.floor(resolved)

    def _need(self, resolved: Recipe) -> int:
        key = resolved.model_dump_json()
        if key not in self._needs:
            self._needs[key] = self.target.need(resolved)
        return self._needs[key]

    def _resolved(self, settings: Mapping[str, Any]) -> Recipe | None:
        try:
            return self.target.resolve(applied(self.recipe, settings))
        except UserError:
            return None

    # -- what is told of a candidate --------------------------------------------------------------------

    def fix(self, candidate: _Candidate) -> Fix:
        need = self.need_of(candidate)
        assert need is not None
        return Fix(
            {key: (self._before(key), value) for key, value in self._told(candidate.settings).items()},
            need,
            self._slower(candidate),
            tuple(self._notes(candidate)),
        )

    def _before(self, key: str) -> Any:
        """As written, or as resolved where "auto" is written."""
        written = value_of(self.recipe, key)
        return value_of(self.resolved, key) if written == "auto" else written

    def _told(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The fewest settings that come to the same: without those that are so already, and with
        `train.memory` in place of what it stands for."""
        plainer = {key: value for key, value in settings.items() if self._before(key) != value}
        others = {key: value for key, value in plainer.items() if key not in OF_MEMORY}
        forms = [others | {"train.memory": memory} for memory in ("low", "smallest")]
        whole = _but_memory(self._resolved(settings))
        same = [form for form in (plainer, *forms) if _but_memory(self._resolved(form)) == whole]
        return min([*same, settings], key=len)

    def _slower(self, candidate: _Candidate) -> float:
        speed = self.target.speed
        if speed is None:
            return math.prod(option.slower for option in candidate.options)
        return speed(self.resolved) / speed(self.target.resolve(applied(self.recipe, candidate.settings)))

    def _notes(self, candidate: _Candidate) -> Iterator[str]:
        lost = self.target.rows_lost
        for option in candidate.options:
            shorter = option.settings.get("data.max_length")
            if shorter is not None and lost is not None:
                yield f"{lost(shorter):,} rows are longer than {shorter} tokens (data.too_long)"
            elif option.note:
                yield option.note


def _but_memory(recipe: Recipe | None) -> Recipe | None:
    return recipe if recipe is None else applied(recipe, {"train.memory": "normal"})

"""What `method.type: auto` and `train.micro_batch_size: auto` come to: the best method that fits, then as
many packs at once as still make it faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.units import bytes_text
from tunesmith.plan.changes import applied, value_of
from tunesmith.plan.fit import Target, plain
from tunesmith.recipe.schema import Recipe

KINDS = ("full", "lora", "qlora")
# A micro-batch that is not faster by so much is not worth its memory.
FASTER = 1.03
# Where nobody says how many packs a step has.
MOST_PACKS = 16
# Tokens of a pass that keep a device busy, where no speed is known.
ENOUGH_TOKENS = 4096
# Keys whose values are chosen here, and kept when a run goes on.
CHOSEN = (
    "method.type", "train.micro_batch_size", "train.grad_accumulation", "train.gradient_checkpointing",
    "train.activation_offload",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A choice that was looked at: its settings, the bytes it needs (at least, where it does not fit), and
    tokens per second where speeds were compared."""

    settings: Mapping[str, Any]
    needed_bytes: int
    fits: bool
    tokens_per_s: float | None = None

    def text(self) -> str:
        settings = ", ".join(f"{key}={plain(value)}" for key, value in self.settings.items())
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.0f} tokens/s"
        least = "" if self.fits else "at least "
        return f"{settings} needs {least}{bytes_text(self.needed_bytes)}{speed}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
            "tokens_per_s": self.tokens_per_s,
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """recipe: with values for the two settings, all else as written; tried: what was looked at, in order;
    reasons: why it is so, one sentence for each setting."""

    recipe: Recipe
    tried: tuple[Tried, ...] = ()
    reasons: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"reasons": list(self.reasons), "tried": [one.as_dict() for one in self.tried]}


def has_auto(recipe: Recipe) -> bool:
    """Whether a setting of the recipe is left to the plan."""
    return recipe.method.type == "auto" or recipe.train.micro_batch_size == "auto"


def choose(recipe: Recipe, target: Target) -> Choice:
    """The recipe with values for method.type and train.micro_batch_size, where they are "auto".

    Methods are tried in the order full, lora, qlora, each as the recipe stands and, where
    gradient_checkpointing is "auto", with activations computed again; last with those in host memory. The
    first that fits is taken; settings of the recipe that are of one method alone leave the others out. When
    nothing fits, it is what needs least, and the plan will refuse it. Raises UserError when the recipe's
    other settings leave no method.
    """
    tried: list[Tried] = []
    reasons: list[str] = []
    kind, size = recipe.method.type, recipe.train.micro_batch_size
    if kind == "auto":
        recipe = _method(recipe, target, tried)
        reasons.append(_method_reason(recipe, tried, target.capacity_bytes))
    if size == "auto":
        count = len(tried)
        recipe = _size(recipe, target, tried)
        reasons.append(_size_reason(recipe, tried[count:]))
    return Choice(recipe=recipe, tried=tuple(tried), reasons=tuple(reasons))


def kept(recipe: Recipe, earlier: Recipe) -> Recipe:
    """The recipe with what was chosen for a run when it began. earlier: its resolved recipe."""
    if not has_auto(recipe):
        return recipe
    auto_kind = recipe.method.type == "auto"
    settings = {
        key: value_of(earlier, key)
        for key in CHOSEN
        if value_of(recipe, key) == "auto" or _is_chosen(recipe, key, auto_kind)
    }
    return applied(recipe, settings)


def _is_chosen(recipe: Recipe, key: str, auto_kind: bool) -> bool:
    """Whether a key without an "auto" of its own was chosen together with one that has."""
    if key == "train.grad_accumulation":
        return recipe.train.micro_batch_size == "auto"
    return auto_kind and not _is_given(recipe, key)


def _is_given(recipe: Recipe, key: str) -> bool:
    section, _, name = key.partition(".")
    return section in recipe.model_fields_set and name in getattr(recipe, section).model_fields_set


# -- the method ---------------------------------------------------------------------------------------------


def _method(recipe: Recipe, target: Target, tried: list[Tried]) -> Recipe:
    faults: list[UserError] = []
    for settings in _ladder(recipe):
        try:
            tried.append(_try(applied(recipe, settings), settings, target))
        except UserError as error:
            faults.append(error)
            continue
        if tried[-1].fits:
            break
    if not tried:
        raise faults[0]
    return applied(recipe, _best(tried).settings)


def _best(tried: list[Tried]) -> Tried:
    return tried[-1] if tried[-1].fits else min(tried, key=lambda one: one.needed_bytes)


def _ladder(recipe: Recipe) -> Iterator[dict[str, Any]]:
    again = recipe.train.gradient_checkpointing == "auto"
    kinds: list[dict[str, Any]] = [{"method.type": kind} for kind in KINDS]
    for settings in kinds:
        yield settings
        if again:
            yield settings | {"train.gradient_checkpointing": "full"}
    most = {"train.gradient_checkpointing": "full"} if again else {}
    if recipe.hardware.device != "cpu":
        yield {"method.type": "qlora"} | most | {"train.activation_offload": True}


def _try(candidate: Recipe, settings: Mapping[str, Any], target: Target) -> Tried:
    """With one pack at a time, where that is open."""
    packs = {"train.micro_batch_size": 1} if candidate.train.micro_batch_size == "auto" else {}
    resolved, room = target.resolve(applied(candidate, packs)), target.capacity_bytes
    floor = target.floor(resolved)
    need = floor if floor > room else target.need(resolved)
    return Tried(settings=settings, needed_bytes=need, fits=need <= room)


def _method_reason(recipe: Recipe, tried: list[Tried], capacity: int) -> str:
    best, room = _best(tried), bytes_text(capacity)
    others = "".join(f"; {one.text()}" for one in tried if one is not best)
    head = f"method.type: {recipe.method.type}: "
    if not best.fits:
        return f"{head}no method fits {room}; least: {best.text()}{others}"
    return f"{head}{best.text()} of {room}{others}"


# -- packs at once ------------------------------------------------------------------------------------------


def _size(recipe: Recipe, target: Target, tried: list[Tried]) -> Recipe:
    best, fastest = {"train.micro_batch_size": 1}, 0.0
    for settings in _sizes(recipe):
        resolved = target.resolve(applied(recipe, settings))
        if settings["train.micro_batch_size"] > 1 and target.speed is None and _is_enough(resolved):
            break
        one = _timed(resolved, settings, target)
        tried.append(one)
        speed = one.tokens_per_s
        if not one.fits or (speed is not None and speed < fastest * FASTER):
            break
        best, fastest = settings, speed or 0.0
    return applied(recipe, best)


def _timed(resolved: Recipe, settings: Mapping[str, Any], target: Target) -> Tried:
    need = target.need(resolved)
    fits = need <= target.capacity_bytes
    speed = target.speed(resolved) if fits and target.speed is not None else None
    return Tried(settings=settings, needed_bytes=need, fits=fits, tokens_per_s=speed)


def _is_enough(resolved: Recipe) -> bool:
    """Whether half of the packs at once would keep the device busy."""
    size, length = resolved.train.micro_batch_size, resolved.data.max_length
    assert size != "auto" and length != "auto"
    return size * length // 2 >= ENOUGH_TOKENS


def _sizes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """1, 2, 4 … packs at once that a step's packs can be divided by."""
    given = _is_given(recipe, "train.grad_accumulation")
    packs = recipe.train.grad_accumulation if given else MOST_PACKS
    size = 1
    while size <= packs and packs % size == 0:
        steps = {"train.grad_accumulation": packs // size} if given else {}
        yield {"train.micro_batch_size": size} | steps
        size *= 2


def _size_reason(recipe: Recipe, tried: list[Tried]) -> str:
    size, last = recipe.train.micro_batch_size, tried[-1]
    number = last.settings["train.micro_batch_size"]
    if not last.fits:
        why = f"{number} would need {bytes_text(last.needed_bytes)}"
    elif number != size:
        why = f"{number} would not be {FASTER - 1:.0%} faster"
    else:
        why = "more would not be faster, or a step has no more"
    return f"train.micro_batch_size: {size} x grad_accumulation {recipe.train.grad_accumulation}: {why}"

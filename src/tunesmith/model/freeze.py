"""Layers that a full fine-tune leaves as they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from tunesmith.core.errors import UserError


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Take the parameters whose dotted names match one of `patterns` (* for any part) out of the training.

    A weight that two modules share is frozen when either's name matches. Returns the number of weights
    frozen. Raises UserError for a pattern that matches nothing, and when nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    names = [name for name, _ in named]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise _no_match(pattern, names)
    frozen = {p for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "method.freeze: the patterns match every weight of the model, so nothing is left to train",
            hint="freeze a part of it, such as 'model.embed_tokens.*' or 'model.layers.0.*'",
        )
    return sum(parameter.numel() for parameter in frozen)


def _no_match(pattern: str, names: list[str]) -> UserError:
    """Numbers of layers are left out of the list: every layer has the same names."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    near = difflib.get_close_matches(pattern, [*kinds, *names], n=1, cutoff=0.5)
    return UserError(
        f"method.freeze: no parameter of the model is named '{pattern}'",
        hint=(f"did you mean '{near[0]}'? " if near else "") + f"its parameters are: {', '.join(kinds)}",
    )

"""Which files of a repository are wanted: weights in one format, never a pickle unless asked."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tunesmith.core.errors import UserError
from tunesmith.hub.endpoint import Kind

WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
# Files beside the weights; code is stored but never run unless model.trust_remote_code is on.
BESIDE = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model", "*.py", "LICENSE*", "README.md")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Selection:
    """The user's wish. allow: patterns in place of the default choice; deny: patterns taken out of it.

    A pattern is matched against the whole path; `*` also matches "/", and "folder/" stands for all in it.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    allow_pickle: bool = False

    @property
    def key(self) -> str:
        """Text that is the same for the same wish."""
        return repr((sorted(self.allow), sorted(self.deny), self.allow_pickle))


def is_pickle(path: str) -> bool:
    return path.lower().endswith(PICKLES)


def select(name: str, kind: Kind, paths: Sequence[str], wish: Selection) -> list[str]:
    """The wanted ones of `paths`, in their order.

    Raises UserError where nothing remains, or a model has no weights that may be brought: before gigabytes
    come, not after.
    """
    wanted = (
        [path for path in paths if _matches(path, wish.allow)] if wish.allow else _default(kind, paths, wish)
    )
    wanted = [path for path in wanted if not _matches(path, wish.deny)]
    kept = [path for path in wanted if wish.allow_pickle or not is_pickle(path)]
    if wish.allow:
        if wanted and not kept:
            raise _only_pickles(name, wanted[0])
        if paths and not kept:
            raise UserError(
                f"{name}: none of its {len(paths)} files matches {', '.join(wish.allow)}",
                hint=f"it holds {', '.join(sorted(paths)[:8])}{', …' if len(paths) > 8 else ''}",
            )
    elif kind == "model":
        _check_weights(name, paths, _default(kind, paths, wish))
    elif not kept:
        raise _only_pickles(name, wanted[0]) if wanted else UserError(f"{name}: holds no file")
    return kept


def _default(kind: Kind, paths: Sequence[str], wish: Selection) -> list[str]:
    if kind == "dataset":
        return list(paths)
    top = [path for path in paths if "/" not in path]  # exports for other programs lie in subfolders
    weights = [path for path in top if _matches(path, WEIGHTS)]
    if not weights and wish.allow_pickle:
        weights = [path for path in top if _matches(path, PICKLED_WEIGHTS)]
    return [path for path in top if path in weights or _matches(path, BESIDE)]


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, f"{p}*" if p.endswith("/") else p) for p in patterns)


def _check_weights(name: str, paths: Sequence[str], kept: Sequence[str]) -> None:
    if any(_matches(path, (*WEIGHTS, *PICKLED_WEIGHTS)) for path in kept):
        return
    ggufs = sorted(path for path in paths if path.endswith(".gguf"))
    if ggufs:
        raise UserError(
            f"{name}: holds GGUF files only",
            hint=f"bring one and give its path as model.path: tunesmith fetch {name} --allow '{ggufs[0]}'",
        )
    pickles = sorted(path for path in paths if is_pickle(path))
    if pickles:
        raise _only_pickles(name, pickles[0])
    raise UserError(f"{name}: holds no safetensors weights", hint="is it a model repository?")


def _only_pickles(name: str, example: str) -> UserError:
    return UserError(
        f"{name}: holds pickles only ({example}), which can run any code when loaded",
        hint="https://huggingface.co/spaces/safetensors/convert opens a pull request with safetensors: give "
        "its number as the revision: refs/pr/N; or, if you trust their maker, add --allow-pickle",
    )

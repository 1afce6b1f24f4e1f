"""What `tunesmith serve` is asked to do: the recipe's section `serve`, with the command line over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.core.store_cache import fetch, local_path
from tunesmith.recipe.load import check_serve, load_recipe
from tunesmith.recipe.serving import NO_KEYS_FILE, Serve
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.keys import Key, default_keys_file, read_keys
from tunesmith.workflows.engine_wants import EngineWants
from tunesmith.workflows.http_server import is_loopback
from tunesmith.workflows.run_facts import run_folder, run_recipe, run_url
from tunesmith.workflows.served_models import run_of

MIB = 1024**2
RECIPE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What the caller says.

    settings: of the recipe's section `serve`, by name, in place of those there. adapters: NAME=FOLDER in
    place of the recipe's, or a bare FOLDER in place of the run's own. allow_open: other machines may ask
    without a key.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    adapters: Sequence[str] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Literal["auto"] = "auto"
    allow_open: bool = False


@dataclass(frozen=True)
class Deployment:
    """A model or run (`path`), an adapter in place of its own, and how both are put behind the API.

    keys_file: the file that is gone by, with the keys in it; None: there is none.
    """

    path: str
    adapter: str | None
    settings: Serve
    keys_file: Path | None
    keys: Sequence[Key] = ()

    @property
    def bounds(self) -> Bounds:
        return Bounds(
            max_body_bytes=int(self.settings.max_body_mib * MIB),
            request_timeout_s=self.settings.request_timeout_s,
            max_requests=self.settings.max_requests,
        )

    @property
    def keys_text(self) -> str | None:
        """What the file of keys means for those who ask; None without one."""
        if self.keys_file is None:
            return None
        count, expired = len(self.keys), sum(key.expired() for key in self.keys)
        text = f"asks for an API key: {self.keys_file} has {count}"
        text += f", {expired} of them expired" if expired else ""
        return text if self.settings.keys_file else f"{text}  (--keys-file {NO_KEYS_FILE}: asks for none)"


def deployment(path: str, options: ServeOptions) -> Deployment:
    """For a model, a run, or the recipe of a run that is trained.

    Raises UserError for settings that cannot be (RecipeErrors with all of them), for a file of keys that
    cannot be read, and for an address that other machines reach when nothing is asked of them.
    """
    path, base = _recipe_of(path)
    adapter, named = split_adapters(options.adapters)
    adapter, named = adapter and local_path(adapter), {name: local_path(at) for name, at in named.items()}
    given = dict(options.settings) | ({"adapters": named} if named else {})
    # Two words for one thing: what the caller says of one goes over what the recipe says of the other.
    if "weights" in given:
        given.setdefault("precision", "auto")
    elif "precision" in given:
        given["weights"] = None
    settings = check_serve(base, given)
    file, keys = _keys(settings)
    if not (settings.api_key or file or options.allow_open or is_loopback(settings.host)):
        raise UserError(
            f"--host {settings.host}: without an API key anyone who reaches this machine could use the model",
            hint="'tunesmith keys add NAME' makes one; or give --api-key (or $TUNESMITH_API_KEY), or "
            "--allow-open when that is what you want",
        )
    return Deployment(path, adapter, settings, file, keys)


def _recipe_of(path: str) -> tuple[str, Serve]:
    """What is served, and the section of its recipe; the defaults for a model that is no run."""
    path = local_path(path)
    given = Path(path).expanduser()
    if given.suffix in RECIPE_ENDINGS and given.is_file():
        recipe = load_recipe(given)
        url = run_url(recipe, given)
        run = RunFolder(fetch(url)) if url else run_folder(recipe, given)
        if not is_run(run.path):
            raise UserError(f"{path}: its run {run.path} is not there", hint=f"tunesmith train {path}")
        return str(run.path), recipe.serve
    if not is_run(given):
        return path, Serve()
    run = RunFolder(given)
    key = load_recipe(run.recipe).serve.api_key  # the resolved recipe has no secrets
    return path, run_recipe(run).serve.model_copy(update={"api_key": key})


def _keys(settings: Serve) -> tuple[Path | None, Sequence[Key]]:
    """The file that is named, or else the user's own where it has keys; and the keys in it."""
    if settings.keys_file == NO_KEYS_FILE:
        return None, ()
    if settings.keys_file:
        file = Path(settings.keys_file).expanduser()
        return file, read_keys(file)
    own = default_keys_file()
    # A folder that this user may not enter is none of theirs: os.path.exists says no, Path.exists raises.
    if not os.path.exists(own):  # noqa: PTH110
        return None, ()
    try:
        keys = read_keys(own)
    except UserError as error:
        hint = f"{error.hint}; --keys-file {NO_KEYS_FILE} serves without it"
        raise UserError(error.what, hint=hint) from None
    return (own, keys) if keys else (None, ())


def split_adapters(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The bare folder, if there is one, and those with a name. Raises UserError for two that clash."""
    own: str | None = None
    named: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        # A path may hold an equals sign; a name holds no slash.
        if not equals or "/" in name:
            if own is not None:
                raise UserError(
                    f"--adapter {text}: there is one already, {own}",
                    hint="give each further adapter a name: --adapter NAME=FOLDER",
                )
            own = text
        elif not name or not folder or name in named:
            fault = "the name is given twice" if name in named else "is not NAME=FOLDER"
            raise UserError(f"--adapter {text}: {fault}", hint="such as --adapter orders=runs/orders")
        else:
            named[name] = folder
    return own, named


def engine_wants(wanted: Deployment, options: ServeOptions) -> EngineWants:
    """What an engine of this deployment loads and how it computes."""
    settings, own = wanted.settings, wanted.adapter
    name = settings.model_name
    if own is not None and name is None:
        run = run_of(own)
        name = (run.path if run else Path(own).expanduser().absolute()).name
    return EngineWants(
        path=wanted.path,
        model_name=name,
        adapter=own,
        adapters=settings.adapters,
        merge=settings.merge,
        precision=settings.precision,
        weights=settings.weights,
        device=options.device,
        threads=options.threads,
        max_length=settings.max_length,
        max_concurrent=settings.max_concurrent,
        max_waiting=settings.max_waiting,
        cache_tokens=settings.cache_tokens,
    )

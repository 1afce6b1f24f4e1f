"""What the API serves: an engine, and the models that clients may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.serve.engine import Engine
from tunesmith.serve.errors import ApiError, shown
from tunesmith.serve.jobs import ServedModel


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter found on this machine: how clients see it, and the folder that the engine loads."""

    model: ServedModel
    folder: Path


OpenAdapter = Callable[[str, str], OpenedAdapter]
"""From (name, path of an adapter or run folder) to what it is. Blocks; raises UserError with the reason."""


@dataclass
class Gateway:
    """Models by name, the first of them the default. Without any it is still loading.

    open_adapter: how adapters are found that are loaded while serving; None: none can be.
    """

    engine: Engine | None = None
    models: dict[str, ServedModel] = field(default_factory=dict)
    open_adapter: OpenAdapter | None = None

    @property
    def default(self) -> ServedModel:
        self.ready_engine()
        return next(iter(self.models.values()))

    def ready_engine(self) -> Engine:
        """Raises ApiError while the model is loading."""
        if self.engine is None or not self.models:
            raise ApiError("the model is still loading", status=503, code="model_loading")
        return self.engine

    def find(self, name: str | None, is_told: Callable[[str], bool] = lambda _: True) -> ServedModel:
        """The model of that name, or the default for None. Raises ApiError for one that is not served.

        is_told: the names that an error may tell the client.
        """
        if name is None:
            return self.default
        self.ready_engine()
        if name not in self.models:
            served = ", ".join(f"'{known}'" for known in self.models if is_told(known))
            raise ApiError(
                f"the model {shown(name)} does not exist; this server has {served}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self.models[name]

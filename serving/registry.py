"""The models that are served: found by name and version, loaded, replaced and unloaded without a restart.

A request *leases* its model for as long as it lasts. Replacing or unloading a model only changes which model the next
request finds; the old one answers those that hold it, and is freed when the last of them is done. So no request ever
sees two models.

All methods run on the event loop, so there are no locks around what is served; only loading leaves it, for one thread,
one model at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from perturbscope.errors import InvalidParameterError, PerturbScopeError, UnknownModelError
from perturbscope.wire.messages import ModelInfo
from serving.models import ServedModel
from serving.settings import Settings

Load = Callable[[Path, Settings], ServedModel]
"""Opens, warms up and proves one bundle; called on a thread."""


@dataclass(eq=False)
class _Entry:
    """A model, and who uses it."""

    model: ServedModel
    leases: int = 0
    retired: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the model is retired and nobody holds it."""

    def release(self) -> None:
        self.leases -= 1
        self.settle()

    def settle(self) -> None:
        if self.retired and not self.leases:
            self.idle.set()


class ModelRegistry:
    """What is served, in order: the first model is the default, and of one name the first listed version is.

    Parameters
    ----------
    settings
        What is to be served, and the limits.
    models
        What is served from the start.
    load
        How a bundle becomes a model.
    """

    def __init__(
        self, settings: Settings, models: Iterable[ServedModel] = (), *, load: Load = ServedModel.load
    ) -> None:
        self._settings = settings
        self._load = load
        self._entries: list[_Entry] = []
        self._draining: set[asyncio.Task[None]] = set()
        for model in models:
            self._add(model)

    @classmethod
    def open(cls, settings: Settings) -> ModelRegistry:
        """Load every bundle of the settings. Raises as :meth:`ServedModel.load`."""
        return cls(settings, [ServedModel.load(path, settings) for path in settings.bundles])

    def infos(self) -> tuple[ModelInfo, ...]:
        """What is served; the first is the default."""
        return tuple(entry.model.info for entry in self._entries)

    def served(self) -> tuple[ServedModel, ...]:
        """The models, to look at; whoever sends them cells must lease one."""
        return tuple(entry.model for entry in self._entries)

    @property
    def default(self) -> ServedModel:
        """What answers a request that names no model. Raises UnknownModelError."""
        return self._find(None, None).model

    @contextlib.contextmanager
    def lease(self, name: str | None = None, version: str | None = None) -> Iterator[ServedModel]:
        """A model for the length of a request; it lives until it is given back, whatever is unloaded meanwhile.

        Parameters
        ----------
        name
            Name, ``name@version`` or id of the model; None: the default.
        version
            Of the model; None: the first listed of that name.

        Raises
        ------
        UnknownModelError
            There is no such model.
        """
        entry = self._find(name, version)
        entry.leases += 1
        try:
            yield entry.model
        finally:
            entry.release()

    async def ready(self) -> bool:
        """Whether every model answers. One that failed last is tried again, so that it can recover."""
        if not self._entries:
            return False
        for entry in tuple(self._entries):
            if entry.model.verified:
                continue
            with self._held(entry):
                try:
                    await entry.model.check()
                except PerturbScopeError:
                    return False
        return True

    async def close(self) -> None:
        """Finish what was accepted, and free all models."""
        await asyncio.gather(*(entry.model.close() for entry in self._entries))

    @contextlib.contextmanager
    def _held(self, entry: _Entry) -> Iterator[None]:
        entry.leases += 1
        try:
            yield
        finally:
            entry.release()

    def _find(self, name: str | None, version: str | None) -> _Entry:
        for entry in self._entries:
            if _is_called(entry.model.info, name, version):
                return entry
        wanted = "model" if name is None else f"model {name!r}"
        served = ", ".join(dict.fromkeys(_spelled(info, self.infos()) for info in self.infos()))
        raise UnknownModelError(
            f"No {wanted}{f' of version {version!r}' if version else ''} is served here; "
            + (f"there is {served}. Leave the model out to use the first." if served else "no model is loaded."),
            field="model",
        )

    def _add(self, model: ServedModel) -> None:
        taken = [info for info in self.infos() if (info.name, info.version) == (model.info.name, model.info.version)]
        if taken:
            raise InvalidParameterError(
                f"Two bundles hold version {model.info.version} of the model {model.info.name!r}. "
                "Export one of them under another version or name.",
                field="bundle",
            )
        self._entries.append(_Entry(model))


def _is_called(info: ModelInfo, name: str | None, version: str | None) -> bool:
    """Whether a request for `name` and `version` means this model."""
    if name is not None and name not in (info.name, f"{info.name}@{info.version}", info.model_id):
        return False
    return version is None or version == info.version


def _spelled(info: ModelInfo, served: tuple[ModelInfo, ...]) -> str:
    """The shortest name that means this model alone."""
    alone = sum(other.name == info.name for other in served) == 1
    return info.name if alone else f"{info.name}@{info.version}"

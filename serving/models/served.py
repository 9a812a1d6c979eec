"""The models that are served now: found by name and version, leased to requests, replaced and freed.

A request *leases* its model for as long as it lasts. Replacing or unloading a model only changes which model the next
request finds; the old one answers the requests that hold it, and is freed when the last of them is done. So no request
ever sees two models.

All methods run on the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from perturbscope.errors import InvalidParameterError, UnknownModelError
from perturbscope.protocol.messages import ModelInfo
from serving.models.loading import ServedModel
from serving.models.repository import Snapshot
from serving.telemetry import log


@dataclass(eq=False)
class Entry:
    """A model, the folder that it is from, and the requests that use it.

    Attributes
    ----------
    model
        The model.
    folder
        Name of its folder; empty for a model that is from none.
    snapshot
        State of the folder when it was read.
    n_bytes
        Estimated bytes of memory of the model.
    leases
        Number of requests that use it.
    """

    model: ServedModel
    folder: str = ""
    snapshot: Snapshot | None = None
    n_bytes: int = 0
    leases: int = 0
    _retired: bool = False
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def version(self) -> str:
        """Version of the model."""
        return self.model.info.version

    @contextlib.contextmanager
    def lease(self) -> Iterator[ServedModel]:
        """Lease the model: it is not freed before the context ends."""
        self.leases += 1
        try:
            yield self.model
        finally:
            self.leases -= 1
            self._settle()

    async def idle(self) -> None:
        """Wait until no request holds the model, which no new request can find any more."""
        self._retired = True
        self._settle()
        await self._idle.wait()

    def abandon(self) -> None:
        """Let :meth:`idle` return, even while requests hold the model."""
        self._idle.set()

    def is_called(self, name: str | None, version: str | None) -> bool:
        """Whether a request for `name` and `version` means this model."""
        info = self.model.info
        if name is not None and name not in (info.name, f"{info.name}@{info.version}", info.model_id):
            return False
        return version is None or version == info.version

    def _settle(self) -> None:
        if self._retired and not self.leases:
            self._idle.set()


class ServedModels:
    """Models in order: the first is the default, and of one name the first listed version is."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._retired: dict[Entry, asyncio.Task[None]] = {}

    def lease(
        self, name: str | None = None, version: str | None = None
    ) -> contextlib.AbstractContextManager[ServedModel]:
        """Lease a model for the length of a request; it lives that long, even if it is unloaded meanwhile.

        Parameters
        ----------
        name
            Name, ``name@version`` or id of the model; None: the default.
        version
            Version of the model; None: the first listed of that name.

        Raises
        ------
        UnknownModelError
            There is no such model.
        """
        return self.find(name, version).lease()

    def infos(self) -> tuple[ModelInfo, ...]:
        """Descriptions of the models; the first is the default."""
        return tuple(entry.model.info for entry in self.entries)

    def models(self) -> tuple[ServedModel, ...]:
        """The models themselves, to look at; a request that uses one leases it."""
        return tuple(entry.model for entry in self.entries)

    def capable(self, capability: str) -> tuple[str, ...]:
        """Return the shortest names of the models that have a capability, the default first."""
        infos = self.infos()
        return tuple(_shortest_name(info, infos) for info in infos if capability in info.capabilities)

    @property
    def default(self) -> ServedModel:
        """The model that answers a request that names none. Raises UnknownModelError."""
        return self.find(None, None).model

    @property
    def model_bytes(self) -> int:
        """Estimated bytes of memory of all models; one that was replaced counts until its last request is done."""
        return sum(entry.n_bytes for entry in (*self.entries, *self._retired))

    def from_folder(self, folder: str) -> Entry | None:
        """The model that is served from a folder, if one is."""
        return next((entry for entry in self.entries if entry.folder == folder), None)

    def find(self, name: str | None, version: str | None) -> Entry:
        """Find a model by name, ``name@version`` or id; None: the default. Raises UnknownModelError."""
        for entry in self.entries:
            if entry.is_called(name, version):
                return entry
        wanted = "model" if name is None else f"model {name!r}"
        infos = self.infos()
        served = ", ".join(_shortest_name(info, infos) for info in infos)
        raise UnknownModelError(
            f"No {wanted}{f' of version {version!r}' if version else ''} is served here; "
            + (f"there is {served}. Leave the model out to use the first." if served else "no model is loaded."),
            field="model",
        )

    def put(self, new: Entry) -> None:
        """Serve a model from now on: in place of the one from the same folder, or as the last.

        It awaits nothing, so every request finds one of the two.

        Raises
        ------
        InvalidParameterError
            Another folder has this version of the model.
        """
        info = new.model.info
        old = self.from_folder(new.folder) if new.folder else None
        for entry in self.entries:
            if entry is not old and (entry.model.info.name, entry.version) == (info.name, info.version):
                raise InvalidParameterError(
                    f"Version {info.version} of the model {info.name!r} is served already, from another folder. "
                    "Unload that first, or export this bundle under another version or name.",
                    field="bundle",
                )
        if old is None:
            self.entries.append(new)
            return
        self.entries[self.entries.index(old)] = new
        log.event("model_replaced", old=old.model.info.model_id, new=info.model_id, requests_on_old=old.leases)
        self._retire(old)

    def remove(self, entry: Entry) -> None:
        """Stop serving a model; it is freed when no request holds it."""
        self.entries.remove(entry)
        log.event("model_unloaded", model=entry.model.info.model_id, requests_on_it=entry.leases)
        self._retire(entry)

    async def close(self) -> None:
        """Finish the requests that the models have accepted, and free all models. May be called twice."""
        await asyncio.gather(*(entry.model.close() for entry in (*self.entries, *self._retired)))
        for entry, task in tuple(self._retired.items()):
            entry.abandon()
            await task

    def _retire(self, entry: Entry) -> None:
        self._retired[entry] = asyncio.get_running_loop().create_task(self._drain(entry), name="perturbscope-drain")

    async def _drain(self, entry: Entry) -> None:
        try:
            await entry.idle()
            await entry.model.close()
            await asyncio.to_thread(_trim_memory)
            log.event("model_freed", model=entry.model.info.model_id)
        finally:
            del self._retired[entry]


def _trim_memory() -> None:
    """Give freed memory back to the system, if the C library can (glibc keeps it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _shortest_name(info: ModelInfo, served: Sequence[ModelInfo]) -> str:
    """The shortest name that means this model alone."""
    alone = sum(other.name == info.name for other in served) == 1
    return info.name if alone else f"{info.name}@{info.version}"

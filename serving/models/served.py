"""The models that are served now, who uses them, and the end of those that are not any more."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

from perturbscope.errors import InvalidParameterError, UnknownModelError
from perturbscope.protocol.messages import ModelInfo
from serving.models.loading import ServedModel
from serving.models.repository import Snapshot
from serving.telemetry import log


@dataclass(eq=False)
class Entry:
    """A model, where it is from, and who uses it.

    Attributes
    ----------
    model
        The model.
    folder
        Name of its folder; empty for one that is from none.
    snapshot
        How the folder looked when it was read.
    n_bytes
        Memory of the model, as estimated.
    leases
        Requests that use it.
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
        """Of the model."""
        return self.model.info.version

    @contextlib.contextmanager
    def held(self) -> Iterator[ServedModel]:
        """The model, which is not freed before it is given back."""
        self.leases += 1
        try:
            yield self.model
        finally:
            self.leases -= 1
            self._settle()

    async def idle(self) -> None:
        """Wait until nobody holds the model, which nobody finds any more."""
        self._retired = True
        self._settle()
        await self._idle.wait()

    def abandon(self) -> None:
        """Let :meth:`idle` return, whoever holds the model."""
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


class Shelf:
    """Models in order: the first is the default, and of one name the first listed version is."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._retired: dict[Entry, asyncio.Task[None]] = {}

    @property
    def n_bytes(self) -> int:
        """Memory of all models, as estimated; one that was taken off counts until it is freed."""
        return sum(entry.n_bytes for entry in (*self.entries, *self._retired))

    def from_folder(self, folder: str) -> Entry | None:
        """What is served from a folder."""
        return next((entry for entry in self.entries if entry.folder == folder), None)

    def find(self, name: str | None, version: str | None) -> Entry:
        """The model of a name, ``name@version`` or id; None: the default. Raises UnknownModelError."""
        for entry in self.entries:
            if entry.is_called(name, version):
                return entry
        wanted = "model" if name is None else f"model {name!r}"
        infos = [entry.model.info for entry in self.entries]
        served = ", ".join(_spelled(info, infos) for info in infos)
        raise UnknownModelError(
            f"No {wanted}{f' of version {version!r}' if version else ''} is served here; "
            + (f"there is {served}. Leave the model out to use the first." if served else "no model is loaded."),
            field="model",
        )

    def put(self, new: Entry) -> None:
        """Serve a model from now on: in place of the one from the same folder, or as the last.

        It awaits nothing, so no request finds neither of the two.

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

    def take_off(self, entry: Entry) -> None:
        """Serve a model no longer; it is freed when nobody holds it."""
        self.entries.remove(entry)
        log.event("model_unloaded", model=entry.model.info.model_id, requests_on_it=entry.leases)
        self._retire(entry)

    async def close(self) -> None:
        """Finish what the models have accepted, and free them all."""
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
            await asyncio.to_thread(_give_back)
            log.event("model_freed", model=entry.model.info.model_id)
        finally:
            del self._retired[entry]


def _give_back() -> None:
    """Hand freed memory back to the system, where the C library can (glibc's keeps it otherwise)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _spelled(info: ModelInfo, served: list[ModelInfo]) -> str:
    """The shortest name that means this model alone."""
    alone = sum(other.name == info.name for other in served) == 1
    return info.name if alone else f"{info.name}@{info.version}"

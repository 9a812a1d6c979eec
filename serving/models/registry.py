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
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from perturbscope.errors import (
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    UnknownModelError,
)
from perturbscope.protocol.messages import ModelInfo
from serving.models.folder_states import Folders, Listed
from serving.models.loading import ServedModel, estimate_bytes
from serving.models.repository import Repository, Snapshot
from serving.models.served import Entry, Shelf
from serving.settings import PREFIX, Settings
from serving.telemetry import log

Load = Callable[[Path, Settings], ServedModel]
"""Opens, warms up and proves one bundle; called on a thread."""
Estimate = Callable[[Path, Settings], int]
"""Memory of a model, before it is loaded."""
T = TypeVar("T")


class ModelRegistry:
    """What is served, in order: the first model is the default, and of one name the first listed version is.

    A model that is loaded from a folder that is served already takes the old one's place in the order; any other is
    listed last. So a new version beside an old one gets no traffic that does not name it, until the old one is
    unloaded.

    Parameters
    ----------
    settings
        What is to be served, and the limits.
    models
        What is served from the start.
    load, estimate
        How a bundle becomes a model, and what it costs.
    """

    def __init__(
        self,
        settings: Settings,
        models: Iterable[ServedModel] = (),
        *,
        load: Load = ServedModel.load,
        estimate: Estimate = estimate_bytes,
    ) -> None:
        self._settings, self._load, self._estimate = settings, load, estimate
        self.repository = Repository(settings.bundles, Path(settings.repository) if settings.repository else None)
        self._shelf = Shelf()
        self._folders = Folders()
        self._one_at_a_time = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="perturbscope-load")
        self._changes: set[asyncio.Task[ModelInfo]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        for model in models:
            self._shelf.put(Entry(model))

    @classmethod
    def open(cls, settings: Settings, *, strict: bool = True) -> ModelRegistry:
        """Load what the settings name and what is in the repository; blocks, so it is for before the event loop.

        Parameters
        ----------
        settings
            What is to be served.
        strict
            Raise for a bundle that the operator names and that cannot be served. Without it such a bundle is told in
            the log, and the server is not ready. One of the repository is only ever told.

        Raises
        ------
        BundleError, ProviderUnavailableError, InferenceError, LimitExceededError
            As :meth:`load`.
        """
        registry = cls(settings)
        repository = registry.repository
        try:
            folders = [*repository.named, *repository.scan()]
        except OSError as error:
            log.event("repository_unreadable", "error", reason=str(error))
            folders = [*repository.named]
        for folder in folders:
            snapshot = None
            try:
                path = repository.find(folder)
                snapshot = Snapshot.of(path)
                n_bytes = registry._estimate(path, settings)
                registry._check_room(folder, n_bytes)
                registry._shelf.put(registry._make(folder, snapshot, n_bytes))
            except PerturbScopeError as error:
                named = folder in repository.named
                if named and strict:
                    raise
                registry._folders.failed(folder, snapshot, error)
                if named:
                    registry._folders.missing.add(folder)
        return registry

    def infos(self) -> tuple[ModelInfo, ...]:
        """What is served; the first is the default."""
        return tuple(model.info for model in self.served())

    def served(self) -> tuple[ServedModel, ...]:
        """The models themselves, to look at; who uses one leases it."""
        return tuple(entry.model for entry in self._shelf.entries)

    def index(self) -> tuple[Listed, ...]:
        """What is loaded, then what could be and is not; a folder that failed says why."""
        return self._folders.index(self._shelf.entries)

    @property
    def default(self) -> ServedModel:
        """What answers a request that names no model. Raises UnknownModelError."""
        return self._shelf.find(None, None).model

    @property
    def n_failed(self) -> int:
        """Folders whose bundle, as it is now, could not be loaded."""
        return self._folders.n_failed

    @property
    def n_missing(self) -> int:
        """Bundles of the settings without which the server is not ready."""
        return len(self._folders.missing)

    @property
    def model_bytes(self) -> int:
        """Memory of all models, as estimated; one that was replaced counts until its last request is done."""
        return self._shelf.n_bytes

    def lease(
        self, name: str | None = None, version: str | None = None
    ) -> contextlib.AbstractContextManager[ServedModel]:
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
        return self._shelf.find(name, version).held()

    async def ready(self) -> bool:
        """Whether all that is to be served is, and answers. A model that failed last is proven again first."""
        if not self._shelf.entries or self._folders.missing:
            return False
        for entry in tuple(self._shelf.entries):
            if entry.model.verified:
                continue
            with entry.held() as model:
                try:
                    await model.check()
                except PerturbScopeError as error:
                    log.event("model_not_ready", "error", model=model.info.model_id, reason=error.message)
                    return False
        return True

    async def load(self, folder: str) -> ModelInfo:
        """Load the bundle of a folder, or load it again if it has changed; the old model serves until the new one can.

        A caller that goes away does not stop it.

        Parameters
        ----------
        folder
            Plain name of a folder of the repository, or of one of the bundles in the settings.

        Raises
        ------
        InvalidParameterError
            Not a plain name, or another folder has this name and version of a model already.
        UnknownModelError
            There is no such folder.
        BundleError
            The bundle cannot be served here; what was served before still is.
        LimitExceededError
            There is no memory for it.
        ProviderUnavailableError, InferenceError
            The model does not run.
        OverloadedError
            The server is shutting down.
        """
        path = await asyncio.to_thread(self.repository.find, folder)
        self._folders.unloaded.discard(folder)
        task = asyncio.get_running_loop().create_task(self._change(folder, path), name="perturbscope-load")
        self._changes.add(task)
        task.add_done_callback(self._loaded)
        return await asyncio.shield(task)

    async def unload(self, name: str, version: str | None = None) -> ModelInfo:
        """Stop serving a model; requests in progress keep it. It is not loaded again until someone asks.

        Parameters
        ----------
        name
            Of a folder, or else of a model, ``name@version`` or its id.
        version
            Of the model; needed where several are served under the name.

        Raises
        ------
        UnknownModelError
            There is no such model.
        InvalidParameterError
            Several versions are served, and none was named.
        """
        entries = self._shelf.entries
        chosen = [entry for entry in entries if entry.folder == name and version in (None, entry.version)]
        chosen = chosen or [entry for entry in entries if entry.is_called(name, version)]
        if len(chosen) > 1:
            versions = ", ".join(entry.version for entry in chosen)
            raise InvalidParameterError(f"The model {name!r} has the versions {versions}. Name one.", field="version")
        entry = chosen[0] if chosen else self._shelf.find(name, version)
        if entry.folder:
            self._folders.unloaded.add(entry.folder)
        self._take_off(entry)
        return entry.model.info

    async def poll(self) -> None:
        """Look at the repository once: load what is new or has changed, unload what has gone.

        A bundle that cannot be served is told in the log, once, and tried again when its files have changed: it may
        have been half copied. A folder must be missing at two looks before its model goes, since replacing a folder
        takes two renames. A repository that is unreadable or empty of bundles changes nothing: it may have lost its
        disk.
        """
        try:
            found = await asyncio.to_thread(self.repository.scan)
        except OSError as error:
            log.event("repository_unreadable", "error", reason=str(error))
            return
        for folder, snapshot in found.items():
            if self._closed:
                return
            if self._folders.is_news(self._shelf.from_folder(folder), folder, snapshot):
                try:
                    await self.load(folder)
                except PerturbScopeError as error:
                    self._folders.failed(folder, snapshot, error)
        if found:
            served = {entry.folder: entry for entry in self._shelf.entries if self._is_watched(entry)}
            for folder in self._folders.gone(served, found, self.repository.named):
                self._take_off(served[folder])

    def watch(self) -> None:
        """Look at the repository from time to time, until closed; does nothing where there is none."""
        if self.repository.root is not None and self._settings.repository_poll:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="perturbscope-repository")

    async def close(self) -> None:
        """Finish what was accepted, and free all models. May be called twice.

        A bundle that is being loaded is waited for, but no longer than ``shutdown_grace`` seconds.
        """
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._changes:
            await asyncio.wait(self._changes, timeout=self._settings.shutdown_grace)
        await self._shelf.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repository_poll)
            try:
                await self.poll()
            except Exception:  # noqa: BLE001  a bug must not end the watch
                log.logger.exception("looking at the model repository failed")

    async def _change(self, folder: str, path: Path) -> ModelInfo:
        """Load a folder and put its model in place; one at a time."""
        async with self._one_at_a_time:
            snapshot: Snapshot | None = None
            try:
                # Taken before the files are read: a change while they are is then seen at the next look.
                snapshot = await self._off_the_loop(Snapshot.of, path)
                old = self._shelf.from_folder(folder)
                if old and old.snapshot and old.snapshot.digest == snapshot.digest and old.model.verified:
                    self._folders.is_well(folder)
                    return old.model.info
                n_bytes = await self._off_the_loop(self._estimate, path, self._settings)
                self._check_room(folder, n_bytes)
                new = await self._off_the_loop(self._make, folder, snapshot, n_bytes)
                try:
                    if self._closed:
                        raise _stopping()
                    if folder in self._folders.unloaded:
                        raise UnknownModelError(f"{folder!r} was unloaded while it was being loaded.", field="name")
                    self._shelf.put(new)
                except PerturbScopeError:
                    await new.model.close()
                    raise
            except PerturbScopeError as error:
                self._folders.failed(folder, snapshot, error)
                raise
            self._folders.is_well(folder)
            return new.model.info

    async def _off_the_loop(self, function: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise _stopping()
        return await asyncio.get_running_loop().run_in_executor(self._loader, function, *args)

    def _check_room(self, folder: str, n_bytes: int) -> None:
        taken, limit = self.model_bytes, self._settings.max_model_bytes
        if limit and taken + n_bytes > limit:
            raise LimitExceededError(
                f"The model in {folder!r} would take about {n_bytes:,} bytes, and the loaded ones take {taken:,}; "
                f"the limit is {limit:,} ({PREFIX}MAX_MODEL_BYTES). Unload a model first; a replaced model counts "
                "until its last request is done.",
                field="name",
            )

    def _make(self, folder: str, snapshot: Snapshot, n_bytes: int) -> Entry:
        """Load a bundle; on the loader's thread."""
        started = time.perf_counter()
        model = self._load(snapshot.path, self._settings)
        seconds = round(time.perf_counter() - started, 3)
        log.event("model_prepared", model=model.info.model_id, folder=folder, bytes=n_bytes, seconds=seconds)
        return Entry(model, folder, snapshot, n_bytes)

    def _loaded(self, task: asyncio.Task[ModelInfo]) -> None:
        """A load has ended; whoever waits for it hears of its error, and nobody may."""
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()

    def _take_off(self, entry: Entry) -> None:
        self._folders.is_well(entry.folder)
        self._shelf.take_off(entry)

    def _is_watched(self, entry: Entry) -> bool:
        return entry.snapshot is not None and entry.folder not in self.repository.named


def _stopping() -> OverloadedError:
    return OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)

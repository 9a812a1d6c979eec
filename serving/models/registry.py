"""Which models are served: loaded from folders, checked, replaced and unloaded without a restart.

Only loading leaves the event loop, for one thread, one model at a time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from perturbscope.errors import (
    InvalidParameterError,
    LimitExceededError,
    OverloadedError,
    PerturbScopeError,
    UnknownModelError,
)
from perturbscope.protocol.messages import ModelInfo, ModelProblem
from serving.models.folder_states import FolderStates, IndexEntry
from serving.models.loading import ServedModel, estimate_bytes
from serving.models.repository import Repository, Snapshot
from serving.models.served import Entry, ServedModels
from serving.settings import PREFIX, Settings
from serving.telemetry import log

Load = Callable[[Path, Settings], ServedModel]
"""Opens, warms up and checks one bundle; called on a thread."""
Estimate = Callable[[Path, Settings], int]
"""Estimates the bytes of memory of a model before it is loaded."""
T = TypeVar("T")


class ModelRegistry(ServedModels):
    """The models that are served, and the folders that they are loaded from.

    A model that is loaded from a folder that is served already takes the old one's place in the order; any other is
    listed last. So a new version beside an old one gets no traffic that does not name it, until the old one is
    unloaded.

    Parameters
    ----------
    settings
        Settings that name the bundles, the repository and the limits.
    models
        Models that are served from the start.
    load, estimate
        Functions that make a model of a bundle, and estimate its memory.
    """

    def __init__(
        self,
        settings: Settings,
        models: Iterable[ServedModel] = (),
        *,
        load: Load = ServedModel.load,
        estimate: Estimate = estimate_bytes,
    ) -> None:
        super().__init__()
        self._settings, self._load, self._estimate = settings, load, estimate
        self.repository = Repository(settings.bundles, settings.repository_path)
        self._folders = FolderStates()
        self._one_at_a_time = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="perturbscope-load")
        self._changes: set[asyncio.Task[ModelInfo]] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False
        for model in models:
            self.put(Entry(model))

    @classmethod
    def open(cls, settings: Settings, *, strict: bool = True) -> ModelRegistry:
        """Load the bundles that the settings name and those in the repository. Blocks: call it before the event loop.

        Parameters
        ----------
        settings
            Settings that name the bundles, the repository and the limits.
        strict
            Raise for a bundle that the settings name and that cannot be served. Otherwise it is logged, and the server
            is not ready. A bundle of the repository that cannot be served is only ever logged.

        Raises
        ------
        BundleError, ProviderUnavailableError, InferenceError, LimitExceededError
            See :meth:`load`.
        """
        registry = cls(settings)
        try:
            registry._open_all(strict=strict)
        except BaseException:
            for entry in registry.entries:
                entry.model.discard()
            raise
        return registry

    def _open_all(self, *, strict: bool) -> None:
        """Load all bundles one after the other. Raises as :meth:`open`."""
        folders = [*self.repository.named]
        try:
            scan = self.repository.scan()
            folders += scan.bundles
            self._folders.note_others(scan.others, at_once=True)
        except OSError as error:
            log.event("repository_unreadable", "error", reason=str(error))
        for folder in folders:
            snapshot = None
            try:
                path = self.repository.find(folder)
                snapshot = Snapshot.of(path)
                n_bytes = self._estimate(path, self._settings)
                self._check_room(folder, n_bytes)
                entry = self._make(folder, snapshot, n_bytes)
                try:
                    self.put(entry)
                except PerturbScopeError:
                    entry.model.discard()
                    raise
            except PerturbScopeError as error:
                named = folder in self.repository.named
                if named and strict:
                    raise
                self._folders.record_failure(folder, snapshot, error)
                if named:
                    self._folders.missing.add(folder)

    def index(self) -> tuple[IndexEntry, ...]:
        """List the models that are loaded, then the folders whose models are not, each with the reason."""
        return self._folders.index(self.entries)

    def problems(self) -> tuple[ModelProblem, ...]:
        """List the folders that are not served, or not as their files are now, with the reason."""
        root = f"{self.repository.root}{os.sep}"
        # Where the folders lie is none of the callers' business.
        return tuple(
            replace(item, problem=item.problem.replace(root, "")) for item in self._folders.problems(self.entries)
        )

    @property
    def n_failed(self) -> int:
        """Folders whose bundle, as it is now, could not be loaded."""
        return self._folders.n_failed

    @property
    def n_missing(self) -> int:
        """Bundles of the settings without which the server is not ready."""
        return len(self._folders.missing)

    async def ready(self) -> bool:
        """Whether every model that is to be served is loaded and answers. One that failed last is checked first."""
        if not self.entries or self._folders.missing:
            return False
        for entry in tuple(self.entries):
            if entry.model.verified:
                continue
            with entry.lease() as model:
                try:
                    await model.check()
                except PerturbScopeError as error:
                    log.event("model_not_ready", "error", model=model.info.model_id, reason=error.message)
                    return False
        return True

    async def load(self, folder: str) -> ModelInfo:
        """Load the bundle of a folder, or load it again if it has changed; the old model serves until the new one can.

        A caller that goes away does not stop the loading.

        Parameters
        ----------
        folder
            Plain name of a folder of the repository, or of one of the bundles in the settings.

        Raises
        ------
        InvalidParameterError
            The name is not plain, or a model of this name and version is served from another folder.
        UnknownModelError
            There is no such folder.
        BundleError
            The bundle cannot be served here; the model that was served before still is.
        LimitExceededError
            The loaded models leave too little of the allowed memory.
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
        """Stop serving a model; requests in progress keep it. It is not loaded again without a request to.

        Parameters
        ----------
        name
            Name of a folder, or else name, ``name@version`` or id of a model.
        version
            Version of the model; needed if several are served under the name.

        Raises
        ------
        UnknownModelError
            There is no such model.
        InvalidParameterError
            Several versions are served, and none was named.
        """
        matches = [entry for entry in self.entries if entry.folder == name and version in (None, entry.version)]
        matches = matches or [entry for entry in self.entries if entry.is_called(name, version)]
        if len(matches) > 1:
            versions = ", ".join(entry.version for entry in matches)
            raise InvalidParameterError(f"The model {name!r} has the versions {versions}. Name one.", field="version")
        entry = matches[0] if matches else self.find(name, version)
        if entry.folder:
            self._folders.unloaded.add(entry.folder)
        self._unload(entry)
        return entry.model.info

    async def poll(self) -> None:
        """Scan the repository once: load bundles that are new or changed, unload models whose folders are gone.

        A bundle that cannot be served is logged once, and tried again when its files have changed: it may have been
        half copied. A folder must be missing at two scans before its model is unloaded, since replacing a folder takes
        two renames. A repository that is unreadable or empty of bundles changes nothing: it may have lost its disk.
        """
        try:
            scan = await asyncio.to_thread(self.repository.scan)
        except OSError as error:
            log.event("repository_unreadable", "error", reason=str(error))
            return
        folders = scan.bundles
        self._folders.note_others(scan.others)
        for folder, snapshot in folders.items():
            if self._closed:
                return
            if self._folders.should_load(self.from_folder(folder), folder, snapshot):
                try:
                    await self.load(folder)
                except PerturbScopeError as error:
                    self._folders.record_failure(folder, snapshot, error)
        if folders:
            served = {entry.folder: entry for entry in self.entries if self._is_watched(entry)}
            for folder in self._folders.disappeared(served, folders, self.repository.named):
                self._unload(served[folder])

    def watch(self) -> None:
        """Scan the repository every ``repository_poll`` seconds until closed; do nothing if there is none."""
        if self.repository.root is not None and self._settings.repository_poll:
            self._watcher = asyncio.get_running_loop().create_task(self._watch(), name="perturbscope-repository")

    async def close(self) -> None:
        """Finish the accepted requests, and free all models. May be called twice.

        A bundle that is being loaded is waited for, but no longer than ``shutdown_grace`` seconds.
        """
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._changes:
            await asyncio.wait(self._changes, timeout=self._settings.shutdown_grace)
        await super().close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repository_poll)
            try:
                await self.poll()
            except Exception:  # noqa: BLE001  a bug must not end the watch
                log.logger.exception("the scan of the model repository failed")

    async def _change(self, folder: str, path: Path) -> ModelInfo:
        """Load a folder and put its model in place; one at a time."""
        async with self._one_at_a_time:
            snapshot: Snapshot | None = None
            try:
                # Taken before the files are read: a change meanwhile is then noticed at the next scan.
                snapshot = await self._off_the_loop(Snapshot.of, path)
                old = self.from_folder(folder)
                if old and old.snapshot and old.snapshot.digest == snapshot.digest and old.model.verified:
                    self._folders.clear(folder)
                    return old.model.info
                n_bytes = await self._off_the_loop(self._estimate, path, self._settings)
                self._check_room(folder, n_bytes)
                new = await self._off_the_loop(self._make, folder, snapshot, n_bytes)
                try:
                    if self._closed:
                        raise _stopping()
                    if folder in self._folders.unloaded:
                        raise UnknownModelError(f"{folder!r} was unloaded while it was being loaded.", field="name")
                    self.put(new)
                except PerturbScopeError:
                    await new.model.close()
                    raise
            except PerturbScopeError as error:
                self._folders.record_failure(folder, snapshot, error)
                raise
            self._folders.clear(folder)
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
        model.info = replace(model.info, memory_bytes=n_bytes)
        seconds = round(time.perf_counter() - started, 3)
        log.event("model_prepared", model=model.info.model_id, folder=folder, bytes=n_bytes, seconds=seconds)
        return Entry(model, folder, snapshot, n_bytes)

    def _loaded(self, task: asyncio.Task[ModelInfo]) -> None:
        """Forget a load that has ended. Its error is raised where it is awaited; nobody may, so it is read here."""
        self._changes.discard(task)
        if not task.cancelled():
            task.exception()

    def _unload(self, entry: Entry) -> None:
        self._folders.clear(entry.folder)
        self.remove(entry)

    def _is_watched(self, entry: Entry) -> bool:
        return entry.snapshot is not None and entry.folder not in self.repository.named


def _stopping() -> OverloadedError:
    return OverloadedError("The server is shutting down. Try again, or use another server.", retry_after=5.0)

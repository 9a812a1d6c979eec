"""What is known of bundle folders besides the models that are served from them: why not, and what was asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from perturbscope.errors import LimitExceededError, PerturbScopeError
from serving.models.repository import Snapshot
from serving.models.served import Entry
from serving.telemetry import log

State = Literal["READY", "UNAVAILABLE"]


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model that is loaded, or a bundle folder that is not.

    Attributes
    ----------
    name
        Of the model; of the folder, where the model is not loaded.
    version
        Of the model; empty where that is not known.
    folder
        What :meth:`serving.models.registry.ModelRegistry.load` calls it.
    state
        READY for a model that answers.
    reason
        Why it is not loaded, or why a newer form of its bundle is not; empty if all is well.
    """

    name: str
    version: str
    folder: str
    state: State
    reason: str


@dataclass(frozen=True)
class _Failure:
    """Why a folder is not served, or not in its present form; and how it looked.

    Not the error itself: its traceback would keep the graph that was tried.
    """

    message: str
    may_pass: bool
    signature: object


class Folders:
    """Failures and requests, by folder.

    Attributes
    ----------
    unloaded
        Folders that were unloaded on request, and so are not loaded again without one.
    missing
        Folders that the operator names and that could not be loaded: without them the server is not ready.
    """

    def __init__(self) -> None:
        self.unloaded: set[str] = set()
        self.missing: set[str] = set()
        self._failures: dict[str, _Failure] = {}
        self._absent: set[str] = set()
        """Folders with a model that were not there at the last look."""

    @property
    def n_failed(self) -> int:
        """Folders whose bundle, as it is now, could not be loaded."""
        return len(self._failures)

    def failed(self, folder: str, snapshot: Snapshot | None, error: PerturbScopeError) -> None:
        """Remember why a folder is not served; told once for the same reason."""
        known = self._failures.get(folder)
        may_pass = isinstance(error, LimitExceededError)  # memory may become free
        self._failures[folder] = _Failure(error.message, may_pass, snapshot.signature if snapshot else None)
        if known is None or known.message != error.message:
            log.event("model_not_loaded", "error", folder=folder, code=error.code, reason=error.message)

    def is_well(self, folder: str) -> None:
        """The folder is served as it is, or not at all any more."""
        self._failures.pop(folder, None)
        self.missing.discard(folder)

    def is_news(self, entry: Entry | None, folder: str, snapshot: Snapshot) -> bool:
        """Whether a folder is to be loaded: it is not served in this form, and trying may have another end."""
        if folder in self.unloaded or (entry and entry.snapshot and entry.snapshot.digest == snapshot.digest):
            return False
        known = self._failures.get(folder)
        return known is None or known.may_pass or known.signature != snapshot.signature

    def gone(self, served: Collection[str], found: Collection[str], named: Collection[str]) -> set[str]:
        """Folders whose models are to go, for they were missing at this look and at the one before.

        What is known of folders that are not served is forgotten with them: a folder that comes back is new.
        """
        absent = set(served) - set(found)
        twice = absent & self._absent
        self._absent = absent - twice
        for folder in (self._failures.keys() | self.unloaded) - set(found) - set(named) - absent:
            self._failures.pop(folder, None)
            self.unloaded.discard(folder)
        return twice

    def index(self, entries: Iterable[Entry]) -> tuple[Listed, ...]:
        """What is loaded, then what could be and is not."""
        reasons = {folder: failure.message for folder, failure in self._failures.items()}
        listed = []
        for entry in entries:
            info, works = entry.model.info, entry.model.verified
            reason = reasons.pop(entry.folder, "") or ("" if works else "It does not answer as it should.")
            state: State = "READY" if works else "UNAVAILABLE"
            listed.append(Listed(name=info.name, version=info.version, folder=entry.folder, state=state, reason=reason))
        for folder in sorted({*reasons, *self.unloaded}):
            reason = reasons.get(folder, "It was unloaded on request.")
            listed.append(Listed(name=folder, version="", folder=folder, state="UNAVAILABLE", reason=reason))
        return tuple(listed)

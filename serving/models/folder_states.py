"""States of bundle folders: why one is not served, which were unloaded on request, which have disappeared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from perturbscope.errors import LimitExceededError, PerturbScopeError
from perturbscope.protocol.messages import ModelProblem
from serving.models.repository import Snapshot
from serving.models.served import Entry
from serving.telemetry import log

State = Literal["READY", "UNAVAILABLE"]


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """A model that is loaded, or a bundle folder whose model is not.

    Attributes
    ----------
    name
        Name of the model; name of the folder if the model is not loaded.
    version
        Version of the model; empty if it is not known.
    folder
        Name by which :meth:`serving.models.registry.ModelRegistry.load` loads it.
    state
        READY for a model that answers.
    reason
        Reason why it is not loaded, or why a changed bundle is not; empty if all is well.
    """

    name: str
    version: str
    folder: str
    state: State
    reason: str


@dataclass(frozen=True)
class _Failure:
    """The reason why a folder is not served, or not in its present form, and the state of its files then.

    The error itself is not kept: its traceback would keep the graph that was tried.
    """

    message: str
    may_pass: bool
    signature: object


class FolderStates:
    """Failures and requests to unload, by folder.

    Attributes
    ----------
    unloaded
        Folders that were unloaded on request, and so are not loaded again without one.
    missing
        Folders that the operator names and that could not be loaded: without them the server is not ready.
    others
        Reasons why folders of the repository are no bundles, by folder; those of the last scan.
    """

    def __init__(self) -> None:
        self.unloaded: set[str] = set()
        self.missing: set[str] = set()
        self.others: dict[str, str] = {}
        self._failures: dict[str, _Failure] = {}
        self._absent: set[str] = set()
        """Folders with a model that were not there at the last scan."""
        self._told: set[str] = set()
        """Folders that are no bundles and that the log has named."""

    @property
    def n_failed(self) -> int:
        """Folders whose bundle, as it is now, could not be loaded."""
        return len(self._failures)

    def record_failure(self, folder: str, snapshot: Snapshot | None, error: PerturbScopeError) -> None:
        """Remember why a folder is not served, and log each new reason once."""
        known = self._failures.get(folder)
        may_pass = isinstance(error, LimitExceededError)  # memory may become free
        self._failures[folder] = _Failure(error.message, may_pass, snapshot.signature if snapshot else None)
        if known is None or known.message != error.message:
            log.event("model_not_loaded", "error", folder=folder, code=error.code, reason=error.message)

    def clear(self, folder: str) -> None:
        """Forget the failure of a folder: it is served as it is, or is not to be served any more."""
        self._failures.pop(folder, None)
        self.missing.discard(folder)

    def should_load(self, entry: Entry | None, folder: str, snapshot: Snapshot) -> bool:
        """Whether a folder is to be loaded: it is not served in this form, and another try may end differently."""
        if folder in self.unloaded or (entry and entry.snapshot and entry.snapshot.digest == snapshot.digest):
            return False
        known = self._failures.get(folder)
        return known is None or known.may_pass or known.signature != snapshot.signature

    def disappeared(self, served: Collection[str], present: Collection[str], named: Collection[str]) -> set[str]:
        """Return the served folders that were missing at this scan and at the one before.

        The states of missing folders that are not served are forgotten: a folder that comes back is new.
        """
        absent = set(served) - set(present)
        twice = absent & self._absent
        self._absent = absent - twice
        for folder in (self._failures.keys() | self.unloaded) - set(present) - set(named) - absent:
            self._failures.pop(folder, None)
            self.unloaded.discard(folder)
        return twice

    def note_others(self, others: Mapping[str, str], *, at_once: bool = False) -> None:
        """Remember the folders that are no bundles. Each is logged once, when a second scan finds it so.

        Parameters
        ----------
        others
            Reasons by folder.
        at_once
            Log at the first scan: at the start of the server nobody is expected to copy files.
        """
        self._told &= others.keys()
        for folder, reason in others.items():
            if folder not in self._told and (at_once or folder in self.others):
                self._told.add(folder)
                log.event("folder_ignored", "warning", folder=folder, reason=reason)
        self.others = dict(others)

    def problems(self, entries: Iterable[Entry]) -> tuple[ModelProblem, ...]:
        """List the folders that are not served, or not in their present form; not those unloaded on request."""
        found = {
            line.folder or line.name: line.reason
            for line in self.index(entries)
            if line.reason and (line.state == "READY" or line.folder not in self.unloaded)
        }
        return tuple(ModelProblem(name=name, problem=problem) for name, problem in {**found, **self.others}.items())

    def index(self, entries: Iterable[Entry]) -> tuple[IndexEntry, ...]:
        """List the models that are loaded, then the folders whose models are not."""
        reasons = {folder: failure.message for folder, failure in self._failures.items()}
        lines = []
        for entry in entries:
            info, verified = entry.model.info, entry.model.verified
            reason = reasons.pop(entry.folder, "") or ("" if verified else "It does not answer as it should.")
            state: State = "READY" if verified else "UNAVAILABLE"
            lines.append(
                IndexEntry(name=info.name, version=info.version, folder=entry.folder, state=state, reason=reason)
            )
        for folder in sorted({*reasons, *self.unloaded}):
            reason = reasons.get(folder, "It was unloaded on request.")
            lines.append(IndexEntry(name=folder, version="", folder=folder, state="UNAVAILABLE", reason=reason))
        return tuple(lines)

"""One fault on trial: its service, the answers that clients saw, the checks, and the resulting row of the page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from perturbscope.errors import PerturbScopeError
from tests.integration.server import ROOT, RunningServer, Usage

T = TypeVar("T")
MIB = 2**20
ROWS = ROOT / "runs" / "reliability"
"""Folder that keeps the rows between runs."""


@dataclass(frozen=True)
class Plan:
    """Amount of work of a run.

    Attributes
    ----------
    quick
        Whether a few of everything are done, to see that the script works; the page of such rows says so.
    minutes
        Duration of the load.
    """

    quick: bool
    minutes: float

    def times(self, full: int, quick: int) -> int:
        """Return one number or the other, for a full or a quick run."""
        return quick if self.quick else full


@dataclass
class Row:
    """Result of a fault, a row of the page."""

    name: str
    title: str
    done: str = ""
    clients: dict[str, int] = field(default_factory=dict)
    service: list[str] = field(default_factory=list)
    checks: list[tuple[str, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    quick: bool = False
    commit: str = ""
    date: str = ""

    @property
    def held(self) -> bool:
        """Whether all checks hold; a row without checks does not."""
        return bool(self.checks) and all(holds for _, holds in self.checks)

    def save(self) -> None:
        """Keep the row for the page."""
        ROWS.mkdir(parents=True, exist_ok=True)
        (ROWS / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, name: str) -> Row | None:
        """Return the row of an earlier run, if there is one."""
        path = ROWS / f"{name}.json"
        if not path.exists():
            return None
        row = cls(**json.loads(path.read_text()))
        row.checks = [(what, holds) for what, holds in row.checks]
        return row


class Trial:
    """The checks and counts of one fault.

    Parameters
    ----------
    row
        Row that the trial fills.
    folder
        Folder for the service's output and for files.
    plan
        Amount of work.
    """

    def __init__(self, row: Row, folder: Path, plan: Plan) -> None:
        self.row = row
        self.folder = folder
        self.plan = plan
        self._seen: Counter[str] = Counter()
        self._started = 0

    def check(self, what: str, holds: bool) -> None:
        """Record a claim, with its numbers, and whether it holds."""
        print(f"  {'ok ' if holds else 'BAD'} {what}", flush=True)
        self.row.checks.append((what, bool(holds)))

    def note(self, text: str) -> None:
        """Record a fact that is no claim."""
        print(f"      {text}", flush=True)
        self.row.notes.append(text)

    def saw(self, code: str, n: int = 1) -> None:
        """Count a code that a client got."""
        self._seen[code] += n
        self.row.clients = dict(self._seen.most_common())

    @property
    def seen(self) -> Counter[str]:
        """Counts of the codes that clients have got."""
        return self._seen

    async def outcome(self, work: Awaitable[T], *, count: bool = True) -> tuple[str, T | None]:
        """Return ``ok`` and the result, or the code of the typed error; another exception is ``untyped: Name``."""
        code, value = await outcome(work)
        if count:
            self.saw(code)
        return code, value

    def all_typed(self) -> None:
        """Check that no client got an untyped exception or an internal error."""
        bad = {code: n for code, n in self._seen.items() if code.startswith("untyped") or code == "internal"}
        self.check(f"every failure a typed error, none of them internal ({bad or 'none'})", not bad)

    @contextlib.contextmanager
    def service(
        self,
        *,
        environ: Mapping[str, str] | None = None,
        tracebacks: str | None = None,
        launched: Callable[[int], None] | None = None,
        **settings: object,
    ) -> Iterator[RunningServer]:
        """Run the real service and check its log at the end; `tracebacks` says why some are expected."""
        self._started += 1
        folder = self.folder / f"service{self._started}"
        folder.mkdir(parents=True)
        with RunningServer(folder, environ=environ, launched=launched, **settings) as server:
            try:
                yield server
            finally:
                _show(server.log)
            lines = server.log.splitlines()
            failed = [line for line in lines if "Traceback" in line]
            errors = sum('"level": "error"' in line or " ERROR " in line for line in lines)
            self.row.service.append(f"{errors} errors and {len(failed)} tracebacks logged")
            if tracebacks is None:
                self.check(f"no traceback in the service's log ({len(failed)})", not failed)
            else:
                self.note(f"{len(failed)} tracebacks in the service's log: {tracebacks}")

    def before(self, server: RunningServer) -> Usage:
        """Return the resources of the service before the fault; called once it is warm."""
        return settled(server)

    def after(self, server: RunningServer, before: Usage, *, rss_mib: float = 64, files: int = 8) -> Usage:
        """Check that the service is alive and ready, and holds no more resources than before, within bounds."""
        self.check("the service is alive and ready afterwards", server.answers("/livez") and server.answers("/readyz"))
        after = settled(server, until=lambda usage: usage.files <= before.files + files)
        self.row.service.append(
            f"RSS {before.rss / MIB:.0f} to {after.rss / MIB:.0f} MiB, files {before.files} to {after.files}, "
            f"threads {before.threads} to {after.threads}"
        )
        grown = (after.rss - before.rss) / MIB
        self.check(f"RSS grew by {grown:.0f} MiB (at most {rss_mib:.0f})", grown <= rss_mib)
        self.check(
            f"open files {before.files} to {after.files} (at most {files} more)", after.files <= before.files + files
        )
        self.check(f"threads {before.threads} to {after.threads} (at most 8 more)", after.threads <= before.threads + 8)
        return after


async def outcome(work: Awaitable[T]) -> tuple[str, T | None]:
    """Return ``ok`` and the result of `work`, or the code of its error."""
    try:
        return "ok", await work
    except PerturbScopeError as error:
        return error.code, None
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001  what is not typed is what this looks for
        return f"untyped: {type(error).__name__}", None


def settled(server: RunningServer, *, until: Callable[[Usage], bool] | None = None, seconds: float = 30) -> Usage:
    """Return the service's resources once its CPU has rested for a second and `until` holds, or after `seconds`."""
    end = time.monotonic() + seconds
    usage = server.usage()
    while True:
        time.sleep(1.0)
        last, usage = usage, server.usage()
        rested = usage.cpu - last.cpu < 0.2
        if (rested and (until is None or until(usage))) or time.monotonic() > end:
            return usage


def _show(log: str) -> None:
    """Print the last lines of the different tracebacks of a log."""
    found = Counter(
        "\n        ".join(line.replace("\\n", "\n").splitlines()[-4:])
        for line in log.splitlines()
        if "Traceback" in line
    )
    for text, n in found.most_common(12):
        print(f"   {n:4d} x {text[-800:]}", flush=True)


Fault = Callable[[Trial], Any]


@dataclass(frozen=True)
class Registered:
    """A fault by its name, title and function."""

    name: str
    title: str
    make: Fault


FAULTS: dict[str, Registered] = {}
"""All faults by name, in the order of the page."""


def fault(name: str, title: str) -> Callable[[Fault], Fault]:
    """Register a function that makes a fault; its docstring says what is done."""

    def register(make: Fault) -> Fault:
        FAULTS[name] = Registered(name, title, make)
        return make

    return register


def attempt(item: Registered, plan: Plan, folder: Path) -> Row:
    """Make the fault; if the trial raises, the row has failed."""
    row = Row(item.name, item.title, quick=plan.quick, commit=commit(), date=time.strftime("%Y-%m-%d %H:%M"))
    row.done = " ".join((item.make.__doc__ or "").split())
    trial = Trial(row, folder, plan)
    started = time.monotonic()
    try:
        result = item.make(trial)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    except Exception as error:  # noqa: BLE001  one broken trial must not end the others
        traceback.print_exc()
        trial.check(f"the trial went through ({type(error).__name__}: {str(error)[:300]})", False)
    row.seconds = time.monotonic() - started
    return row


def commit() -> str:
    """Return the commit of the checkout."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "no checkout"

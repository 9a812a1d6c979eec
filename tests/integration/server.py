"""The real service, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 120


def environment(**settings: object) -> dict[str, str]:
    """Return this process's environment with settings of the server; no accelerator is visible."""
    given = {f"PERTURBSCOPE_{name.upper()}": str(value) for name, value in settings.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERTURBSCOPE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **given}


@dataclass(frozen=True)
class Usage:
    """Resources of the service, over all its processes.

    Attributes
    ----------
    rss
        Resident bytes.
    files, threads
        Open files (sockets too), and threads.
    cpu
        Seconds of CPU time so far.
    """

    rss: int
    files: int
    threads: int
    cpu: float


class RunningServer:
    """A context with ``python -m serving`` on free ports, ready when entered and stopped when left.

    Parameters
    ----------
    folder
        For its output, and its working directory.
    environ
        More of its environment.
    launched
        Called with the number of its first process, as soon as there is one.
    settings
        ``bundle=...``, ``max_cells=...``: see :class:`serving.settings.Settings`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environ: Mapping[str, str] | None = None,
        launched: Callable[[int], None] | None = None,
        **settings: object,
    ) -> None:
        self.http_port, self.grpc_port = free_ports(2)
        self.url, self.target = f"http://127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        self._folder, self._launched = folder, launched
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port}
        self._environment = environment(**{"host": "127.0.0.1", "threads": 1, **ports, **settings}) | dict(
            environ or {}
        )

    @property
    def output(self) -> str:
        """Output of the server up to now."""
        return (self._folder / "stdout").read_text()

    @property
    def log(self) -> str:
        """Log of the server up to now."""
        return (self._folder / "stderr").read_text()

    def __enter__(self) -> Self:
        self.launch()
        self.wait_until_ready()
        return self

    def launch(self) -> None:
        """Start the process without waiting; output is appended to that of an earlier one."""
        with (self._folder / "stdout").open("ab") as stdout, (self._folder / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving"],
                stdout=stdout,
                stderr=stderr,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        if self._launched is not None:
            self._launched(self.process.pid)

    def wait_until_ready(self) -> None:
        """Wait for /readyz; if it does not come, stop the service and show its output."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.answers("/readyz"):
                return
            time.sleep(0.2)
        self.stop()
        raise AssertionError(f"the service did not start:\n{self.output}\n{self.log}")

    def answers(self, probe: str) -> bool:
        """Return whether a probe answers 200."""
        try:
            return httpx.get(self.url + probe, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the service: BentoML's supervisor first, then its worker."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def worker(self) -> psutil.Process:
        """Return the process that answers requests."""
        return next(item for item in self.processes() if any("worker" in part for part in item.cmdline()))

    def usage(self) -> Usage:
        """Return the resources that the service uses now."""
        rss = files = threads = 0
        cpu = 0.0
        for item in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess), item.oneshot():
                rss += item.memory_info().rss
                files += item.num_fds()
                threads += item.num_threads()
                cpu += sum(item.cpu_times()[:2])
        return Usage(rss, files, threads, cpu)

    def kill(self) -> None:
        """Kill all processes with SIGKILL, as the kernel does when memory runs out."""
        for item in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                item.kill()
        self.process.wait(60)

    def stop(self) -> int:
        """Ask it to stop, as a container runtime does, and wait.

        Returns
        -------
        The exit code.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

"""The real service, as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 120


def free_ports(n: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def environment(**settings: object) -> dict[str, str]:
    """This process's environment, with settings of the server; no accelerator is visible."""
    given = {f"PERTURBSCOPE_{name.upper()}": str(value) for name, value in settings.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERTURBSCOPE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **given}


class RunningServer:
    """``python -m serving`` on free ports; ready when entered, stopped when left.

    Parameters
    ----------
    folder
        For its output, and its working directory.
    settings
        ``bundle=...``, ``max_cells=...``: see :class:`serving.settings.Settings`.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        self.http_port, self.grpc_port = free_ports(2)
        self.url, self.target = f"http://127.0.0.1:{self.http_port}", f"127.0.0.1:{self.grpc_port}"
        self._folder = folder
        self._environment = environment(
            host="127.0.0.1", http_port=self.http_port, grpc_port=self.grpc_port, threads=1, **settings
        )

    @property
    def output(self) -> str:
        """What it printed so far."""
        return (self._folder / "stdout").read_text()

    @property
    def log(self) -> str:
        """What it logged so far."""
        return (self._folder / "stderr").read_text()

    def __enter__(self) -> Self:
        with (self._folder / "stdout").open("wb") as stdout, (self._folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving"],
                stdout=stdout,
                stderr=stderr,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        self.stop()
        raise AssertionError(f"the service did not start:\n{self.output}\n{self.log}")

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

"""Commands of training in forked processes, which saves each the eight seconds of importing torch and DeepSpeed."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from multiprocessing.forkserver import _forkserver
from pathlib import Path

from tests.ports import free_ports

PRELOADED = ["training.commands.pretrain", "training.commands.finetune", "deepspeed"]


class Launcher:
    """Forks of a process that has imported everything and done nothing; :func:`launcher` makes it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")

    def start(self, module: str, *arguments: str, log: Path, processes: int = 1) -> list[ForkServerProcess]:
        """Start ``python -m MODULE ARGUMENTS``; several processes find each other as those of torchrun do."""
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(processes)}
        started = []
        for rank in range(processes):
            environ = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            process = self._context.Process(target=_command, args=(module, arguments, environ, log))
            process.start()
            started.append(process)
        return started

    def run(self, module: str, *arguments: str, log: Path, processes: int = 1, timeout: float = 180) -> None:
        """Start a command and wait until it ends with exit code 0."""
        started = self.start(module, *arguments, log=log, processes=processes)
        try:
            for process in started:
                process.join(timeout)
                assert process.exitcode == 0, f"{process.exitcode}: {log.read_text()[-3000:]}"
        finally:
            for process in started:
                process.kill()
                process.join()


@contextmanager
def launcher(environ: Mapping[str, str]) -> Iterator[Launcher]:
    """Start a process with this environment, from which others are forked; it ends with the context."""
    before = dict(os.environ)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    os.environ.update(environ)
    try:
        _forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield Launcher()
    finally:
        os.kill(_forkserver._forkserver_pid, signal.SIGKILL)  # it would first put away all that it imported
        _forkserver._stop()


def _command(module: str, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
    """Run the command in a fork."""
    os.environ.update(environ)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [module, *arguments]
    raise SystemExit(importlib.import_module(module).main(arguments))

"""The real servers of both transports, in a thread of the test's process, over a small bundle; ready in a second."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from serving.access.keys import keys_to_json, make_key
from serving.engine.engine import Engine
from serving.settings import Settings
from tests.apps import grpc_server_of, new_app_of
from tests.bundles import write_tiny_bundle
from tests.ports import free_ports

MODEL, SPARE = "tiny", "spare"
"""Names of the models: the default, and one to be loaded and unloaded."""


@dataclass(frozen=True)
class Running:
    """A server, and keys that it knows.

    Attributes
    ----------
    http, grpc
        Host and port.
    key, admin
        A key with the right to infer, and one with all rights.
    """

    http: str
    grpc: str
    key: str
    admin: str

    def of(self, kind: str) -> str:
        """Return the address for a client of `kind`, such as ``http.aio``."""
        return self.http if kind.startswith("http") else self.grpc

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a caller that may infer."""
        return {"x-api-key": self.key}

    @property
    def admin_headers(self) -> dict[str, str]:
        """Headers of a caller that may load and unload."""
        return {"authorization": f"Bearer {self.admin}"}


@contextlib.contextmanager
def running(folder: Path, *, bundle: Path | None = None, keyless: bool = False, **settings: Any) -> Iterator[Running]:
    """Run a server over a repository with one model, on its own event loop; `bundle` may be another default."""
    made = [make_key("pipeline"), make_key("operator", rights=("infer", "admin"))]
    (folder / "keys.json").write_bytes(keys_to_json(tuple(key for key, _ in made)))
    (folder / "models").mkdir()
    for name in (MODEL, SPARE):
        write_tiny_bundle(folder / "models" / name, name=name)
    (port,) = free_ports(1)
    chosen = Settings(
        bundle=str(bundle or folder / "models" / MODEL),
        repository=str(folder / "models"),
        repository_poll=0,
        keys="" if keyless else str(folder / "keys.json"),
        threads=1,
        **settings,
    )
    started, stop = threading.Event(), asyncio.Event()
    found: list[Any] = []

    async def serve() -> None:
        engine = Engine.load(chosen)
        app, grpc_server = new_app_of(engine), grpc_server_of(engine)
        http_server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(http_server.serve())
        found.extend([await grpc_server.start(), asyncio.get_running_loop()])
        while not http_server.started:
            await asyncio.sleep(0.01)
        started.set()
        await stop.wait()
        http_server.should_exit = True
        await serving
        await grpc_server.stop()
        await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(60), "the server did not start"
    grpc_port, loop = found
    try:
        yield Running(f"127.0.0.1:{port}", f"127.0.0.1:{grpc_port}", made[0][1], made[1][1])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)

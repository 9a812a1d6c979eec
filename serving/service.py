"""The BentoML service: one process, one event loop, one engine, two transports.

BentoML runs the process and answers /healthz, /livez and /readyz. The routes of /v1 and /v2, and /metrics, are an ASGI
application mounted into it, and a grpc.aio server is started beside it on the same loop. The Open Inference Protocol is
added to both here. BentoML's own batching counts items and serves HTTP alone, so it is not used; see
:mod:`serving.queue`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from typing import Any, cast

# BentoML reports usage to its makers unless told not to; whoever sets the variable decides.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
# BentoML's supervisor tells prometheus_client to keep every number in a file, for several workers to share; a full disk
# would then kill the process, and a second server on this machine would delete the files. Here is one worker.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

# gRPC's core writes lines of its own form to stderr, past all loggers: only those that matter.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import bentoml

from serving.commands import safety
from serving.engine.shutdown import Stopping
from serving.http import gate
from serving.http.app import build_app
from serving.http.gate import Gate
from serving.http.sites import Sites
from serving.openinference.http import add_routes
from serving.openinference.inference import TokenEngine
from serving.settings import Format, Level, Settings
from serving.telemetry import log, tracing
from serving.uploads.folder import upload_folder

NAME = "PerturbScope"
app = build_app()
add_routes(app)
# BentoML configures uvicorn in the worker, after it has imported this.
gate.install(Settings.from_env())


def configure_log(settings: Settings) -> None:
    """Configure the log by the settings; in BentoML's supervisor and in its worker."""
    log.configure(cast("Format", settings.log_format), cast("Level", settings.log_level))


@bentoml.service(
    name=NAME,
    workers=1,
    # BentoML's default of a minute would cut long scores short.
    traffic={"timeout": Settings.from_env().request_timeout},
    # The server writes one line a request itself, with the stages' times.
    logging={"access": {"enabled": False}},
    # BentoML would count every path that anybody asks for, and trace HTTP alone: serving.telemetry does both.
    metrics={"enabled": False},
    tracing={"excluded_urls": ".*"},
)
@bentoml.asgi_app(app, path="/")
class PerturbScope:
    """Embed cells, and score what perturbations did to them."""

    def __init__(self) -> None:
        from serving.engine.engine import Engine

        self._settings = Settings.from_env()
        configure_log(self._settings)
        tracing.configure(scheme="https" if self._settings.tls_certificate else "http")
        if left := upload_folder().remove_left_behind():
            log.event("uploads_removed", folders=len(left))
        # A worker that raised here would be started again and again; one that serves what it can says what is wrong.
        self._engine = Engine.load(self._settings, strict=False)
        self._tokens = TokenEngine(self._engine)
        app.state.engine, app.state.tokens = self._engine, self._tokens
        self._stopping: Stopping | None = None

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def preflight() -> None:
        """Refuse to start a server that cannot serve; runs once, before there are workers."""
        from serving.commands import preflight

        settings = Settings.from_env()
        configure_log(settings)
        safety.check_http(settings, sys.argv)
        preflight.check(settings)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Start gRPC on the event loop of HTTP."""
        from serving.grpc.server import GrpcServer
        from serving.openinference.grpc import register

        server = GrpcServer(
            self._engine,
            host=self._settings.host,
            port=self._settings.grpc_port,
            register_more=[functools.partial(register, self._tokens)],
        )
        port = await server.start()
        self._stopping = Stopping(self._engine, server, self._settings.drain_delay)
        self._stopping.listen()
        for warning in safety.warnings(self._settings):
            log.logger.warning(warning)
        self._engine.registry.watch()
        served = self._engine.models().models
        models = ", ".join(model.model_id for model in served) or "no model"
        default = "; the first answers requests that name none" if len(served) > 1 else ""
        sys.stdout.write(
            f"HTTP on {_http_address(self._settings)}, gRPC on {self._settings.host}:{port}\n"
            f"Serving {models} ({self._settings.variant}, {self._settings.device}){default}\n"
        )
        sys.stdout.flush()
        log.event("started", models=models, variant=self._settings.variant, device=self._settings.device)

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Finish the accepted requests of both transports, then stop."""
        if self._stopping is None:
            await self._engine.close()
        else:
            await self._stopping.begin()
            self._stopping.forget()
        await asyncio.to_thread(tracing.close)
        log.event("stopped")

    async def __is_ready__(self) -> bool:
        """Tell whether the models answer; for /readyz."""
        return await self._engine.ready()


cast("Any", PerturbScope).add_asgi_middleware(
    Gate, front=lambda: app.state.engine.front, sites=Sites(Settings.from_env())
)


def _http_address(settings: Settings) -> str:
    """Return the address on which BentoML listens, which it tells its workers."""
    addresses = json.loads(os.environ.get("BENTOML_RUNNER_MAP", "{}"))
    return str(addresses.get(NAME, f"http://{settings.host}:{settings.http_port}"))

"""Keys for whatever the HTTP server answers: BentoML's own pages, and routes that somebody adds and forgets to guard.

Closed unless listed here as open. The routes of /v1 ask once more, in :class:`serving.access.front.Front`, where
rights, shares and deadlines are looked at too.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from perturbscope.errors import PermissionDeniedError, PerturbScopeError
from serving.access.front import Front
from serving.call import REQUEST_ID
from serving.telemetry.metrics import OTHER

OPEN = frozenset({"/", "/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths that tell nothing but whether the server is well, and the empty page of the upload."""
METRICS = "/metrics"
_MAY_READ_METRICS = frozenset({"metrics", "infer"})


class KeyMiddleware:
    """Asks for a key before anything is looked up or read.

    Parameters
    ----------
    app
        What is guarded.
    front
        Gives what knows the callers, once the server is up.
    """

    def __init__(self, app: ASGIApp, front: Callable[[], Front]) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN):
            await self._app(scope, receive, send)
            return
        headers, peer = Headers(scope=scope), (scope.get("client") or [""])[0]
        try:
            caller = self._front().doorkeeper.caller(headers, peer)
            if scope["path"] == METRICS and not caller.rights & _MAY_READ_METRICS:
                raise PermissionDeniedError(f"The API key {caller.name!r} does not have the right 'metrics'.")
        except PerturbScopeError as error:
            if scope["type"] != "http":
                await send({"type": "websocket.close", "code": 1008})
                return
            from serving.http.edge import error_response

            # The path may be anything, so the log has one name for all of them.
            call = Front.begin(OTHER, "http", headers, peer=peer)
            response = error_response(error, scope["path"])
            response.headers[REQUEST_ID] = call.id
            Front.finish(call, response.status_code, error.code)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

"""Requests for paths that nobody answers: BentoML refuses them itself, and they should be seen all the same."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perturbscope.errors import InvalidParameterError
from serving.access.front import Front
from serving.call import REQUEST_ID, Call
from serving.telemetry.metrics import OTHER


class UnansweredMiddleware:
    """Counts and logs, under one name for all paths, what no route answers, and gives it a request id.

    Parameters
    ----------
    app
        What is looked at.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and look at the start of its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        peer = (scope.get("client") or [""])[0]
        call = Call(OTHER, "http", Headers(scope=scope), peer)

        async def look(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (404, 405):
                headers = MutableHeaders(scope=message)
                if REQUEST_ID not in headers:  # an answer of ours has one, and was counted
                    headers[REQUEST_ID] = call.id
                    Front.finish(call, message["status"], InvalidParameterError.code)
            await send(message)

        await self._app(scope, receive, look)

"""A local HTTP server of files that misbehaves on request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """The files of a server, and the faults that it makes."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """For each of the next answers, the bytes after which the connection is closed."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next answers, instead of the file."""
    retry_after: str | None = None
    redirect: bool = False
    send_length: bool = True
    seen: list[str | None] = field(default_factory=list)
    """The Range header of each request that was answered with a part of a file."""
    url: str = ""


@contextmanager
def serve(server: FileServer) -> Iterator[FileServer]:
    """Serve on a free port; `server.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            if server.statuses:
                return self._empty(server.statuses.pop(0))
            if server.redirect and not self.path.startswith("/moved"):
                return self._empty(302, Location=f"{server.url}/moved{self.path}")
            content = server.files.get(self.path.removeprefix("/moved").lstrip("/"))
            if content is None:
                return self._empty(404)
            wanted = self.headers.get("Range")
            server.seen.append(wanted)
            condition = self.headers.get("If-Range")
            start = 0
            if wanted and server.ranges and condition in (None, server.etag):
                start = int(wanted.removeprefix("bytes=").partition("-")[0])
                if start >= len(content):
                    return self._empty(416)
            self.send_response(206 if start else 200)
            if server.send_length:
                self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if server.etag:
                self.send_header("ETag", server.etag)
            self.send_header("Connection", "close")
            self.end_headers()
            stop = start + server.cut_after.pop(0) if server.cut_after else len(content)
            self.wfile.write(content[start:stop])
            return None

        def _empty(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if server.retry_after:
                self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Print nothing: some tests hang up on purpose."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()

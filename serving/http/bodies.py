"""Bodies of HTTP requests: read within the limits, whatever their type."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError, LimitExceededError, OverloadedError, UnsupportedMediaTypeError
from serving.access.limits import decoded_bytes, too_many_bytes
from serving.call import Call
from serving.engine.engine import Engine, size_of
from serving.engine.operations import Operation
from serving.uploads.readers import file_readers
from serving.uploads.requests import FILE_NAME, Upload

T = TypeVar("T")
MULTIPART = "multipart/form-data"
HDF5_TYPES = (protocol.HDF5, "application/octet-stream")
"""Media types of an .h5ad file as the raw body; curl --data-binary is often told the second."""
_MAX_FIELD_BYTES = 2**20
_WRITTEN_AT_ONCE = 2**20
"""Bytes that are written to disk at a time."""


class LimitedBody:
    """A request whose body is counted, and timed, while it arrives.

    Parameters
    ----------
    request
        The request, whose body is not read yet.
    engine
        Has the limits.
    held
        Called with the number of bytes as they arrive.
    call
        The call that is timed.
    """

    def __init__(self, request: Request, engine: Engine, held: Callable[[int], None], call: Call | None = None) -> None:
        self.call = call or Call(request.url.path, "http")
        self.headers = request.headers
        self.content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.query = dict(request.query_params)
        json = self.content_type == protocol.JSON
        self._limit = min(engine.settings.max_json_bytes if json else 2**63, engine.settings.max_body_bytes)
        self._timeout = engine.settings.body_timeout
        self._held = held
        self._received = 0
        self._receive: Receive = request.receive
        self._request = Request(request.scope, self._counted)

    async def _counted(self) -> Message:
        """Receive the next message of the body, and count it."""
        message = await self._receive()
        n_bytes = len(message.get("body", b""))
        self._received += n_bytes
        if self._received > self._limit:
            raise too_many_bytes(self._limit, self.content_type)
        self._held(n_bytes)
        return message

    @contextlib.asynccontextmanager
    async def _timed(self) -> AsyncIterator[None]:
        """Time the arrival of the body, and end it when it takes too long."""
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise too_many_bytes(self._limit, self.content_type)
        try:
            with self.call.stage("receive"):
                async with asyncio.timeout(self._timeout):
                    yield
        except TimeoutError as error:
            raise LimitExceededError(
                f"The body did not arrive within {self._timeout} seconds. Send less at a time.", field="body"
            ) from error

    async def body(self) -> bytes:
        """Read the whole body."""
        async with self._timed():
            return await self._request.body()

    async def decoded(self, engine: Engine, decode: Callable[[bytes], T], body: bytes) -> T:
        """Decode a body. The memory for decoding is held before, and that of the outcome until the call ends."""
        with self.call.stage("decode"):
            needed = await engine.work(decoded_bytes, self.content_type, body)
            self.call.reserve(needed)
            found = await engine.work(decode, body)
        if self.call.held is not None:
            self.call.held.release_reserved(needed)
        self.call.reserve(size_of(found))
        return found

    async def save(self, path: Path) -> None:
        """Write the body to a file as it arrives."""
        pending = bytearray()
        async with self._timed():
            with path.open("wb") as file:
                async for part in self._request.stream():
                    pending += part
                    if len(pending) >= _WRITTEN_AT_ONCE:
                        # On a thread: a slow disk must not hold up the other requests.
                        await asyncio.to_thread(file.write, pending)
                        pending = bytearray()
                await asyncio.to_thread(file.write, pending)

    async def form(self, path: Path) -> dict[str, str]:
        """Write the form's `file` to `path`; return its other fields."""
        async with self._timed():
            try:
                form = await self._request.form(max_files=1, max_fields=20, max_part_size=_MAX_FIELD_BYTES)
            except HTTPException as error:
                raise InvalidParameterError(f"The form cannot be read: {error.detail}", field="body") from error
            try:
                fields = {name: value for name, value in form.items() if isinstance(value, str)}
                upload = form.get("file")
                if not isinstance(upload, UploadFile):
                    raise InvalidParameterError(
                        "The form has no file. Send the .h5ad file in the field 'file': curl -F file=@cells.h5ad.",
                        field="file",
                    )
                await asyncio.to_thread(_copy, upload, path)
                return fields
            finally:
                await form.close()


def _copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, _WRITTEN_AT_ONCE)


@contextlib.contextmanager
def room_on_disk() -> Iterator[None]:
    """Raise OverloadedError when the disk is full; the caller removes what was written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OverloadedError(
            "The server has no disk left to keep an uploaded file on while it reads it. Try again after the stated "
            "time, or send the cells as JSON or Arrow, as the clients do: that needs no disk. (Its operator: make room "
            "in the directory for temporary files, or set TMPDIR to another.)",
            retry_after=30.0,
        ) from error


async def read_request(request: LimitedBody, operation: Operation, engine: Engine) -> Upload:
    """Read the request in a body of JSON or Arrow, or in an uploaded .h5ad file."""
    kind = request.content_type
    if kind in operation.decode:
        if request.query:
            raise InvalidParameterError(
                f"The query parameter {next(iter(request.query))!r} has no effect here; put it into the body.",
                field=next(iter(request.query)),
            )
        body = await request.body()
        return Upload(await request.decoded(engine, operation.decode[kind], body))
    if kind not in (*HDF5_TYPES, MULTIPART):
        raise UnsupportedMediaTypeError(
            f"The content type {kind or '(none)'!r} is not understood. Send "
            f"{''.join(f'{media_type}, ' for media_type in operation.decode)}"
            f"an .h5ad file as {protocol.HDF5}, or a form ({MULTIPART}) with the .h5ad file in the field 'file'.",
            field="content-type",
        )
    with room_on_disk(), tempfile.TemporaryDirectory(prefix="perturbscope-") as directory:
        path = Path(directory) / FILE_NAME
        parameters: Mapping[str, str] = request.query
        if kind == MULTIPART:
            parameters = {**request.query, **await request.form(path)}
        else:
            await request.save(path)
        with request.call.stage("decode"):
            upload = await file_readers().read(operation.name, path, parameters, engine.settings)
        request.call.reserve(size_of(upload.request))
        return upload

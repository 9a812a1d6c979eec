"""Uploaded .h5ad files: written from the body of a request to disk, while they arrive."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from perturbscope import protocol
from perturbscope.errors import InvalidParameterError, OverloadedError

MULTIPART = "multipart/form-data"
HDF5_TYPES = (protocol.HDF5, "application/octet-stream")
"""Media types of an .h5ad file as the raw body; curl --data-binary is often told the second."""
_MAX_FIELD_BYTES = 2**20
_MAX_NAME = 120
"""Most letters of a file's name that a message repeats."""
_WRITTEN_AT_ONCE = 2**20
"""Bytes that are written to disk at a time."""


async def write_file(request: Request, media_type: str, path: Path) -> tuple[dict[str, str], str]:
    """Write the file in a body to `path`.

    Returns
    -------
    The other fields of the form, if the body is one, and the file's own name, empty if it is not known.
    """
    if media_type == MULTIPART:
        return await _write_form(request, path)
    pending = bytearray()
    with path.open("wb") as file:
        async for part in request.stream():
            pending += part
            if len(pending) >= _WRITTEN_AT_ONCE:
                # On a thread: a slow disk must not hold up the other requests.
                await asyncio.to_thread(file.write, pending)
                pending = bytearray()
        await asyncio.to_thread(file.write, pending)
    return {}, ""


async def _write_form(request: Request, path: Path) -> tuple[dict[str, str], str]:
    try:
        form = await request.form(max_files=1, max_fields=20, max_part_size=_MAX_FIELD_BYTES)
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
        return fields, _own_name(upload.filename or "")
    finally:
        await form.close()


def _own_name(given: str) -> str:
    """Return the last part of a path that a form gives, as it can stand in a message: printable and short."""
    name = "".join(letter for letter in re.split(r"[/\\\\]", given)[-1] if letter.isprintable()).strip()
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 20]}...{name[-17:]}"


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

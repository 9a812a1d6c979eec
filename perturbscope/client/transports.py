"""Requests as HTTP and gRPC calls, and replies as answers or failures. Pure functions, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from perturbscope import protocol
from perturbscope.client.conversation import Failure, failure_of, seconds_of
from perturbscope.client.trace import trace_headers
from perturbscope.errors import (
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    PermissionDeniedError,
    PerturbScopeError,
    ServerError,
    ServerUnreachableError,
    UnauthenticatedError,
)
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.checks import parse_json
from perturbscope.protocol.descriptors import method_of
from perturbscope.protocol.messages import Answer, Request
from perturbscope.protocol.operations import Operation
from perturbscope.protocol.protobuf import message_class

Format = Literal["arrow", "json"]
CODE, FIELD, RETRY_AFTER = "perturbscope-code", "perturbscope-field", "retry-after"
"""Keys of the trailing metadata of a failed gRPC call."""


@dataclass(frozen=True)
class HttpCall:
    """One HTTP request, without its host."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes | None


def http_call(request: Request, body: Format) -> HttpCall:
    """Return a request as an HTTP call; its body and its answer are Arrow or JSON."""
    operation = OPERATIONS.of(request)
    if not operation.has_body:
        return HttpCall("GET", operation.path, {"accept": protocol.JSON, **trace_headers()}, None)
    encode = protocol.request_to_arrow if body == "arrow" else protocol.request_to_json
    kind = protocol.ARROW if body == "arrow" else protocol.JSON
    headers = {"content-type": kind, "accept": kind, **trace_headers()}
    return HttpCall("POST", operation.path, headers, encode(request))


def http_answer(request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Decode the answer of an HTTP response.

    Parameters
    ----------
    headers
        Headers with names in lower case, or a mapping that ignores case, like that of httpx.

    Raises
    ------
    Failure
        The server refused, or its response is not an answer.
    """
    operation = OPERATIONS.of(request)
    if status != 200:
        raise _http_failure(operation.path, status, headers, body)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    decode = {protocol.JSON: protocol.answer_from_json, protocol.ARROW: protocol.answer_from_arrow}.get(kind)
    if decode is None or (kind == protocol.ARROW and not operation.has_arrow):
        raise Failure(
            ServerError(
                f"{operation.path} answered with the content type {kind[:60]!r}, which PerturbScope does not send. "
                "Check the address of the server."
            )
        )
    return _decoded(decode, operation, body, operation.path)


def grpc_call(request: Request) -> tuple[str, Any, Any]:
    """Return a request as the path of a gRPC method, its protobuf message, and the class of the answer."""
    operation = OPERATIONS.of(request)
    return f"/{method_of(operation)}", protocol.request_to_proto(request), message_class(operation.gives)


def grpc_answer(request: Request, message: Any) -> Answer:
    """Decode the answer of a protobuf message. Raises :class:`Failure` if it cannot be read."""
    operation = OPERATIONS.of(request)
    return _decoded(protocol.answer_from_proto, operation, message, operation.rpc)


def grpc_failure(
    status: str, details: str | None, metadata: Iterable[tuple[str, str | bytes]] | None, target: str
) -> Failure:
    """Return the failure that a status other than OK stands for.

    Parameters
    ----------
    status
        Name of the status code, for instance ``UNAVAILABLE``.
    details
        Text of the status.
    metadata
        Trailing metadata.
    target
        Address of the server, for messages.
    """
    sent = {
        name.lower(): value.decode(errors="replace") if isinstance(value, bytes) else value
        for name, value in metadata or ()
    }
    text = details or status
    if CODE in sent:
        return failure_of(sent[CODE], text, sent.get(FIELD) or None, sent.get(RETRY_AFTER))
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return Failure((UnauthenticatedError if status == "UNAUTHENTICATED" else PermissionDeniedError)(text))
    if status == "UNAVAILABLE" and "CERTIFICATE_VERIFY_FAILED" in text:
        return untrusted(target, text)
    if status == "UNAVAILABLE":
        return Failure(ServerUnreachableError(_unreachable(target, text)))
    if status == "DEADLINE_EXCEEDED":
        return Failure(ServerUnreachableError(_too_late(target)), retry=False)
    if status == "RESOURCE_EXHAUSTED":
        # grpc itself refuses a message above the server's limit in this way, and says so in the text only.
        return Failure(LimitExceededError(text) if "larger than max" in text else OverloadedError(text))
    if status == "UNIMPLEMENTED":
        return Failure(ServerError(f"The server at {target} does not know this operation: {text}. Is it older?"))
    if status == "INVALID_ARGUMENT":
        return Failure(InvalidInputError(text))
    return Failure(ServerError(f"The server at {target} failed with {status}: {text}"))


def unreachable(target: str, cause: Exception, *, timed_out: bool) -> Failure:
    """Return the failure to reach an HTTP server, or to get its answer in time.

    A request that timed out is not retried: the server may still be computing.
    """
    if timed_out:
        return Failure(ServerUnreachableError(_too_late(target)), retry=False)
    return Failure(ServerUnreachableError(_unreachable(target, str(cause) or type(cause).__name__)))


def untrusted(target: str, why: str) -> Failure:
    """Return the failure of TLS with a server whose certificate is not trusted; it is not retried."""
    return Failure(
        ServerUnreachableError(
            f"The certificate of {target} is not trusted: {why}. Name the authority that signed it (ca, or "
            "PERTURBSCOPE_CA), and check the address and the certificate's dates."
        ),
        retry=False,
    )


def _unreachable(target: str, why: str) -> str:
    return f"No answer from {target}: {why}. Check the address, and that the server is running."


def _too_late(target: str) -> str:
    return f"No answer from {target} in time. Send fewer cells at a time, or allow a longer timeout."


def _decoded(decode: Callable[..., Answer], operation: Operation[Any, Any], body: Any, where: str) -> Answer:
    try:
        return decode(operation.answer, body)
    except InvalidInputError as error:
        raise Failure(ServerError(f"The answer of {where} cannot be read: {error.message}")) from error


def _http_failure(path: str, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
    data = _json_or_none(body)
    # BentoML wraps errors in a list, and has a plain text under "error".
    if isinstance(data, list) and len(data) == 1:
        data = data[0]
    data = data if isinstance(data, Mapping) else {}
    inner = data.get("error", data)
    hint = headers.get("retry-after")
    if isinstance(inner, Mapping) and isinstance(inner.get("code"), str):
        field = inner.get("field")
        text = str(inner.get("message") or f"The server answered {status}.")
        return failure_of(inner["code"], text, field if isinstance(field, str) else None, hint)
    text = next((item for item in (inner, data.get("detail"), data.get("message")) if isinstance(item, str)), "")
    return Failure(_plain_error(path, status, text[:500], hint))


def _plain_error(path: str, status: int, text: str, hint: str | None) -> PerturbScopeError:
    """Return the error for a status without an error code of ours, as BentoML or a proxy sends it."""
    said = f"{path} was answered with status {status}{': ' + text if text else ''}."
    if status in {400, 415, 422}:
        return InvalidInputError(said)
    if status in {401, 403}:
        return (UnauthenticatedError if status == 401 else PermissionDeniedError)(said)
    if status == 413:
        return LimitExceededError(f"{said} Send fewer cells at a time.")
    if status == 429:
        return OverloadedError(said, retry_after=seconds_of(hint, 1.0))
    if status in {502, 503}:
        return ServerUnreachableError(f"{said} The server behind this address is not ready.")
    if status == 404:
        return ServerError(f"{said} Check the address: it does not lead to a PerturbScope server.")
    return ServerError(said)


def _json_or_none(body: bytes) -> Any:
    try:
        return parse_json(body)
    except InvalidInputError:
        return None

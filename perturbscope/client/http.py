"""Clients over HTTP."""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import unquote_to_bytes

import httpx

from perturbscope.client.access import Files, key_headers, leads_here, tls_context, without_userinfo
from perturbscope.client.base import CONNECT_TIMEOUT, TIMEOUT, AsyncBase, SyncBase
from perturbscope.client.conversation import ChunkLimits, Failure, RetryPolicy
from perturbscope.client.methods import Conversations
from perturbscope.client.transports import Format, http_answer, http_call, unreachable, untrusted
from perturbscope.errors import InvalidParameterError
from perturbscope.protocol.messages import Answer, Request

Transport = TypeVar("Transport", httpx.BaseTransport, httpx.AsyncBaseTransport)


class _OverHttp(Conversations, Generic[Transport]):
    """Settings of both clients over HTTP, checked, and the httpx client that is made with them."""

    _httpx: ClassVar[Callable[..., Any]]
    _http: Any

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        timeout: float = TIMEOUT,
        retries: RetryPolicy | None = None,
        chunks: ChunkLimits | None = None,
        body: Format = "arrow",
        api_key: str | None = None,
        ca: Files | None = None,
        cert: tuple[Files, Files] | None = None,
        headers: Mapping[str, str] | None = None,
        transport: Transport | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model=model, retries=retries, chunks=chunks, seed=seed)
        self._url, userinfo = _checked_url(base_url)
        self._body = _checked_body(body)
        self._http = self._httpx(
            base_url=self._url,
            timeout=_timeout(timeout),
            headers=_headers(self._url, userinfo, api_key, headers),
            verify=_verify(self._url, ca, cert),
            transport=transport,
            # A proxy would be asked to connect to itself, and would see the key.
            mounts=dict.fromkeys(("http://", "https://", "all://")) if leads_here(httpx.URL(self._url).host) else None,
        )


class Client(_OverHttp[httpx.BaseTransport], SyncBase):
    """A blocking client over HTTP.

    Parameters
    ----------
    base_url
        ``http://`` or ``https://``, with or without a path. A name and password before the host are sent as basic
        authentication, for a proxy that asks for them, and shown nowhere. The proxies that the environment names
        (``HTTPS_PROXY`` and others) are used, but not to this machine itself.
    model
        Name of the model; None: the server's default.
    timeout
        Seconds to wait for one answer.
    retries
        When to try again.
    chunks
        Size of one request.
    body
        Format of requests and answers: ``arrow`` is several times faster than ``json``.
    api_key
        Key that is shown to the server; None: that of the environment (:mod:`perturbscope.client.access`); empty: none.
    ca
        File of the authorities (PEM) that are trusted in place of the system's; None: that of the environment.
    cert
        Files (PEM) of the client's own certificate and its private key, for mutual TLS; None: those of the environment.
    headers
        Headers that are added to every request, for instance for a proxy that asks for a token.
    transport
        Transport of httpx; for tests and for special networks.
    seed
        Seed of the jitter between tries.

    Raises
    ------
    InvalidParameterError
        `base_url` is not the address of an HTTP server, or another parameter is out of range.
    """

    _httpx = httpx.Client
    _http: httpx.Client

    def _exchange(self, request: Request) -> Answer:
        call = http_call(request, self._body)
        try:
            reply = self._http.request(call.method, call.path, headers=call.headers, content=call.content)
        except httpx.TransportError as error:
            raise _failure(self._url, error) from error
        return http_answer(request, reply.status_code, reply.headers, reply.content)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncClient(_OverHttp[httpx.AsyncBaseTransport], AsyncBase):
    """An asynchronous client over HTTP. See :class:`Client` for parameters and errors."""

    _httpx = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def _exchange(self, request: Request) -> Answer:
        call = http_call(request, self._body)
        try:
            reply = await self._http.request(call.method, call.path, headers=call.headers, content=call.content)
        except httpx.TransportError as error:
            raise _failure(self._url, error) from error
        return http_answer(request, reply.status_code, reply.headers, reply.content)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _headers(url: str, userinfo: bytes, api_key: str | None, headers: Mapping[str, str] | None) -> dict[str, str]:
    parsed = httpx.URL(url)
    found = key_headers(api_key, parsed.host, encrypted=parsed.scheme == "https")
    if userinfo:
        # The header that the key would go in belongs to the proxy then.
        key = found.pop("authorization", "").removeprefix("Bearer ")
        found |= {"x-api-key": key} if key else {}
        name, _, password = userinfo.partition(b":")
        plain = unquote_to_bytes(name) + b":" + unquote_to_bytes(password)
        found["authorization"] = f"Basic {b64encode(plain).decode()}"
    return {**found, **(headers or {})}


def _verify(url: str, ca: Files | None, cert: tuple[Files, Files] | None) -> ssl.SSLContext | bool:
    """The ``verify`` of httpx; without TLS, certificates that the environment names do not matter."""
    if httpx.URL(url).scheme == "http":
        if ca is not None or cert is not None:
            raise InvalidParameterError(f"ca and cert are for https://, and the address is {url}.", field="ca")
        return True
    return tls_context(ca, cert) or True


def _failure(url: str, error: httpx.TransportError) -> Failure:
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return untrusted(url, str(error))
    connecting = isinstance(error, (httpx.ConnectTimeout, httpx.ConnectError))
    return unreachable(url, error, timed_out=isinstance(error, httpx.TimeoutException) and not connecting)


def _timeout(seconds: float) -> httpx.Timeout:
    if not seconds > 0:
        raise InvalidParameterError(f"timeout is {seconds}; it must be above 0 seconds.", field="timeout")
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT))


def _checked_url(base_url: str) -> tuple[str, bytes]:
    """Return an address without name and password, and these."""
    shown = without_userinfo(base_url) if isinstance(base_url, str) else type(base_url).__name__
    url, why = None, ""
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError) as error:
        # It may quote a part of a password, so that it is not chained either.
        why = "it cannot be read" if "@" in shown else str(error)
    if url is None:
        raise InvalidParameterError(f"{shown!r} is not a URL: {why}.", field="base_url")
    if url.scheme not in {"http", "https"} or not url.host or "@" in f"{url.path}{url.query!r}{url.fragment}":
        raise InvalidParameterError(
            f"{shown!r} is not the address of an HTTP server; give http://host:port.", field="base_url"
        )
    return (str(url.copy_with(userinfo=b"")), url.userinfo) if url.userinfo else (base_url, b"")


def _checked_body(body: Format) -> Format:
    if body not in {"arrow", "json"}:
        raise InvalidParameterError(f"body is {body!r}; it must be 'arrow' or 'json'.", field="body")
    return body

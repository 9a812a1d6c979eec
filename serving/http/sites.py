"""Which sites a browser may ask this server from, and under which names, where no key tells callers apart.

Without keys, whoever reaches the port is a caller, and so is every page that somebody on this machine or network looks
at: it can post to an address that it guesses (the browser then names the page in ``Origin``), or have its own name
resolve to that address (DNS rebinding; the browser then names it in ``Host``). A page cannot send a key that it does
not have, so that a server with keys needs none of this; and under TLS a name that is not in the certificate is refused
by the browser. gRPC is not concerned: browsers do not speak it.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket

from starlette.datastructures import Headers
from starlette.types import Scope

from perturbscope.client.access import is_loopback, leads_here
from perturbscope.errors import PermissionDeniedError
from serving.settings import PREFIX, Settings

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]@/,]+)(?::(\d{0,5}))?", re.IGNORECASE)
_ORIGIN = re.compile(r"(https?)://(.+)", re.IGNORECASE)
_PRIVATE = ("local", "internal", "svc", "lan", "home", "corp", "intranet", "localdomain")
"""Last parts of names that nobody can register in the domain name system of all."""
_LONGEST = 300
"""Most characters of a name with its port."""
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class Sites:
    """Names that requests may ask for, and sites that browsers may send them from.

    Parameters
    ----------
    settings
        Settings of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self._listed = settings.hosts
        self._own = {settings.host.lower(), *(() if settings.keys else (socket.gethostname().lower(),))}
        self._only_this_machine = is_loopback(settings.host) and not self._listed
        self._asks_for_keys = bool(settings.keys)
        self._any_name = bool(settings.keys or settings.tls_certificate)
        # One or two texts, for every request.
        self._known = functools.lru_cache(64)(self._is_well_named)

    def check(self, scope: Scope) -> None:
        """Refuse a request for another name, or of another site's page.

        Raises
        ------
        PermissionDeniedError
            The message names the setting that would allow it.
        """
        headers = Headers(scope=scope)
        host = headers.get("host")
        if host is not None:  # every browser names one
            self._check_host(host)
        if not self._asks_for_keys:
            self._check_site(scope["method"], host or "", headers)

    def _check_host(self, host: str) -> None:
        if len(host) <= _LONGEST and self._known(host):
            return
        raise PermissionDeniedError(
            f"This server is not asked for as {host[:100]!r}. Use its address, or add the name to "
            f"{PREFIX}ALLOWED_HOSTS where it runs; or give it keys ({PREFIX}KEYS).",
            field="host",
        )

    def _is_well_named(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        name = _bare(match[1]) if match else ""
        return bool(name) and self._is_ours(name)

    def _is_ours(self, name: str) -> bool:
        if self._is_listed(name) or leads_here(name):
            return True
        if self._listed:
            return _is_address(name)
        if self._any_name:
            return True
        if self._only_this_machine:
            return False
        return _is_address(name) or name in self._own or "." not in name or name.rpartition(".")[2] in _PRIVATE

    def _is_listed(self, name: str) -> bool:
        return any(
            item in ("*", name) or (item.startswith("*.") and name.endswith(item[1:]))
            for item in (_bare(listed) for listed in self._listed)
        )

    def _check_site(self, method: str, host: str, headers: Headers) -> None:
        origins, site = headers.getlist("origin"), headers.get("sec-fetch-site")
        if site in ("same-origin", "none"):
            return
        if site is not None and method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
            return  # somebody follows a link
        if not origins and site is None:
            return  # no browser, or a GET of one that is too old to say more
        if len(origins) == 1 and self._is_same(origins[0], host, trusted_by_browser=site is None):
            return
        raise PermissionDeniedError(
            f"A page of another site ({', '.join(origins)[:100] or 'not named'}) may not ask this server. If it "
            f"should, add its host to {PREFIX}ALLOWED_HOSTS where the server runs; or give it keys ({PREFIX}KEYS).",
            field="origin",
        )

    def _is_same(self, origin: str, host: str, *, trusted_by_browser: bool) -> bool:
        """Whether a page is of this server, or of a site that is listed."""
        found = _ORIGIN.fullmatch(origin)
        match = _HOST.fullmatch(found[2]) if found else None
        if found is None or match is None:
            return False
        if self._is_listed(_bare(match[1])):
            return True
        own = _HOST.fullmatch(host)
        if own is None or not trusted_by_browser:
            return False
        default = _DEFAULT_PORTS[found[1].lower()]
        return (_bare(match[1]), match[2] or default) == (_bare(own[1]), own[2] or default)


def _bare(name: str) -> str:
    return name.lower().strip("[]").rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""Without keys: which names a request may ask for, and which pages a browser may send it from."""

from __future__ import annotations

import pytest

from perturbscope.errors import InvalidParameterError, PermissionDeniedError
from serving.http.sites import Sites
from serving.settings import Settings

EVERYWHERE = {"host": "0.0.0.0"}
WITH_KEYS = {"host": "0.0.0.0", "keys": "keys.json"}
LISTED = {"host": "0.0.0.0", "allowed_hosts": "cells.example.org, *.lab.example.org"}
PAGE = "http://evil.example"


def allowed(settings: dict[str, str], method: str = "POST", **headers: str) -> bool:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        Sites(Settings(**settings)).check({"type": "http", "method": method, "headers": raw})  # type: ignore[arg-type]
    except PermissionDeniedError as error:
        return "PERTURBSCOPE_ALLOWED_HOSTS" not in error.message
    return True


@pytest.mark.parametrize(
    ("settings", "good", "bad"),
    [
        (
            {},
            [
                "localhost:3000",
                "LOCALHOST.",
                "127.0.0.1:3000",
                "127.9.9.9",
                "[::1]:3000",
                "0.0.0.0:3000",
                "a.localhost",
            ],
            ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "perturbscope", "10.0.0.7", "a.local"],
        ),
        (
            EVERYWHERE,
            [
                "10.0.0.7:3000",
                "[fe80::1]:3000",
                "perturbscope:3000",
                "ps.ns.svc.cluster.local",
                "localhost",
                "a.internal",
            ],
            ["evil.example", "ps.evil.org:3000", "10.0.0.7.nip.io", "localhost@evil.org", "evil.org, localhost", ""],
        ),
        (WITH_KEYS, ["evil.example", "10.0.0.7"], ["a b", "x@evil.example"]),
        ({**EVERYWHERE, "tls_certificate": "a", "tls_key": "b"}, ["evil.example"], []),
        (
            LISTED,
            ["cells.example.org:443", "CELLS.example.org.", "a.lab.example.org", "10.0.0.7", "localhost"],
            ["example.org", "lab.example.org", "xcells.example.org", "perturbscope", "evil.example"],
        ),
        ({**WITH_KEYS, "allowed_hosts": "cells.example.org"}, ["cells.example.org"], ["evil.example"]),
        ({"allowed_hosts": "*"}, ["evil.example"], []),
    ],
    ids=["loopback", "everywhere", "keys", "tls", "listed", "listed with keys", "any"],
)
def test_names_of_the_server(settings: dict[str, str], good: list[str], bad: list[str]) -> None:
    for host in good:
        assert allowed(settings, host=host), host
    for host in bad:
        assert not allowed(settings, host=host), host
    assert allowed(settings)  # no browser leaves it out


def test_pages_of_other_sites_may_not_ask() -> None:
    for settings, host in (({}, "localhost:3000"), (EVERYWHERE, "10.0.0.7:3000")):
        same = f"http://{host}"
        assert allowed(settings, host=host)
        assert allowed(settings, host=host, origin=same)
        assert allowed(settings, host=host, origin=same.upper())
        assert allowed(settings, host=host, origin=PAGE, sec_fetch_site="same-origin")  # a proxy changed the Host
        for origin in (PAGE, "null", "http://localhost:8888", f"{same}.evil.example", f"https://{host}x", ""):
            assert not allowed(settings, host=host, origin=origin), origin
        assert not allowed(settings, host=host, origin=same, sec_fetch_site="cross-site")
        assert not allowed(settings, "GET", host=host, sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
        assert not allowed(settings, host=host, sec_fetch_site="cross-site", sec_fetch_mode="navigate")  # a form
        assert allowed(settings, "GET", host=host, sec_fetch_site="cross-site", sec_fetch_mode="navigate")  # a link
    assert allowed(EVERYWHERE, host="ps:80", origin="http://ps")
    assert allowed(LISTED, host="10.0.0.7:3000", origin="https://cells.example.org", sec_fetch_site="cross-site")
    assert allowed(WITH_KEYS, host="ps", origin=PAGE, sec_fetch_site="cross-site")  # it has no key to send


@pytest.mark.parametrize("value", ["http://a.example", "a.example:80", "*a.example", "a b"])
def test_a_wrong_list_of_names_is_refused(value: str) -> None:
    with pytest.raises(InvalidParameterError, match="ALLOWED_HOSTS"):
        Settings(allowed_hosts=value)

"""API keys: a file of hashes, read again whenever it changes.

A key is ``psk_<id>_<secret>``. Its secret is 256 random bits, so one SHA-256 is enough: slow hashes protect passwords,
which can be guessed, and here they would only let strangers make the server compute. The id is no secret; it finds the
entry, and the hash is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

from perturbscope.errors import InvalidParameterError, UnauthenticatedError
from serving.access.front import Doorkeeper, OpenDoor
from serving.access.rates import FailedKeys
from serving.call import Caller, Right
from serving.telemetry.log import logger

MESSAGE = "This server wants a valid API key. Send it as 'authorization: Bearer KEY' or as 'x-api-key: KEY'."
"""The one message to callers without a good key, whatever is wrong with the key that they sent."""
CLOCK_TOLERANCE = 300.0
"""Seconds that a wall clock may be set back before a key that has expired is noticed by the monotonic clock."""
_KEY = re.compile(r"psk_([0-9a-f]{8})_[A-Za-z0-9_-]{43}", re.ASCII)
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_MAX_FILE_BYTES = 2**20
_NOBODY = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
"""Hash that a key is compared with if no entry has its id, so that the answer takes as long."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of the file.

    Attributes
    ----------
    id
        Eight hexadecimal digits; part of the key.
    name
        Name of the caller, for the log and metrics. Several keys may have one name, while one replaces the other.
    sha256
        Hash of the whole key.
    rights
        Kinds of requests that the key allows.
    expires
        Time from which on the key is refused, ISO 8601 with a time zone; None: never.
    requests_per_minute, cells_per_minute
        Limits of the key's use; None: no limit.
    disabled
        Whether the key is refused now.
    """

    id: str
    name: str
    sha256: str
    rights: tuple[Right, ...] = ("infer",)
    created: str = ""
    expires: str | None = None
    requests_per_minute: int | None = None
    cells_per_minute: int | None = None
    disabled: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and re.fullmatch(r"[0-9a-f]{8}", self.id)):
            _bad(f"the id {self.id!r} is not of eight hexadecimal digits")
        if not (isinstance(self.name, str) and _NAME.fullmatch(self.name)):
            _bad(f"the name {self.name!r} of key {self.id} is not of 1 to 64 letters, digits, '.', '_', '-'")
        if not (isinstance(self.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", self.sha256)):
            _bad(f"sha256 of key {self.id} is not of 64 hexadecimal digits")
        if not self.rights or not set(self.rights) <= set(get_args(Right)):
            _bad(f"the rights of key {self.id} are {list(self.rights)}; choose from {', '.join(get_args(Right))}")
        for name in ("requests_per_minute", "cells_per_minute"):
            limit = getattr(self, name)
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                _bad(f"{name} of key {self.id} is {limit!r}; a whole number above 0 is needed")
        if not isinstance(self.disabled, bool):
            _bad(f"disabled of key {self.id} is {self.disabled!r}; true or false is needed")
        self.expires_at  # noqa: B018  raises if it is no time

    @property
    def expires_at(self) -> float:
        """Time from which on the key is refused, in seconds since 1970; infinite: never."""
        if self.expires is None:
            return float("inf")
        try:
            when = datetime.fromisoformat(self.expires)
        except (TypeError, ValueError):
            _bad(f"expires of key {self.id} is {self.expires!r}; give a time such as 2027-01-31T00:00:00+00:00")
        if when.tzinfo is None:
            _bad(f"expires of key {self.id} is {self.expires!r}, without a time zone; add +00:00")
        return when.timestamp()

    @property
    def caller(self) -> Caller:
        """The caller that sends this key."""
        return Caller(self.name, frozenset(self.rights), self.requests_per_minute, self.cells_per_minute)


def make_key(name: str, **options: Any) -> tuple[Key, str]:
    """Make a new entry, and the key itself, which is stored nowhere."""
    identifier = secrets.token_hex(4)
    text = f"psk_{identifier}_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Key(id=identifier, name=name, sha256=digest(text), created=created, **options), text


def digest(text: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def keys_from_json(data: bytes) -> tuple[Key, ...]:
    """Parse the entries of a file. Raises InvalidParameterError, also for a field that is not known."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise InvalidParameterError(f"The file of keys is not JSON: {error}.", field="keys") from error
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        _bad('it must be of the form {"keys": [{...}, ...]}')
    known = {item.name for item in fields(Key)}
    keys = []
    for entry in entries:
        for name in entry:
            if name not in known:
                _bad(f"unknown field {name!r}; there are {', '.join(sorted(known))}")
        rights = entry.get("rights", ["infer"])
        if not isinstance(rights, list) or not all(isinstance(right, str) for right in rights):
            _bad(f"rights is {rights!r}; a list of words is needed")
        try:
            keys.append(Key(**{**entry, "rights": tuple(rights)}))
        except TypeError as error:
            raise InvalidParameterError(f"The file of keys is bad: id, name or sha256 is missing ({error}).") from error
    if len({key.id for key in keys}) < len(keys):
        _bad("two keys have the same id")
    return tuple(keys)


def keys_to_json(keys: tuple[Key, ...]) -> bytes:
    """Return the content of a file of keys."""
    return json.dumps({"keys": [asdict(key) for key in keys]}, indent=1).encode() + b"\n"


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the entries of a file. Raises InvalidParameterError if it is missing, too large or bad."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidParameterError(f"{path} cannot be read: {error.strerror}.", field="keys") from error
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidParameterError(f"{path} is larger than {_MAX_FILE_BYTES} bytes.", field="keys")
    return keys_from_json(data)


class KeyFile:
    """The doorkeeper of a server with a file of keys.

    A changed file counts from the next request on. If the new one is bad or gone, the keys of the last good one stay
    and the log says so: a slip of the hand neither locks everyone out nor lets anyone in.

    A key expires by the wall clock. The time at which the process began, carried on by the monotonic clock, counts too,
    with five minutes of tolerance: setting the wall clock back does not revive a key that has expired. While the wall
    clock is wrongly set forward, keys that it takes for expired are refused.

    Parameters
    ----------
    path
        File of keys.
    wall, monotonic
        Functions that return the time of the two clocks, in seconds.

    Raises
    ------
    InvalidParameterError
        The file is missing or bad; the server does not start.
    """

    def __init__(
        self,
        path: Path,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._wall, self._monotonic = path, wall, monotonic
        self._started = wall() - monotonic()
        self._failed = FailedKeys(clock=monotonic)
        self._signature = self._file_state()
        self._keys = self._by_id(read_keys(path))

    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        """Return the caller that sent these headers from the address `peer`.

        Raises
        ------
        UnauthenticatedError
            There is no key, more than one, or one that is unknown, disabled or expired.
        RateLimitedError
            The address has sent many bad keys.
        """
        self._reload()
        credentials = _credentials(headers)
        text = credentials[0] if len(credentials) == 1 else ""
        match = _KEY.fullmatch(text)
        key = self._keys.get(match[1]) if match else None
        fits = hmac.compare_digest(digest(text), key.sha256 if key else _NOBODY)
        if not fits or key is None:
            why = "none" if not credentials else "several" if len(credentials) > 1 else "unknown"
            self._refuse(peer, why, None)
        if key.disabled:
            self._refuse(peer, "disabled", key)
        if self._is_over(key.expires_at):
            self._refuse(peer, "expired", key)
        return key.caller

    def _is_over(self, when: float) -> bool:
        return self._wall() >= when or self._started + self._monotonic() >= when + CLOCK_TOLERANCE

    def _refuse(self, peer: str, why: str, key: Key | None) -> NoReturn:
        if peer:
            self._failed.count(peer)
            # The text that was sent is not logged: it may be a good key with one letter too many.
            logger.warning("key refused: %s key=%s peer=%s", why, f"{key.name}/{key.id}" if key else "-", peer[:64])
        raise UnauthenticatedError(MESSAGE)

    def _file_state(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino

    def _reload(self) -> None:
        signature = self._file_state()
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._keys = self._by_id(read_keys(self._path))
        except InvalidParameterError as error:
            logger.error("the file of keys is not usable, the %d keys before stay: %s", len(self._keys), error.message)
        else:
            logger.info("the file of keys was read again: %d keys", len(self._keys))

    def _by_id(self, keys: tuple[Key, ...]) -> dict[str, Key]:
        if not keys:
            logger.warning("the file of keys has no keys: nobody can get in")
        return {key.id: key for key in keys}


def doorkeeper(path: str) -> Doorkeeper:
    """Return the doorkeeper of a server: that of its file of keys or, if none is set, one that lets everyone in."""
    return KeyFile(Path(path)) if path else OpenDoor()


def _credentials(headers: Mapping[str, str]) -> list[str]:
    """Return the keys that the headers hold; a request must have exactly one."""
    every = getattr(headers, "getlist", None) or (lambda name: [headers[name]] if name in headers else [])
    credentials = list(every("x-api-key"))
    for value in every("authorization"):
        scheme, _, text = value.partition(" ")
        if scheme.lower() == "bearer":
            credentials.append(text.strip())
    return credentials


def _bad(what: str) -> NoReturn:
    raise InvalidParameterError(f"The file of keys is bad: {what}.", field="keys")

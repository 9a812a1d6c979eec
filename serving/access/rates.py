"""Rates: token buckets for the requests and cells of each caller, and for the bad keys of each address.

A bucket holds one minute's allowance, fills evenly, and is counted on the monotonic clock, so that setting the wall
clock neither empties nor fills it. The keys of one name share their buckets: rotating a key doubles nothing.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import unquote

from perturbscope.errors import LimitExceededError, RateLimitedError
from serving.call import Caller
from serving.telemetry.brake import Bucket

CELLS_A_SECOND = 50
"""Cells of a caller's share that a second of score work (one core, as estimated) counts as."""
FAILURES_PER_MINUTE = 30
"""Bad keys of one address that are answered and logged as bad keys."""
_PEERS = 4096
"""Addresses that are remembered; the one that was silent for longest is forgotten first."""


class RateLimiter:
    """Counts the requests and cells of each caller; for one event loop.

    Parameters
    ----------
    clock
        Function that returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(self, caller: Caller, cells: int = 0, work: float = 0.0, *, requests: int = 0) -> None:
        """Take from the caller's allowance; a request that is refused takes nothing.

        Parameters
        ----------
        caller
            The sender of the request.
        cells
            Cells to embed or score.
        work
            Seconds of one core that a score is estimated to take. Whole seconds count as :data:`CELLS_A_SECOND` cells
            each, so that a caller without a short score's time is not refused for it.
        requests
            Requests.

        Raises
        ------
        RateLimitedError
            The allowance is used up; ``retry_after`` is the time until it suffices.
        LimitExceededError
            The request has more cells than the caller may have in a whole minute: waiting would not help.
        """
        for what, n, per_minute in (
            ("requests", requests, caller.requests_per_minute),
            ("cells", cells + CELLS_A_SECOND * int(work), caller.cells_per_minute),
        ):
            if n == 0 or per_minute is None:
                continue
            if n > per_minute:
                cost = f"has {n:,} {what}"
                if work:
                    cost = f"needs about {work:,.0f} seconds of scoring, which count as {n:,} cells"
                raise LimitExceededError(
                    f"The request {cost}; the API key {caller.name!r} may have {per_minute:,} a minute. "
                    f"{'Ask for fewer permutations or perturbations' if work else 'Send fewer'} at a time.",
                    field=what,
                )
            now = self._clock()
            bucket = self._buckets.get((caller.name, what))
            if bucket is None or bucket.per_minute != per_minute:
                # The file of keys has changed: the allowance that was used up stays used up.
                used = 0.0 if bucket is None else max(0.0, bucket.per_minute - bucket.level)
                bucket = self._buckets[caller.name, what] = Bucket(per_minute, now)
                bucket.level -= used
            wait = bucket.wait(n, now)
            if wait > 0:
                raise RateLimitedError(
                    f"The API key {caller.name!r} has used up its {per_minute:,} {what} a minute. "
                    f"Try again in {wait:.1f} seconds.",
                    retry_after=wait,
                    field=what,
                )
            bucket.level -= n


class FailedKeys:
    """Counts bad keys by the address that sent them. A good key is never refused because of its neighbours.

    A secret has 256 bits, so that guessing is hopeless at any speed; this bounds the cost of guesses, and the log.

    Parameters
    ----------
    per_minute
        Bad keys per minute and address that are answered as bad keys.
    clock
        Function that returns monotonic seconds.
    """

    def __init__(self, per_minute: int = FAILURES_PER_MINUTE, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def count(self, peer: str) -> None:
        """Count one more bad key of an address. Raises RateLimitedError if there were too many."""
        now, network = self._clock(), network_of(peer)
        bucket = self._buckets.pop(network, None) or Bucket(self._per_minute, now)
        self._buckets[network] = bucket
        if len(self._buckets) > _PEERS:
            self._buckets.popitem(last=False)
        wait = bucket.wait(1, now)
        if wait > 0:
            raise RateLimitedError("Too many requests without a valid API key. Check the key.", retry_after=wait)
        bucket.level -= 1


def network_of(peer: str) -> str:
    """Return the network that an address is counted by: an IPv4 address, or the /64 of an IPv6 address.

    Parameters
    ----------
    peer
        An address, or gRPC's ``ipv4:1.2.3.4:56``, ``ipv6:%5B::1%5D:56``, ``unix:...``.
    """
    text = unquote(peer)
    for scheme in ("ipv4:", "ipv6:"):
        if text.startswith(scheme):
            text = text.removeprefix(scheme).rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)

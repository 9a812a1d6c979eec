"""A brake on what strangers can make the server write: token buckets, and what they leave out."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

_MINUTE = 60.0
PER_MINUTE = 30
"""Lines of one kind and one sender that are logged in a minute."""
ALL_PER_MINUTE = 300
"""Lines of one kind that are logged in a minute, whoever the senders are."""
_MOST = 4096
"""Senders that are remembered; the one that was silent for longest is forgotten first."""


class Bucket:
    """An allowance per minute that fills evenly; full at first.

    Parameters
    ----------
    per_minute
        Allowance per minute, and the most that is saved up.
    now
        Time of the monotonic clock, in seconds.
    """

    __slots__ = ("_at", "level", "per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self.level, self._at = per_minute, float(per_minute), now

    def wait(self, n: int, now: float) -> float:
        """Seconds until the bucket holds `n`; 0 if it does now."""
        self.level = min(self.per_minute, self.level + max(0.0, now - self._at) * self.per_minute / _MINUTE)
        self._at = now
        return max(0.0, (n - self.level) * _MINUTE / self.per_minute)


class Brake:
    """Tells whether a line may be logged, and counts those that may not.

    Parameters
    ----------
    per_minute, all_per_minute
        Lines of one kind in a minute: of one sender, and of all.
    clock
        Function that returns monotonic seconds.
    """

    def __init__(
        self,
        per_minute: int = PER_MINUTE,
        all_per_minute: int = ALL_PER_MINUTE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute, self._all_per_minute, self._clock = per_minute, all_per_minute, clock
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        self._left_out: dict[Hashable, int] = {}

    def left_out(self, kind: Hashable, sender: str = "") -> int | None:
        """Ask to log one line.

        Returns
        -------
        The lines of this kind that were left out since the last one that was not; None: leave out this one too.
        """
        now = self._clock()
        wanted = [self._bucket((kind, sender), self._per_minute, now), self._bucket(kind, self._all_per_minute, now)]
        if any(bucket.wait(1, now) > 0 for bucket in wanted):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return None
        for bucket in wanted:
            bucket.level -= 1
        return self._left_out.pop(kind, 0)

    def _bucket(self, key: Hashable, per_minute: int, now: float) -> Bucket:
        bucket = self._buckets.pop(key, None) or Bucket(per_minute, now)
        self._buckets[key] = bucket
        if len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)
        return bucket


class LibraryFilter(logging.Filter):
    """Leaves out lines of libraries that callers can provoke at will, such as uvicorn's of a request that is no HTTP.

    The lines of one statement of a library are of one kind; those of this project have a brake where they are written.
    """

    def __init__(self, brake: Brake) -> None:
        super().__init__()
        self._brake = brake

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is logged; the first after others that were not says how many those were."""
        if record.name.startswith("perturbscope"):
            return True
        left_out = self._brake.left_out((record.pathname, record.lineno))
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} such lines before it were left out)", ()
        return left_out is not None

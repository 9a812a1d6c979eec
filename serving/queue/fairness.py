"""Fair sharing of one resource between many callers: who is served next, and who still has room.

The order is weighted fair queueing (Demers, Keshav and Shenker 1989) in two levels: flows (the callers with one API
key) share equally, and so do the members of one flow. Ideal sharing would serve all at the same time at equal speed;
here one is served after the other, in the order in which ideal sharing would finish them. A small member therefore
never waits for the whole of a large one, and a large one never starves: those that come later finish later in the end.

All methods run on one thread, or under one lock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

M = TypeVar("M")


@dataclass(eq=False)
class _Level(Generic[M]):
    """Equal sharing between members. The start of a member is the service it got since the level's clock stood at 0.

    The clock is the service that every member would have got under ideal sharing.
    """

    turn: float
    clock: float = 0.0
    starts: dict[M, float] = field(default_factory=dict)
    ahead: float = 0.0
    """Amount by which the clock advances when the service that was charged is over."""

    def join(self, member: M, *, start: float = 0.0) -> None:
        self.starts[member] = max(self.clock, start)

    def charge(self, member: M, amount: float) -> None:
        self.starts[member] += amount
        self.ahead += amount / len(self.starts)

    def settle(self) -> None:
        self.clock += self.ahead
        self.ahead = 0.0
        # Service beyond a member's share was of no use to others, and service that it missed was of no use to it: both
        # count for one turn only.
        earliest, latest = self.clock - self.turn, self.clock + self.turn
        for member, start in self.starts.items():
            self.starts[member] = min(max(start, earliest), latest)


class FairShare(Generic[M]):
    """The order in which members, each of a flow, are served.

    Parameters
    ----------
    turn
        Most that a member is charged at a time. A member that was served ahead of its share, because nobody else could
        be, is set back by at most this much, and one that could not be served is set ahead by no more.
    """

    def __init__(self, turn: float) -> None:
        self._turn = turn
        self._flows: _Level[str] = _Level(turn)
        self._members: dict[str, _Level[M]] = {}
        self._flow_of: dict[M, str] = {}
        self._left: dict[str, float] = {}
        """Flows that left with more than their share; forgotten when the others have caught up."""

    def __len__(self) -> int:
        return len(self._flow_of)

    def rivals(self, flow: str) -> int:
        """Number of parts that the resource would be shared in if one more member of `flow` joined."""
        n_flows = len(self._members) + (flow not in self._members)
        n_members = len(self._members[flow].starts) + 1 if flow in self._members else 1
        return n_flows * n_members

    def join(self, member: M, flow: str) -> None:
        """Add a member; it has the same claim as one that was served equally until now."""
        if flow not in self._members:
            self._members[flow] = _Level(self._turn)
            self._flows.join(flow, start=self._left.pop(flow, 0.0))
        self._members[flow].join(member)
        self._flow_of[member] = flow

    def leave(self, member: M) -> None:
        """Remove a member; one that is not there is ignored."""
        flow = self._flow_of.pop(member, None)
        if flow is None:
            return
        del self._members[flow].starts[member]
        if not self._members[flow].starts:
            del self._members[flow]
            self._left[flow] = self._flows.starts.pop(flow)
        if not self._flow_of:
            self._left.clear()

    def order(self, cost: Callable[[M], float]) -> Iterator[M]:
        """Yield every member once, the next one to be served first.

        Parameters
        ----------
        cost
            Function that returns the cost of what a member would be served next. Charging members while the order is
            read changes what follows.
        """
        heap: list[tuple[float, int, Iterator[tuple[float, M]], float, M]] = []

        def push(at: int, flow: str, rest: Iterator[tuple[float, M]]) -> None:
            following = next(rest, None)
            if following is not None:
                price, member = following
                heapq.heappush(heap, (self._flows.starts[flow] + price, at, rest, price, member))

        for at, (flow, level) in enumerate(self._members.items()):
            prices = {member: cost(member) for member in level.starts}
            # Python's sort is stable: who came first is first.
            members = sorted(prices, key=lambda member: level.starts[member] + prices[member])
            push(at, flow, iter([(prices[member], member) for member in members]))
        flows = list(self._members)
        while heap:
            _, at, rest, _, member = heapq.heappop(heap)
            yield member
            push(at, flows[at], rest)

    def charge(self, member: M, amount: float) -> None:
        """Count `amount` that the member is being served."""
        flow = self._flow_of[member]
        self._flows.charge(flow, amount)
        self._members[flow].charge(member, amount)

    def settle(self) -> None:
        """Advance the clocks by what was charged and has been served; members that join from now on come behind it."""
        self._flows.settle()
        for level in self._members.values():
            level.settle()
        self._left = {flow: start for flow, start in self._left.items() if start > self._flows.clock}


class Room:
    """A limit that several flows fill, and of which large requests leave a part to small ones.

    Nothing is taken that would leave less than a third of its own size free. All that a flow holds keeps to the same
    rule, so that one flow alone fills at most three quarters, two together six sevenths (a dynamic threshold, after
    Choudhury and Hahne 1998). The nameless flow, of callers without a key, is no single caller, and free of the second
    rule. A request that comes when nobody else holds anything needs only to keep to the limit.

    Parameters
    ----------
    limit
        Total amount.
    by_size
        Whether the first rule applies; False if all amounts are alike.
    """

    def __init__(self, limit: int, *, by_size: bool = True) -> None:
        self.limit = limit
        self.used = 0
        self._by_size = by_size
        self._flows: dict[str, int] = {}

    def missing(self, amount: int, flow: str, *, mine: int = 0) -> int:
        """Amount that would have to be given back before `amount` can be taken; 0: it can be taken now.

        Parameters
        ----------
        amount
            Amount that is asked for.
        flow
            Flow of the request.
        mine
            Amount that the same request has taken already.
        """
        free = self.limit - self.used - amount
        missing = -free
        if self._by_size and self.used > mine:
            missing = max(missing, -(-(mine + amount) // 3) - free)
        held = self._flows.get(flow, 0)
        if flow and self.used > mine:
            missing = max(missing, -(-(held + amount - 3 * free) // 4))
        return max(missing, 0)

    def take(self, amount: int, flow: str) -> None:
        """Count `amount`, whether there is room or not."""
        self.used += amount
        self._flows[flow] = self._flows.get(flow, 0) + amount

    def give(self, amount: int, flow: str) -> None:
        """Give back `amount`."""
        self.used -= amount
        # A request that took nothing (one without a body) gives nothing back, and may be the only one of its flow.
        left = self._flows.pop(flow, 0) - amount
        if left:
            self._flows[flow] = left

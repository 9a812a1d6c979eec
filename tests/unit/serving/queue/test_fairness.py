"""Order of fair sharing, and room for small requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.queue.fairness import FairShare, Room


def served(share: FairShare[str], costs: dict[str, float], turns: int) -> list[str]:
    """Members served in the next turns, each the first of the order."""
    found = []
    for _ in range(turns):
        first = next(iter(share.order(costs.__getitem__)))
        share.charge(first, costs[first])
        share.settle()
        found.append(first)
    return found


def test_members_of_equal_turns_alternate() -> None:
    share: FairShare[str] = FairShare(10)
    for name in ("a", "b", "c"):
        share.join(name, "")
    assert served(share, {"a": 10, "b": 10, "c": 10}, 6) == ["a", "b", "c"] * 2


def test_shares_are_equal_whatever_the_size_of_a_turn() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("large", "")
    share.join("small", "")
    turns = served(share, {"large": 10, "small": 2}, 60)
    assert turns.count("small") == 5 * turns.count("large")


def test_flows_share_equally_however_many_members_they_have() -> None:
    share: FairShare[str] = FairShare(10)
    for at in range(5):
        share.join(f"many{at}", "many")
    share.join("one", "one")
    turns = served(share, {f"many{at}": 10.0 for at in range(5)} | {"one": 10.0}, 40)
    assert turns.count("one") == 20
    assert {turns.count(f"many{at}") for at in range(5)} == {4}


def test_who_comes_small_goes_before_who_was_served_for_long() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("bulk", "")
    costs = {"bulk": 10.0, "small": 1.0}
    served(share, costs, 100)
    share.charge("bulk", 10)  # runs
    share.join("small", "")
    share.settle()
    assert served(share, costs, 1) == ["small"]


def test_newcomers_without_end_do_not_starve_who_came_first() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("bulk", "")
    costs = {"bulk": 10.0}
    turns = []
    for at in range(100):
        for name in (f"{at}a", f"{at}b"):  # as many as are served, and one more
            costs[name] = 10.0
            share.join(name, "")
        (name,) = served(share, costs, 1)
        turns.append(name)
        if name != "bulk":
            share.leave(name)
    assert turns.count("bulk") >= 3  # its share falls as the others pile up: 1 + 1/2 + ... + 1/100 = 5.2


def test_time_alone_is_not_held_against_a_member() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("first", "a")
    costs = {"first": 10.0, "second": 10.0}
    served(share, costs, 50)
    share.join("second", "b")
    assert served(share, costs, 10).count("first") == 5


def test_what_nobody_else_could_use_is_held_against_a_member_for_one_turn_only() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("fills", "a")
    share.join("leads", "b")
    for _ in range(50):
        share.charge("leads", 1)
        share.charge("fills", 9)
        share.settle()
    turns = served(share, {"fills": 10, "leads": 10}, 4)
    assert turns == ["leads", "leads", "fills", "leads"]


def test_a_flow_that_comes_and_goes_has_no_more_than_its_share() -> None:
    share: FairShare[str] = FairShare(10)
    share.join("stays", "a")
    costs = {"stays": 10.0}
    turns = []
    for at in range(20):
        name = f"again{at}"
        costs[name] = 10.0
        share.join(name, "b")
        while served(share, costs, 1) == ["stays"]:
            turns.append("stays")
        turns.append("again")
        share.leave(name)
    assert turns.count("stays") >= 18


def test_order_names_everybody_once_and_heeds_what_is_charged_meanwhile() -> None:
    share: FairShare[str] = FairShare(10)
    for name, flow in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        share.join(name, flow)
    found = []
    for member in share.order(lambda _: 5.0):
        share.charge(member, 5)
        found.append(member)
    assert found == ["a1", "b1", "a2"]
    assert share.rivals("a") == 2 * 3
    assert share.rivals("c") == 3
    share.leave("nobody")
    assert len(share) == 3


@given(
    limit=st.integers(1, 10_000),
    asked=st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(["", "x", "y"])), max_size=60),
)
def test_a_room_is_never_overfull_and_what_is_missing_is_enough(limit: int, asked: list[tuple[int, str]]) -> None:
    room = Room(limit)
    held: list[tuple[int, str]] = []
    for amount, flow in asked:
        missing = room.missing(amount, flow)
        if missing:
            # Once so much is given back, of the flow's own where that is what fills it, there is room, or nothing left.
            freed = 0
            held.sort(key=lambda item: item[1] != flow)
            while held and freed < missing:
                given_back = held.pop(0)
                room.give(*given_back)
                freed += given_back[0]
        if not room.missing(amount, flow):
            room.take(amount, flow)
            held.append((amount, flow))
        else:
            assert amount > limit or freed >= 0
        assert room.used == sum(amount for amount, _ in held) <= limit


def test_the_large_leave_room_to_the_small() -> None:
    room = Room(100)
    room.take(60, "")
    assert room.missing(40, "") == 14
    assert room.missing(30, "") == 0
    room.take(30, "")
    assert room.missing(8, "") == 1
    assert room.missing(7, "") == 0
    room.give(60, "")
    assert room.missing(40, "") == 0


def test_a_flow_leaves_a_quarter_to_others_and_the_nameless_one_is_nobody() -> None:
    for flow, most in (("key", 75), ("", 100)):
        room = Room(100, by_size=False)
        while not room.missing(1, flow):
            room.take(1, flow)
        assert room.used == most
    room = Room(100, by_size=False)
    while not room.missing(1, "a"):
        room.take(1, "a")
    while not room.missing(1, "b"):
        room.take(1, "b")
    assert room.used == 75 + 18


def test_who_comes_alone_keeps_to_the_limit_only() -> None:
    room = Room(10)
    assert room.missing(10, "key") == 0
    assert room.missing(11, "key") == 1
    room.take(4, "key")
    assert room.missing(6, "key", mine=4) == 0


def test_who_took_nothing_gives_nothing_back() -> None:
    room = Room(10)
    room.take(4, "key")
    room.give(4, "key")
    room.give(0, "key")
    assert (room.used, room.missing(10, "key")) == (0, 0)

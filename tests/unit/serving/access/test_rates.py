"""Rates of callers, by a clock that only goes forward."""

from __future__ import annotations

import pytest

from perturbscope.errors import LimitExceededError, RateLimitedError
from serving.access.rates import FailedKeys, RateLimiter, network_of
from serving.call import Caller


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


BOTH = Caller("pipeline", requests_per_minute=6, cells_per_minute=600)


def test_a_share_is_used_up_and_comes_back_evenly() -> None:
    clock = Clock()
    rates = RateLimiter(clock)
    for _ in range(6):
        rates.take(BOTH, requests=1)
    with pytest.raises(RateLimitedError, match=r"'pipeline' has used up its 6 requests a minute") as refused:
        rates.take(BOTH, requests=1)
    assert refused.value.retry_after == pytest.approx(10)
    clock.now += 9.9
    with pytest.raises(RateLimitedError):
        rates.take(BOTH, requests=1)
    clock.now += 0.2
    rates.take(BOTH, requests=1)
    clock.now += 1e6  # no more than a minute's share is saved up
    for _ in range(6):
        rates.take(BOTH, requests=1)
    with pytest.raises(RateLimitedError):
        rates.take(BOTH, requests=1)


def test_cells_that_are_refused_are_not_counted() -> None:
    rates = RateLimiter(Clock())
    rates.take(BOTH, 500)
    for _ in range(3):
        with pytest.raises(RateLimitedError) as refused:
            rates.take(BOTH, 200)
        assert refused.value.retry_after == pytest.approx(10)
    rates.take(BOTH, 100)


def test_what_no_waiting_would_allow_is_too_large_and_not_too_early() -> None:
    with pytest.raises(LimitExceededError, match=r"601 cells; the API key 'pipeline' may have 600 a minute"):
        RateLimiter(Clock()).take(BOTH, 601)


def test_callers_do_not_share_unless_they_have_one_name_and_no_limit_is_no_limit() -> None:
    rates = RateLimiter(Clock())
    rates.take(BOTH, 600)
    rates.take(Caller("other", cells_per_minute=600), 600)
    rates.take(Caller("free"), 10**9, requests=1)
    with pytest.raises(RateLimitedError):
        rates.take(Caller("pipeline", frozenset({"admin"}), cells_per_minute=600), 1)


def test_a_new_limit_does_not_give_back_what_was_used() -> None:
    rates = RateLimiter(Clock())
    rates.take(BOTH, 600)
    with pytest.raises(RateLimitedError):
        rates.take(Caller("pipeline", cells_per_minute=700), 200)
    rates.take(Caller("pipeline", cells_per_minute=700), 100)


def test_the_memory_of_addresses_is_bounded() -> None:
    failed = FailedKeys(2, Clock())
    for number in range(5000):
        failed.count(f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(failed._buckets) == 4096


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("ipv4:10.0.0.1:555", "10.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:555", "2001:db8::/64"),
        ("2001:db8::ffff", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5", "10.0.0.1"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("x" * 100, "x" * 64),
        ("", ""),
    ],
)
def test_addresses_are_counted_as_networks(peer: str, network: str) -> None:
    assert network_of(peer) == network

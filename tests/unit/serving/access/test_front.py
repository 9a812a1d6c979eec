"""What every request passes before it costs anything."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from perturbscope.errors import (
    DeadlineExceededError,
    InvalidParameterError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from serving.access.front import Front
from serving.access.limits import Admission
from serving.call import Call, Caller
from serving.settings import Settings


def begin(headers: Mapping[str, str], **options: float) -> Call:
    return Front.begin("/v1/embed", "http", headers, **options)


@pytest.fixture
def admission() -> Admission:
    return Admission(Settings(max_requests=1))


async def test_the_callers_id_is_kept_only_if_it_is_harmless() -> None:
    assert begin({"x-request-id": "job-7:a.b"}).id == "job-7:a.b"
    for given in ("", "a b", "x" * 65, "line\nbreak", "ü"):
        assert begin({"x-request-id": given}).id != given
    assert begin({}).id != begin({}).id


async def test_what_runs_past_the_deadline_is_cancelled_and_named(admission: Admission) -> None:
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(DeadlineExceededError, match="The time that the caller allowed is over"):
        async with Front(admission).admitted(begin({"x-request-timeout": "0.05"})):
            await work()
    assert cancelled
    with admission.admit():
        pass  # its place is free again


async def test_the_nearer_of_two_deadlines_counts(admission: Admission) -> None:
    call = begin({"x-request-timeout": "100"}, remaining=5.0)
    async with Front(admission).admitted(call):
        remaining = call.remaining()
        assert remaining is not None
        assert 0 < remaining <= 5.0


async def test_a_timeout_of_our_own_is_not_blamed_on_the_caller(admission: Admission) -> None:
    with pytest.raises(TimeoutError):
        async with Front(admission).admitted(begin({})):
            raise TimeoutError("a bug")


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "nan", "inf", "1e10", "0.0001", "\uff11", " 1"])
async def test_a_timeout_that_is_no_number_of_seconds_is_refused(admission: Admission, text: str) -> None:
    with pytest.raises(InvalidParameterError, match="give seconds such as 30"):
        async with Front(admission).admitted(begin({"x-request-timeout": text})):
            pass


class Porter:
    def caller(self, headers: Mapping[str, str], peer: str = "") -> Caller:
        if headers.get("authorization") != "Bearer good":
            raise UnauthenticatedError("No API key.")
        return Caller("pipeline")


async def test_the_caller_is_known_and_has_only_its_rights(admission: Admission) -> None:
    front, call = Front(admission, Porter()), begin({"authorization": "Bearer good"})
    async with front.admitted(call):
        assert call.caller.name == "pipeline"
    with pytest.raises(UnauthenticatedError):
        async with front.admitted(begin({})):
            pass
    with pytest.raises(PermissionDeniedError, match="'pipeline' does not have the right 'admin'"):
        async with front.admitted(call, "admin"):
            pass
    with pytest.raises(PermissionDeniedError, match="this server has no keys"):
        async with Front(admission).admitted(begin({}), "admin"):
            pass

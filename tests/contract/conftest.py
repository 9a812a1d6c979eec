"""The toy family is known to every test of the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.toy_family import registered


@pytest.fixture(autouse=True, scope="package")
def _toy_family() -> Iterator[None]:
    with registered():
        yield

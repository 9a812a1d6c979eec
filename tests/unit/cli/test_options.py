"""Groups of options: the signature that typer sees, and the arguments of the command."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from perturbscope.cli.options import grouped


@dataclass(frozen=True, kw_only=True)
class Inner:
    deep: Annotated[int, typer.Option()] = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    needed: str
    several: list[str] = field(default_factory=lambda: ["a"])
    inner: Inner


def test_a_group_becomes_its_members_and_comes_back_as_one_object() -> None:
    calls: list[Any] = []

    @grouped
    def command(first: str, outer: Outer, last: bool = False) -> None:
        calls.append((first, outer, last))

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", "needed", "several", "deep", "last"]
    assert parameters["needed"].default is inspect.Parameter.empty
    assert (parameters["several"].default, parameters["deep"].default) == (["a"], 3)
    command(first="x", needed="y", several=["b"], deep=4, last=True)
    assert calls == [("x", Outer(needed="y", several=["b"], inner=Inner(deep=4)), True)]

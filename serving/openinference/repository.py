"""Loading and unloading models over the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perturbscope.errors import InvalidParameterError
from perturbscope.protocol import checks as check
from serving.engine.engine import Engine

UNLOAD_PARAMETERS = ("unload_dependents",)
"""Parameters that clients send with every request to unload; no model here depends on another."""


def index(engine: Engine, *, only_ready: bool) -> list[dict[str, str]]:
    """List the models that are loaded, and the bundle folders that are not, with the reason."""
    return [
        {"name": listed.name, "version": listed.version, "state": listed.state, "reason": listed.reason}
        for listed in engine.registry.index()
        if listed.state == "READY" or not only_ready
    ]


async def load(engine: Engine, name: str, parameters: Mapping[str, Any]) -> None:
    """Load the bundle of the folder `name`, or load it again if it has changed. Raises as `ModelRegistry.load`.

    Raises
    ------
    InvalidParameterError
        There are parameters: a model is loaded as its bundle is, without a configuration or files of the caller.
    """
    _check(parameters, ())
    await engine.registry.load(name)


async def unload(engine: Engine, name: str, parameters: Mapping[str, Any]) -> None:
    """Unload every version of the model `name`, or the model of the folder `name`. Raises UnknownModelError."""
    _check(parameters, UNLOAD_PARAMETERS)
    versions: list[str | None] = [info.version for info in engine.registry.infos() if info.name == name]
    for version in versions or [None]:
        await engine.registry.unload(name, version)


def _check(parameters: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(parameters, Mapping):
        raise InvalidParameterError("parameters must be an object.", field="parameters")
    for name in parameters:
        if name not in allowed:
            raise InvalidParameterError(
                f"The parameter {check.shown(name)} is not supported here: a model is loaded as its bundle is. "
                "Leave it out.",
                field=check.printable(str(name)),
            )

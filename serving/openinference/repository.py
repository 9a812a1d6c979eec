"""Loading and unloading models in the protocol's way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perturbscope.errors import InvalidParameterError
from perturbscope.wire import fields as check
from serving.engine import Engine

UNLOAD_PARAMETERS = ("unload_dependents",)
"""What clients send with every request to unload; no model here depends on another."""


async def load(engine: Engine, name: str, parameters: Mapping[str, Any]) -> None:
    """Load the bundle of the folder `name`, or load it again.

    Raises
    ------
    InvalidParameterError
        Parameters: a model is loaded as its bundle is, without a configuration or files of the caller.
    """
    _check(parameters, ())
    registry: Any = engine.registry
    await registry.load(name)


async def unload(engine: Engine, name: str, parameters: Mapping[str, Any]) -> None:
    """Unload every version of the model `name`. Raises UnknownModelError."""
    _check(parameters, UNLOAD_PARAMETERS)
    with engine.registry.lease(name):
        pass
    for info in engine.registry.infos():
        if name in (info.name, info.model_id, f"{info.name}@{info.version}"):
            registry: Any = engine.registry
            await registry.unload(info.name, info.version)


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

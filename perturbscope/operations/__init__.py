"""Operations that are a module of their own: put one here, and every transport, client and command has it.

A module holds two dataclasses, a function that answers a request with a model, and the constant ``OPERATION``
(:class:`perturbscope.protocol.operations.Operation`), which adds them to the table. Nothing else names it.
"""

from importlib import import_module
from pkgutil import iter_modules

from perturbscope.protocol.operations import OPERATIONS

__all__ = ["OPERATIONS"]

for _found in sorted(module.name for module in iter_modules(__path__)):
    OPERATIONS.add(import_module(f"{__name__}.{_found}").OPERATION)

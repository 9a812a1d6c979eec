"""Configurations: frozen dataclasses whose values are checked, read from strict YAML. It imports nothing of training.

A misspelt key that is silently ignored costs a training run; here it is an error that names the closest key. pydantic
checks the types; this module reads the files and says what is wrong, where, and what is needed instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform, get_args, get_type_hints

import pydantic
import yaml
from pydantic.dataclasses import dataclass as checked_dataclass

from perturbscope.errors import InvalidParameterError, UnreadableFileError, near

T = TypeVar("T")
_LATER = "later"
_NEEDED = {
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "bool_type": "true or false is needed",
    "string_type": "text is needed",
    "tuple_type": "a list is needed",
    "dict_type": "keys and values are needed",
    "mapping_type": "keys and values are needed",
    "dataclass_type": "keys and values are needed",
}
"""pydantic's kinds of errors, in the words of this module."""


class SectionError(ValueError):
    """Values of one section do not go together; what ``__post_init__`` raises.

    Parameters
    ----------
    message
        Finding, limit and remedy. If it begins with `field`, the path of the section is put before it.
    field
        Key at fault, relative to the section; empty for the section as a whole.
    """

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def configuration(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that refuses values of another type and unknown names.

    Its objects raise :class:`InvalidParameterError` when they are made, as :func:`parse` does.
    """
    rules = pydantic.ConfigDict(strict=True, extra="forbid")
    made: Any = checked_dataclass(cls, frozen=True, kw_only=True, config=rules)
    checked: Callable[..., None] = made.__init__

    @functools.wraps(checked)
    def initialise(self: Any, **values: Any) -> None:
        try:
            checked(self, **values)
        except pydantic.ValidationError as error:
            raise _explained(error, made, "") from None

    made.__init__ = initialise
    return cast("type[T]", made)


def within(low: float, high: float = float("inf")) -> pydantic.AfterValidator:
    """Return a check, for ``Annotated``, that a number lies from `low` to `high`, both included."""

    def check(value: float) -> float:
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            raise ValueError(f"it must be {limits}")
        return value

    return pydantic.AfterValidator(check)


def later(default: Any) -> Any:
    """Return a field that an earlier version did not have; :func:`plain` leaves it out while it has its default.

    So digests and stored configurations that do not use the field stay those of the earlier version.
    """
    metadata = {_LATER: True}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the configuration `cls`.

    Parameters
    ----------
    cls
        A class made by :func:`configuration`; the types of its fields say what the file may hold.
    path
        The YAML file.
    overrides
        ``key=value`` pairs that replace values of the file, the value as YAML; a dot goes one level down
        (``loop.max_steps=10``).

    Raises
    ------
    UnreadableFileError
        The file is missing, or is not YAML.
    InvalidParameterError
        A key is unknown (the message names the closest known one) or missing, or a value has another type or is out of
        its range.
    """
    return parse(cls, _load(path, overrides))


def section(cls: type[T], path: str | Path, name: str, overrides: Sequence[str] = ()) -> T:
    """Read one top-level section of a YAML file; the other sections are not looked at. Raises as :func:`read`."""
    values = _load(path, overrides)
    if not isinstance(values.get(name), dict):
        raise InvalidParameterError(f"The configuration {path} has no section {name!r}.", field=name)
    return parse(cls, values[name], where=name)


def has_key(path: str | Path, name: str, overrides: Sequence[str] = ()) -> bool:
    """Return whether a YAML file has a top-level key. Raises as :func:`read`."""
    return name in _load(path, overrides)


def parse(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build the configuration `cls` from plain values; `where` is the path of keys to them. Raises as :func:`read`."""
    # As JSON, in which a list may become a tuple and keys and values a dataclass, and nothing else is converted.
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(values, default=_refuse))
    except pydantic.ValidationError as error:
        raise _explained(error, cls, where) from None
    except (ValueError, RecursionError) as error:  # of json
        raise InvalidParameterError(f"The configuration refers to itself: {error}.", field=where or None) from error


def plain(value: Any) -> Any:
    """Return a configuration as values that JSON and YAML hold; the inverse of :func:`parse`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = (item for item in dataclasses.fields(value) if not _is_unused(item, getattr(value, item.name)))
        return {item.name: plain(getattr(value, item.name)) for item in kept}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _is_unused(item: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether a field of :func:`later` has its default."""
    if _LATER not in item.metadata:
        return False
    factory = item.default_factory
    return bool(value == (item.default if factory is dataclasses.MISSING else factory()))


def _load(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506, it is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnreadableFileError(f"The configuration {path} cannot be read: {error}.", field="config") from error
    if not isinstance(loaded, dict):
        raise UnreadableFileError(f"The configuration {path} holds no keys; give 'key: value' lines.", field="config")
    for override in overrides:
        _override(loaded, override)
    return loaded


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# PyYAML follows YAML 1.1, where 1e-3 (without a dot) and 1.5e3 (without a sign) are text; and a date is text here.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InvalidParameterError(f"The override {override!r} is not of the form key=value.", field="set")
    *parents, last = key.split(".")
    at = values
    for parent in parents:
        below = at.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InvalidParameterError(f"The override {key!r} goes below {parent!r}, which has no keys.", field=key)
        at = below
    try:
        at[last] = yaml.load(text, Loader=_Loader)  # noqa: S506, it is a SafeLoader
    except yaml.YAMLError as error:
        raise InvalidParameterError(
            f"The value of the override {override!r} is not YAML: {error}.", field=key
        ) from error


def _refuse(value: Any) -> Any:
    raise InvalidParameterError(f"The configuration holds the {type(value).__name__} {value!r}; write it as text.")


def _explained(error: pydantic.ValidationError, cls: Any, where: str) -> InvalidParameterError:
    """Return the first problem: an unknown key before a missing one, and both before a value."""
    order = ("unexpected_keyword_argument", "missing")
    problems: list[Any] = list(error.errors())
    problems.sort(key=lambda item: order.index(item["type"]) if item["type"] in order else len(order))
    kind, location, value = (problems[0][key] for key in ("type", "loc", "input"))
    name = _dotted(where, location)
    if kind == "unexpected_keyword_argument":
        known = _keys(cls, location[:-1])
        close = _closest(str(location[-1]), known)
        text = f"has no key {location[-1]!r}; it has {', '.join(sorted(known))}.{close}"
        return InvalidParameterError(f"{_titled(_dotted(where, location[:-1]))} {text}", field=name)
    if kind == "missing" and isinstance(location[-1], str):
        title = _titled(_dotted(where, location[:-1]))
        return InvalidParameterError(f"{title} needs the key {location[-1]!r}.", field=name)
    context = problems[0].get("ctx", {})
    reason = context.get("error")
    if isinstance(reason, SectionError):
        name = _dotted(where, (*location, reason.field) if reason.field else location)
        text = str(reason)
        if text.startswith(f"{reason.field} "):
            text = name + text.removeprefix(reason.field)
        return InvalidParameterError(text, field=name)
    if kind in {"missing", "too_long"}:  # entries of a tuple
        at = location[:-1] if kind == "missing" else location
        length = context.get("max_length") or 1 + max(item["loc"][-1] for item in problems if item["loc"][:-1] == at)
        name = _dotted(where, at)
        return InvalidParameterError(f"{name} has {len(value)} entries; {length} are needed.", field=name)
    needed = _NEEDED.get(kind) or str(reason or problems[0]["msg"])
    close = ""
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        needed, close = f"it must be one of {', '.join(allowed)}", _closest(str(value), allowed)
    return InvalidParameterError(f"{name} is {value!r}; {needed}.{close}", field=name)


def _keys(hint: Any, location: Sequence[int | str]) -> list[str]:
    """Return the keys of the section at `location` of the configuration class `hint`."""
    for part in location:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint)[str(part)]
        else:  # an entry of a tuple or dict
            hint = next(option for option in get_args(hint) if dataclasses.is_dataclass(option))
        if type(None) in get_args(hint):
            hint = get_args(hint)[0]
    return [item.name for item in dataclasses.fields(hint)]


def _closest(name: str, known: list[str]) -> str:
    close = near(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _titled(where: str) -> str:
    return f"The section {where!r} of the configuration" if where else "The configuration"


def _dotted(where: str, location: Sequence[int | str]) -> str:
    path = where
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")

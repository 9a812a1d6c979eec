"""YAML into frozen dataclasses, strictly: every key must exist, every value must have its type.

A misspelt key that is silently ignored costs a training run; here it is an error that names the closest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from perturbscope.errors import InvalidParameterError, UnreadableFileError

T = TypeVar("T")


def read(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into the dataclass `cls`.

    Parameters
    ----------
    cls
        A frozen dataclass; its fields' types say what the file may hold.
    path
        The file.
    overrides
        ``key=value`` pairs that replace values of the file, the value as YAML; a dot goes one level down
        (``loop.max_steps=10``).

    Raises
    ------
    UnreadableFileError
        The file is missing, or is not YAML.
    InvalidParameterError
        An unknown key (with the closest known one), a missing one, a value of another type or out of its range.
    """
    return parse(cls, _load(path, overrides))


def section(cls: type[T], path: str | Path, name: str, overrides: Sequence[str] = ()) -> T:
    """Read one top-level section of a YAML file; the other sections are not looked at. Raises as :func:`read`."""
    values = _load(path, overrides)
    if not isinstance(values.get(name), dict):
        raise InvalidParameterError(f"The configuration {path} has no section {name!r}.", field=name)
    return parse(cls, values[name], where=name)


def has_key(path: str | Path, name: str, overrides: Sequence[str] = ()) -> bool:
    """Whether a YAML file has a top-level key. Raises as :func:`read`."""
    return name in _load(path, overrides)


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


def parse(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build the dataclass `cls` from plain values; `where` is the path of keys to them. Raises as :func:`read`."""
    hints = get_type_hints(cls)
    known = {item.name: item for item in dataclasses.fields(cast("Any", cls))}
    for key in values:
        if key not in known:
            raise InvalidParameterError(
                f"{_at(where)} has no key {key!r}; it has {', '.join(sorted(known))}.{_closest(str(key), list(known))}",
                field=_join(where, str(key)),
            )
    needed = [
        name
        for name, item in known.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in values
    ]
    if needed:
        raise InvalidParameterError(f"{_at(where)} needs the key {needed[0]!r}.", field=_join(where, needed[0]))
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in values.items()})


def plain(value: Any) -> Any:
    """A configuration as values that JSON and YAML hold; the inverse of :func:`parse`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


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


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in {types.UnionType, Union}:
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if hint is Any:
        return value
    if origin is Literal:
        allowed = get_args(hint)
        if value not in allowed:
            raise InvalidParameterError(
                f"{where} is {value!r}; it must be one of {', '.join(map(str, allowed))}."
                f"{_closest(str(value), list(map(str, allowed)))}",
                field=where,
            )
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "keys and values")
        return parse(cast("type[Any]", hint), value, where=where)
    if origin is tuple:
        return _tuple(hint, value, where)
    if origin in {dict, Mapping}:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "keys and values")
        inner = get_args(hint)[1]
        return {str(key): _convert(inner, item, _join(where, str(key))) for key, item in value.items()}
    return _scalar(hint, value, where)


def _tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(where, value, "a list")
    inner = get_args(hint)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise InvalidParameterError(f"{where} has {len(value)} entries; {len(kinds)} are needed.", field=where)
    return tuple(
        _convert(kind, item, f"{where}[{at}]") for at, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(where, value, "true or false")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _wrong(where, value, "a whole number")
    if hint is float:
        # PyYAML follows YAML 1.1, where 1e-3 (without a dot) is text.
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError as error:
                raise _wrong(where, value, "a number") from error
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise _wrong(where, value, "a number")
    if hint is str and isinstance(value, str):
        return value
    raise _wrong(where, value, "text")


def _wrong(where: str, value: Any, needed: str) -> InvalidParameterError:
    return InvalidParameterError(f"{where} is {value!r}; {needed} is needed.", field=where)


def _closest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _at(where: str) -> str:
    return f"The section {where!r} of the configuration" if where else "The configuration"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key

"""The fields of a message: from their types follow JSON, Arrow, protobuf, OpenAPI, uploads, clients and commands.

A message is a frozen dataclass with keyword-only fields, whose class docstring has an ``Attributes`` section with a
sentence about each field. These types are understood:

==============================================  ===================================================================
``CountMatrix``                                 cells
``Vectors``                                     float32 [n, width], one row a cell
``NDArray[np.int64]``, ``np.float32``, ...      one number a row; NaN is null in JSON
``Labels`` (``Annotated[..., PerRow(...)]``)    one string a row
``str``, ``int``, ``float``, ``bool``           one value
``tuple[str, ...]``                             some strings
``str | tuple[str, ...]``                       one string or several; in protobuf the several have a field of
                                                their own, whose name ends in s
``tuple[tuple[str, str], ...]``                 pairs of strings
``ScoreOptions``                                options of a score
``Meta``                                        the model behind an answer
``tuple[SomeDataclass, ...]``                   strings, numbers, lists of strings, rows of these
==============================================  ===================================================================

``| None`` with the default None makes a field one that may be absent. All fields with one entry a row have the same
number of rows; in a request these are cells.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidParameterError
from perturbscope.scoring.results import ScoreOptions

Kind = Literal[
    "cells",
    "vectors",
    "numbers",
    "labels",
    "text",
    "integer",
    "number",
    "flag",
    "texts",
    "names",
    "pairs",
    "options",
    "meta",
    "table",
    "records",
    "outputs",
]
"""What a field holds. ``table`` and ``records`` are rows with columns of several types: scores, pairs, models."""


@dataclass(frozen=True)
class PerRow:
    """Mark of a type that has one entry a row.

    Attributes
    ----------
    column
        Name of the column in Arrow; empty: the name of the field.
    """

    column: str = ""


Labels: TypeAlias = Annotated[tuple[str, ...], PerRow()]
"""One string a row."""
Vectors: TypeAlias = Annotated[NDArray[np.float32], PerRow()]
"""float32 [n, width], one vector a row."""
PER_ROW: frozenset[Kind] = frozenset({"vectors", "numbers", "labels"})
"""Kinds with one entry a row, which are columns in Arrow; all others but cells stand in its metadata."""
SILENT: frozenset[Kind] = frozenset({"cells", "vectors", "texts", "outputs"})
"""Kinds that are left out where they are None; others are null in JSON."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The model behind an answer. Its names and the coverage are None if the caller sent embeddings.

    Attributes
    ----------
    model_id
        Name, version and hash of the model's weights.
    vocabulary_hash
        Hash of its vocabulary.
    coverage
        Report on how the genes of the request were matched to the vocabulary.
    timings
        Seconds by stage: ``tokenize``, ``queue``, ``inference``, ``score``.
    variant
        Graph of the model: ``fp32``, ``fp16``, ``int8``; None also if the server does not say.
    warnings
        Sentences about doubtful cells and genes; those of embeddings and of scores stand there.
    provenance
        Options, seed and sizes that made the numbers of a score; None elsewhere.
    """

    model_id: str | None = None
    vocabulary_hash: str | None = None
    coverage: GeneCoverage | None = None
    timings: dict[str, float] = field(default_factory=dict)
    variant: str | None = None
    warnings: tuple[str, ...] = ()
    provenance: dict[str, Any] | None = None


_FLOAT64 = np.dtype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a message.

    Attributes
    ----------
    name
        Name in the dataclass, in JSON and in protobuf.
    kind
        What the field holds.
    required
        Whether it has no default.
    default
        Value of an absent field.
    optional
        Whether it may be None.
    doc
        Sentence about it.
    column
        Name of the column in Arrow, of a field with one entry a row.
    dtype
        Type of the numbers of ``numbers``.
    columns
        Type of each column of a ``table``.
    record
        Type of a row of ``records``, a dataclass.
    finite
        Whether none of its numbers is NaN.
    derived
        Whether it follows from the others: JSON shows it, and nothing reads it.
    """

    name: str
    kind: Kind
    required: bool = True
    default: Any = None
    optional: bool = False
    doc: str = ""
    column: str = ""
    dtype: np.dtype[Any] = _FLOAT64
    columns: Mapping[str, Kind] = field(default_factory=dict)
    record: type[Any] = object
    finite: bool = False
    derived: bool = False


@dataclass(frozen=True, eq=False)
class Form:
    """The fields of a type of message, in their order, and the way from and to its objects.

    Attributes
    ----------
    name
        Name of the message in protobuf.
    fields
        Its fields.
    take
        Returns the values of an object by field.
    make
        Makes an object of values by field; those with a default may be missing. Raises errors of
        :mod:`perturbscope.errors` if they do not go together.
    """

    name: str
    fields: tuple[Field, ...]
    take: Callable[[Any], Mapping[str, Any]]
    make: Callable[..., Any]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that are read."""
        return tuple(item.name for item in self.fields if not item.derived)

    @functools.cached_property
    def required(self) -> tuple[str, ...]:
        """Names of the fields without a default."""
        return tuple(item.name for item in self.fields if item.required and not item.derived)

    def of(self, *kinds: Kind) -> tuple[Field, ...]:
        """Return the fields of these kinds."""
        return tuple(item for item in self.fields if item.kind in kinds)


def fields_of(message: type[Any]) -> tuple[Field, ...]:
    """Return the fields of a dataclass by its types and its docstring.

    Raises
    ------
    TypeError
        A field has a type that no message can have, or has no sentence in the class docstring.
    """
    hints, docs = get_type_hints(message, include_extras=True), attributes_of(message)
    found = []
    for item in fields(message):
        if item.name not in docs:
            raise TypeError(f"{message.__name__}.{item.name} is not described in the docstring of its class")
        required = item.default is MISSING and item.default_factory is MISSING
        default = None if item.default is MISSING else item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        found.append(
            Field(
                name=item.name,
                required=required,
                default=default,
                doc=docs[item.name],
                **_type_of(hints[item.name], f"{message.__name__}.{item.name}", item.name),
            )
        )
    return tuple(found)


def attributes_of(message: type[Any]) -> dict[str, str]:
    """Return the sentences of the section ``Attributes`` in a class docstring, by attribute."""
    text = inspect.getdoc(message) or ""
    _, heading, section = text.partition("\nAttributes\n----------\n")
    section = re.split(r"\n\n[A-Z]\w*\n-{3,}\n", section)[0] if heading else ""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            names = line.split(", ")
        for name in names if line.startswith(" ") else ():
            found[name] = f"{found[name]} {line.strip()}" if name in found else line.strip()
    return found


def summary_of(message: type[Any]) -> str:
    """Return the first line of a class docstring, without the marks of its cross references."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", (message.__doc__ or "").partition("\n")[0])


_SCALARS: Mapping[Any, Kind] = {str: "text", int: "integer", float: "number", bool: "flag"}


def _type_of(hint: Any, where: str, name: str) -> dict[str, Any]:
    """Return what the type of a field says about it."""
    mark = None
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = type(None) in choices
    (hint, *others) = (choice for choice in choices if choice is not type(None))
    if {hint, *others} == {str, tuple[str, ...]}:
        return {"kind": "names", "optional": optional}
    if get_origin(hint) is Annotated:
        hint, mark = get_args(hint)[0], next((item for item in get_args(hint) if isinstance(item, PerRow)), None)
    kind = _kind_of(hint, mark)
    if kind is None or others:
        raise TypeError(f"{where} has a type that no message can have: {hint}; see {__name__}")
    found: dict[str, Any] = {"kind": kind, "optional": optional}
    if kind in PER_ROW:
        found["column"] = (mark.column if mark else "") or name
    if kind == "numbers":
        found["dtype"] = np.dtype(get_args(get_args(hint)[1])[0])
    if kind == "records":
        found["record"] = get_args(hint)[0]
    return found


def _kind_of(hint: Any, mark: PerRow | None) -> Kind | None:
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is CountMatrix:
        return "cells"
    if hint is ScoreOptions:
        return "options"
    if hint is Meta:
        return "meta"
    if get_origin(hint) is np.ndarray:
        scalar = get_args(get_args(hint)[1])[0]
        if mark is not None:
            return "vectors" if scalar is np.float32 else None
        return "numbers" if issubclass(scalar, np.bool_ | np.integer | np.floating) else None
    if get_origin(hint) is tuple and get_args(hint)[1:] == (Ellipsis,):
        inner = get_args(hint)[0]
        if inner is str:
            return "labels" if mark is not None else "texts"
        if inner == tuple[str, str]:
            return "pairs"
        if is_dataclass(inner):
            return "records"
    return None


def plain_form(message: type[Any]) -> Form:
    """Return the form of a dataclass whose fields travel as they are. Raises as :func:`fields_of`."""
    found = fields_of(message)
    names = [item.name for item in found]
    ragged = [item.name for item in found if item.kind in (*PER_ROW, "cells")]

    def make(**values: Any) -> Any:
        built = message(**values)
        counts = {name: len(value) for name in ragged if (value := getattr(built, name)) is not None}
        for name, n in counts.items():
            if n != next(iter(counts.values())):
                raise InvalidParameterError(
                    f"{name} has {n} entries and {next(iter(counts))} {next(iter(counts.values()))}; give one a row.",
                    field=name,
                )
        return built

    def take(value: Any) -> dict[str, Any]:
        return {name: getattr(value, name) for name in names}

    return Form(message.__name__, found, take, make if len(ragged) > 1 else message)

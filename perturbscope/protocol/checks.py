"""Checked reading of untrusted values: each function raises an error that names the field."""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import RECENT, require_even
from perturbscope.errors import (
    InvalidEmbeddingError,
    InvalidInputError,
    InvalidParameterError,
    MalformedMatrixError,
    UnreadableFileError,
)
from perturbscope.protocol.fields import Kind
from perturbscope.scoring.results import ScoreOptions
from perturbscope.threads import checkpoint

MAX_NAME = 512
"""Longest identifier, label or option. numpy pads every string of an array to the longest, so one string of a megabyte
among 60,000 short ones would take hundreds of gigabytes."""

_STEP = 4096
"""Items that are read between two checkpoints, a few milliseconds."""


def parse_json(body: bytes | str, field: str = "body") -> Any:
    """Parse JSON in UTF-8, without a byte order mark.

    NaN is not JSON, but Python writes it: it passes here, and the reader of the number refuses it and names its place.

    Raises
    ------
    UnreadableFileError
        The text is not JSON, is nested too deeply, or has a number that is too long.
    InvalidParameterError
        A name stands twice in one object.
    """
    checkpoint()
    try:
        text = body if isinstance(body, str) else body.decode()
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        what = str(error)
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8"
    except RecursionError:
        what = "it is nested too deeply"
    except ValueError:  # from int(), whose own message advises to raise its limit
        what = "it has a number with thousands of digits"
    raise UnreadableFileError(f"The {field} is not JSON: {what}.", field=field)


def parse_request(body: bytes, field: str = "body") -> Any:
    """Parse JSON as :func:`parse_json` does, but look a list of genes up if the same text came before.

    The value of ``gene_ids`` is then the checked array that :data:`perturbscope.cells.genes.RECENT` has for it. Most of
    a small request is that list. The JSON text of a list means the same wherever a value may stand, so it can be looked
    up in place of being parsed. A body that cannot be parsed so is parsed whole, and refused for its own fault.
    """
    found = _GENES.search(body)
    if found is None:
        return parse_json(body, field)
    start = found.end() - 1
    stop = body.find(b"]", start) + 1
    text = bytes(body[start:stop])
    genes = RECENT.spelled(text)
    if genes is not None:
        # A string that no caller can guess stands for the list.
        short = b'%s"%s"%s' % (body[:start], _STAND_IN.encode(), body[stop:])
        with contextlib.suppress(ValueError, RecursionError, InvalidParameterError):
            data = json.loads(short.decode(), object_pairs_hook=_unique)
            cells = _cells_of(data)
            if cells is not None and cells["gene_ids"] == _STAND_IN:
                cells["gene_ids"] = genes
                return data
    data = parse_json(body, field)
    cells = _cells_of(data)
    if genes is None and cells is not None:
        genes = RECENT.find(cells["gene_ids"])
        # The text may end inside of a name that has a bracket, and be that of another list.
        if genes is not None and _means(text, cells["gene_ids"]):
            RECENT.keep_spelling(text, genes)
    return data


_GENES = re.compile(rb'"gene_ids"\s*:\s*\[')
_STAND_IN = secrets.token_hex(32)


def _means(text: bytes, names: object) -> bool:
    try:
        return bool(json.loads(text) == names)
    except ValueError:
        return False


def _cells_of(data: Any) -> dict[str, Any] | None:
    """Return the object with the names of genes: the cells of a request, or the whole metadata of Arrow."""
    for place in (data.get("cells"), data) if isinstance(data, dict) else ():
        if isinstance(place, dict) and "gene_ids" in place:
            return place
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidParameterError(f"{shown(twice)} is given twice in one object.", field=printable(twice))
    return found


def dump_json(value: Any) -> str:
    """Return JSON text; NaN and infinity become null."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """Return the value with None for NaN and infinity, and plain numbers for numpy's."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short_floats(values: NDArray[np.float32]) -> list[Any]:
    """Return the values as nested lists of numbers of nine digits, which are read back as the same float32.

    The exact digits would be up to seventeen, and the body 1.6 times as long.
    """
    exact = values.astype(np.float64)
    with np.errstate(divide="ignore"):
        digits = 8 - np.floor(np.log10(np.abs(exact)))
    scale = 10.0 ** np.where(exact == 0, 0, digits)
    rounded: list[Any] = (np.rint(exact * scale) / scale).tolist()
    return rounded


def printable(value: str) -> str:
    """Return the start of a caller's string in printable ASCII, for an error message."""
    return value[:60].encode("ascii", "backslashreplace").decode()


def shown(value: Any) -> str:
    """Return a short description of a caller's value, for an error message."""
    if isinstance(value, str):
        return repr(printable(value))
    return (
        f"{type(value).__name__} {printable(str(value))}" if isinstance(value, (int, float)) else type(value).__name__
    )


def mapping(value: Any, field: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return a JSON object after checking that it has all required keys, and no key that is not known."""
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"{field} must be an object; got {shown(value)}.", field=field)
    required = tuple(required)
    allowed = dict.fromkeys((*required, *optional))
    for name in required:
        if name not in value:
            raise InvalidParameterError(f"{field} lacks {name!r}; it needs {', '.join(required)}.", field=name)
    for name in value:
        if name not in allowed:
            raise InvalidParameterError(
                f"{field} has the unknown field {shown(name)}; known are {', '.join(allowed)}.",
                field=printable(str(name)),
            )
    return dict(value)


def text(value: Any, field: str) -> str:
    """Return a string of bounded length that UTF-8 can express."""
    if not isinstance(value, str):
        raise InvalidParameterError(f"{field} must be a string; got {shown(value)}.", field=field)
    return texts([value], field)[0]


def optional_text(value: Any, field: str) -> str | None:
    """Return a string, or None."""
    return None if value is None else text(value, field)


def texts(
    values: Any, field: str, error: type[InvalidInputError] = InvalidParameterError, *, longest: int = MAX_NAME
) -> tuple[str, ...]:
    """Return a list of strings as a tuple."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise error(f"{field} must be a list of strings; got {shown(values)}.", field=field)
    if not set(map(type, values)) <= {str}:
        at, item = next((i, item) for i, item in enumerate(values) if type(item) is not str)
        raise error(f"{field} must hold strings only; number {at} is {shown(item)}.", field=field)
    if max(map(len, values), default=0) > longest:
        at, item = next((i, item) for i, item in enumerate(values) if len(item) > longest)
        raise error(f"{field} number {at} has {len(item)} characters; at most {longest} are allowed.", field=field)
    checkpoint()
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise error(f"{field} holds characters that are not Unicode text (lone surrogates).", field=field) from None
    return tuple(values)


def genes(values: Any, field: str = "gene_ids") -> tuple[str, ...]:
    """Return a list of gene identifiers as a tuple, after checking that an array of them has a size to their measure.

    Raises
    ------
    MalformedMatrixError
        It is no list of strings, or one of them is so long that an array, which makes all as long, would be too large.
    """
    names = texts(values, field, MalformedMatrixError)
    require_even(names, field)
    return names


def numbers(values: Any, field: str, error: type[InvalidInputError] = MalformedMatrixError) -> NDArray[Any]:
    """Return a list of numbers as an array of int64, uint64 or float64; NaN and infinity pass."""
    if not isinstance(values, list):
        raise error(f"{field} must be a list of numbers; got {shown(values)}.", field=field)
    checkpoint()
    if not set(map(type, values)) <= {int, float}:
        at, item = next((i, item) for i, item in enumerate(values) if type(item) not in {int, float})
        raise error(f"{field} must hold numbers only; number {at} is {shown(item)}.", field=field)
    try:
        array = np.asarray(values) if values else np.zeros(0, dtype=np.int64)
    except OverflowError:
        array = np.zeros(0, dtype=np.object_)
    if array.dtype.kind not in "iuf":
        raise error(f"{field} holds an integer that does not fit into 64 bits.", field=field)
    return array


def numbers_as(values: NDArray[Any], field: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return one number a row in the type of its field, after checking that they fit."""
    kinds = {"f": "iuf", "b": "b"}.get(dtype.kind, "iu")
    fits = values.ndim == 1 and values.dtype.kind in kinds
    if fits and dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        fits = int(values.min()) >= limits.min and int(values.max()) <= limits.max
    if not fits:
        raise InvalidParameterError(
            f"{field} has shape {values.shape} and dtype {values.dtype}; one {dtype.name} a row is needed.", field=field
        )
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def rows_of_numbers(values: Any, field: str = "embeddings") -> NDArray[np.float32]:
    """Return a list of lists of numbers as float32 [rows, width]; see :func:`embedding_matrix`."""
    if not isinstance(values, list) or not set(map(type, values)) <= {list}:
        raise InvalidEmbeddingError(f"{field} must be a list with one list of numbers a cell.", field=field)
    widths = set(map(len, values))
    if len(widths) > 1:
        at = next(i for i, row in enumerate(values) if len(row) != len(values[0]))
        raise InvalidEmbeddingError(
            f"{field} is ragged: row 0 has {len(values[0])} numbers, row {at} has {len(values[at])}.", field=field
        )
    flat = numbers(list(chain.from_iterable(values)), field, InvalidEmbeddingError)
    return embedding_matrix(flat.reshape(len(values), widths.pop() if widths else 0))


def embedding_matrix(values: NDArray[Any], field: str = "embeddings") -> NDArray[np.float32]:
    """Return embeddings as float32 [n_cells, width], not empty. The request checks that they are finite."""
    if values.ndim != 2 or not values.size:
        raise InvalidEmbeddingError(f"{field} has shape {values.shape}; cells x width is needed.", field=field)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def count_matrix(
    gene_ids: Any,
    indptr: NDArray[Any],
    indices: NDArray[Any],
    data: NDArray[Any],
    *,
    totals: NDArray[Any] | None,
    first_row: Any = 0,
) -> CountMatrix:
    """Build raw counts from their arrays; names of genes are checked first."""
    known = gene_ids if isinstance(gene_ids, np.ndarray) else RECENT.find(gene_ids)
    names = genes(gene_ids) if known is None else known
    row = integer(first_row, "first_row")
    cells = CountMatrix.from_csr(data, indices, indptr, names, totals=totals, first_row=row)
    if known is None:
        RECENT.keep(names, cells.gene_ids)
    return cells


def score_options(value: Any, field: str = "options") -> ScoreOptions:
    """Return the options of a score; those left out have their defaults."""
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"{field} must be an object; got {shown(value)}.", field=field)
    texts(list(value), field)
    for name, item in value.items():
        if isinstance(item, str):
            text(item, name)
        elif isinstance(item, (list, tuple)):
            texts(item, name)
    return ScoreOptions.from_dict(value)


def names(value: Any, field: str) -> str | tuple[str, ...]:
    """Return one text, or a list of several as a tuple; a list of one is that text."""
    if isinstance(value, str):
        return text(value, field)
    found = texts(value, field)
    if not found:
        raise InvalidParameterError(f"{field} is an empty list; give a string or a list of strings.", field=field)
    return found if len(found) > 1 else found[0]


def pairs(value: Any, field: str = "pairs") -> tuple[tuple[str, str], ...]:
    """Return a list of pairs of labels as tuples."""
    if not isinstance(value, list):
        raise InvalidParameterError(f"{field} must be a list of pairs; got {shown(value)}.", field=field)
    found = []
    for at, item in enumerate(value):
        if at % _STEP == 0:
            checkpoint()
        names = texts(item, field)
        if len(names) != 2:
            raise InvalidParameterError(f"{field} number {at} has {len(names)} labels; a pair has two.", field=field)
        found.append((names[0], names[1]))
    return tuple(found)


def integer(value: Any, field: str) -> int:
    """Return an integer of 64 bits, not below 0."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidParameterError(f"{field} must be an integer from 0 on; got {shown(value)}.", field=field)
    return value


def whole(value: Any, field: str) -> int:
    """Return an integer of 64 bits with its sign."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise InvalidParameterError(f"{field} must be an integer; got {shown(value)}.", field=field)
    return value


def flag(value: Any, field: str) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise InvalidParameterError(f"{field} must be true or false; got {shown(value)}.", field=field)
    return value


def number(value: Any, field: str) -> float:
    """Return a number as a float."""
    if type(value) not in {int, float}:
        raise InvalidParameterError(f"{field} must be a number; got {shown(value)}.", field=field)
    try:
        return float(value)
    except OverflowError:
        raise InvalidParameterError(f"{field} is too large for a float.", field=field) from None


READERS: Mapping[Kind, Callable[[Any, str], Any]] = {
    "labels": texts,
    "texts": texts,
    "names": names,
    "text": text,
    "integer": whole,
    "number": number,
    "flag": flag,
    "options": score_options,
    "pairs": pairs,
}
"""Function that reads each kind of field whose JSON value stands for itself, from its value and its name."""

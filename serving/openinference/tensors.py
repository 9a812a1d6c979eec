"""Tensors of a caller, which are checked and turned into tokens.

Everything here works on numpy arrays and plain numbers; :mod:`.json_codec` and :mod:`.proto_codec` bring them. A shape
is only a claim, so nothing is allocated for it before it agrees with the bytes that have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import EmptyCellError, InvalidParameterError, LimitExceededError, MalformedMatrixError
from perturbscope.families import Family
from perturbscope.families.outputs import Outputs, OutputSpec
from perturbscope.families.tokens import InputSpec, TokenizedCells
from perturbscope.inference.encoder import MASK as ATTENTION_MASK
from perturbscope.protocol.checks import printable
from serving.access.limits import check_shape
from serving.settings import Settings

MASK = ATTENTION_MASK.name
DTYPES: dict[str, str] = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4"}
"""Numpy's names of the types that an input may have."""
PROTOCOL_NAMES = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}
"""The protocol's names of the types of a graph's inputs."""
_TAKEN = {"INT64": ("INT64", "INT32"), "INT32": ("INT32", "INT64"), "FP32": ("FP32",)}
"""Types that are accepted for an input: those that lose nothing, once the range is checked."""
MAX_INPUTS = 16
"""Most tensors of one request; a family has one or two."""
REFUSED = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
"""Parameters of Triton that would change what a request means, and that this server does not have."""
_REFUSED_OF_TENSORS = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification")


@dataclass(frozen=True, eq=False)
class Tensor:
    """An input as it came: its type and bytes agree with its shape, and nothing more is checked.

    Attributes
    ----------
    datatype
        The caller's name of the type; a key of `DTYPES`.
    values
        Values in the caller's shape.
    """

    datatype: str
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class InferRequest:
    """Tokens to be embedded.

    Attributes
    ----------
    inputs
        Input tensors by name.
    outputs
        Wanted outputs by name, and whether as bytes; empty: all of them.
    id
        The caller's name for the request; sent back.
    binary
        Whether outputs that do not say so are wanted as bytes.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, bool | None] = field(default_factory=dict)
    id: str = ""
    binary: bool = False

    def wanted(self, outputs: Sequence[OutputSpec]) -> tuple[OutputSpec, ...]:
        """Return the outputs that are wanted of those of a model.

        Raises
        ------
        InvalidParameterError
            The model has no output of a name.
        """
        known = [spec.name for spec in outputs]
        for name in self.outputs:
            if name not in known:
                raise InvalidParameterError(
                    f"The model has no output {shown_name(name)}; it has {', '.join(map(repr, known))}.",
                    field=printable(name),
                )
        return tuple(spec for spec in outputs if not self.outputs or spec.name in self.outputs)

    def wants_bytes(self, name: str) -> bool:
        """Return whether an output is wanted as bytes."""
        chosen = self.outputs.get(name)
        return self.binary if chosen is None else chosen

    @property
    def length(self) -> int:
        """Number of tokens that the cells are padded to; known once the request is checked."""
        return int(self.inputs[MASK].values.shape[1])

    @property
    def n_slots(self) -> int:
        """Number of tokens of all cells, with padding; known once the request is checked."""
        return int(self.inputs[MASK].values.size)


@dataclass(frozen=True, eq=False)
class InferOutput:
    """One output of an answer.

    Attributes
    ----------
    name
        Name of the output.
    values
        float32 [cells, width], or per token [cells, length, width], 0 behind a cell's last token.
    wants_bytes
        Whether the values are wanted as bytes.
    """

    name: str
    values: NDArray[np.float32]
    wants_bytes: bool = True


@dataclass(frozen=True, eq=False)
class InferAnswer:
    """Outputs for a request's cells.

    Attributes
    ----------
    name, version
        Name and version of the model.
    id
        The caller's name for the request.
    outputs
        The outputs that were asked for.
    """

    name: str
    version: str
    id: str
    outputs: Sequence[InferOutput]


def padded(outputs: Outputs, spec: OutputSpec, length: int) -> NDArray[np.float32]:
    """Return the values of an output in the form of the graph: [cells, width], or [cells, length, width] with zeros."""
    values = outputs[spec.name]
    if spec.per == "cell":
        return values
    slots = np.zeros((len(outputs), length, spec.width), dtype=np.float32)
    slots[np.arange(length) < np.diff(outputs.offsets)[:, None]] = values
    return slots


def shown_name(name: str) -> str:
    """Return a name that a caller sent, fit for a message."""
    return repr(printable(name))


def checked_shape(name: str, datatype: str, shape: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of an input, all of its sizes positive.

    Raises
    ------
    MalformedMatrixError
        The type is not accepted, or a size is below one or larger than any array; the message names the input.
    """
    if datatype not in DTYPES:
        raise MalformedMatrixError(
            f"The input {shown_name(name)} has the datatype {shown_name(datatype)}; {', '.join(DTYPES)} are taken.",
            field=printable(name),
        )
    sizes = tuple(shape)
    if not sizes or any(type(size) is not int or not 0 < size < 2**31 for size in sizes):
        told = printable(str(list(sizes[:8])))
        raise MalformedMatrixError(
            f"The input {shown_name(name)} has the shape {told}; every size must be an integer from 1 on.",
            field=printable(name),
        )
    return sizes


def tensor_of_bytes(name: str, datatype: str, shape: Sequence[Any], raw: bytes | memoryview) -> Tensor:
    """Make a tensor from little-endian bytes, row by row, without a copy. Raises :class:`MalformedMatrixError`."""
    sizes = checked_shape(name, datatype, shape)
    dtype = np.dtype(DTYPES[datatype])
    needed = math.prod(sizes) * dtype.itemsize
    if len(raw) != needed:
        raise MalformedMatrixError(
            f"The input {shown_name(name)} has {len(raw):,} bytes; its shape {list(sizes)} of {datatype} needs "
            f"{needed:,}.",
            field=printable(name),
        )
    return Tensor(datatype, np.frombuffer(raw, dtype).reshape(sizes))


def tensor_of_values(name: str, datatype: str, shape: Sequence[Any], values: NDArray[Any]) -> Tensor:
    """Make a tensor from flat numbers, row by row. Raises :class:`MalformedMatrixError`."""
    sizes = checked_shape(name, datatype, shape)
    if len(values) != math.prod(sizes):
        raise MalformedMatrixError(
            f"The input {shown_name(name)} has {len(values):,} values; its shape {list(sizes)} needs "
            f"{math.prod(sizes):,}.",
            field=printable(name),
        )
    dtype = np.dtype(DTYPES[datatype])
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        if values.dtype.kind not in "iu" or values.min() < limits.min or values.max() > limits.max:
            raise MalformedMatrixError(
                f"The input {shown_name(name)} is {datatype}, but holds numbers that are no integers of that type.",
                field=printable(name),
            )
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused with the rest
        return Tensor(datatype, values.astype(dtype).reshape(sizes))


def check_parameters(parameters: Mapping[str, Any], field_name: str = "parameters") -> None:
    """Refuse parameters that would be silently ignored. Raises :class:`InvalidParameterError`."""
    refused = REFUSED if field_name == "parameters" else _REFUSED_OF_TENSORS
    for name in refused:
        if name in parameters:
            raise InvalidParameterError(
                f"The parameter {name!r} is not supported here; leave it out"
                + (" and set a deadline, or the header x-request-timeout." if name == "timeout" else "."),
                field=name,
            )


def tokens_of(request: InferRequest, family: Family, settings: Settings) -> TokenizedCells:
    """Return the tokens of a request's cells, without padding.

    Raises
    ------
    MalformedMatrixError
        An input is missing or unknown, has another type or shape than the model takes, or padding inside of a cell.
    EmptyCellError
        A cell has no token.
    InvalidParameterError
        A token that is not in the vocabulary, or a value that is not finite.
    LimitExceededError
        Too many cells, or a cell that is longer than the model's longest.
    """
    specs = (*family.inputs, ATTENTION_MASK)
    _check_names(request.inputs, specs)
    mask_values = request.inputs[MASK].values
    for spec in reversed(specs):  # the mask first, for the others are held against it
        _check_form(spec, request.inputs[spec.name], mask_values.shape)
    check_shape(settings, len(mask_values), 0, 0)
    lengths = _lengths(mask_values)
    longest = int(lengths.max())
    if longest > family.max_length:
        raise LimitExceededError(
            f"The cell in row {int(lengths.argmax())} of {MASK!r} has {longest:,} tokens; the model takes "
            f"{family.max_length:,}. Keep the first ones.",
            field=MASK,
        )
    mask = mask_values.astype(np.bool_)
    values = {spec.name: _kept(spec, request.inputs[spec.name], mask, lengths) for spec in family.inputs}
    return TokenizedCells(
        arrays={spec.name: values[spec.name] for spec in family.inputs if spec.per == "token"},
        per_cell={spec.name: values[spec.name] for spec in family.inputs if spec.per == "cell"},
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
        # The counts behind the tokens are not known here, and nothing is told of them.
        known_share=np.ones(len(lengths), dtype=np.float32),
        n_detected=lengths.astype(np.int32),
        coverage=GeneCoverage(0, 0),
    )


def _check_names(inputs: Mapping[str, Tensor], specs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in specs]
    for name in names:
        if name not in inputs:
            raise MalformedMatrixError(
                f"The input {name!r} is missing; the model takes {', '.join(names)}.", field=name
            )
    for name in inputs:
        if name not in names:
            raise MalformedMatrixError(
                f"The model has no input {shown_name(name)}; it takes {', '.join(names)}.", field=printable(name)
            )


def _check_form(spec: InputSpec, tensor: Tensor, mask_shape: tuple[int, ...]) -> None:
    """Check type and shape, the latter against that of the mask."""
    wanted = PROTOCOL_NAMES[spec.dtype]
    if tensor.datatype not in _TAKEN[wanted]:
        raise MalformedMatrixError(
            f"The input {spec.name!r} has the datatype {tensor.datatype}; the model takes {wanted}.", field=spec.name
        )
    names = ("batch",) if spec.per == "cell" else ("batch", "length")
    shape, n_axes = tensor.values.shape, len(names) + len(spec.trailing)
    if len(shape) != n_axes or shape[len(names) :] != spec.trailing:
        axes = ", ".join((*names, *map(str, spec.trailing)))
        raise MalformedMatrixError(
            f"The input {spec.name!r} has the shape {list(shape[:8])}; [{axes}] is needed.", field=spec.name
        )
    if shape[: len(names)] != mask_shape[: len(names)]:
        raise MalformedMatrixError(
            f"The input {spec.name!r} has the shape {list(shape)}, but {MASK!r} has {list(mask_shape[:8])}; "
            f"{' and '.join(names)} must agree.",
            field=spec.name,
        )


def _lengths(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Count the tokens of each cell; its mask must be ones first, then zeros."""
    if ((mask != 0) & (mask != 1)).any():
        row = int(np.flatnonzero(((mask != 0) & (mask != 1)).any(axis=1))[0])
        raise MalformedMatrixError(f"Row {row} of the input {MASK!r} holds another number than 0 and 1.", field=MASK)
    lengths: NDArray[np.int64] = mask.sum(axis=1, dtype=np.int64)
    if not lengths.all():
        raise EmptyCellError(
            f"Row {int(np.flatnonzero(lengths == 0)[0])} of the input {MASK!r} is all 0: a cell needs a token. "
            "Leave such cells out.",
            field=MASK,
        )
    gaps = (np.diff(mask, axis=1) > 0).any(axis=1)
    if gaps.any():
        raise MalformedMatrixError(
            f"Row {int(np.flatnonzero(gaps)[0])} of the input {MASK!r} has a 1 after a 0; a cell's tokens come first "
            "and its padding last.",
            field=MASK,
        )
    return lengths


def _kept(spec: InputSpec, tensor: Tensor, mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """Return the values of an input without padding, cells end to end, [tokens, ...]; or per cell [cells, ...]."""
    kept = tensor.values[mask] if spec.per == "token" else tensor.values
    if spec.within_length:
        limits = lengths if spec.per == "cell" else np.repeat(lengths, lengths)
        wrong = (kept < 0) | (kept >= limits.reshape(-1, *[1] * (kept.ndim - 1)))
        what = "is no position in its cell"
    elif spec.n_values is not None:
        wrong = (kept < 0) | (kept >= spec.n_values)
        what = f"is no token of the vocabulary: ids lie in 0 to {spec.n_values - 1}"
        if spec.per == "token" and not spec.pad_is_a_value:
            wrong |= kept == spec.pad_value
            what += f", and {spec.pad_value} is padding"
    else:
        wrong = ~np.isfinite(kept)
        what = "is not finite"
    if wrong.any():
        at = int(np.flatnonzero(wrong.reshape(len(kept), -1).any(axis=1))[0])
        row = at if spec.per == "cell" else int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        value = kept.reshape(len(kept), -1)[at][wrong.reshape(len(kept), -1)[at]][0]
        raise InvalidParameterError(f"{value} in row {row} of the input {spec.name!r} {what}.", field=spec.name)
    return kept.astype(spec.dtype, copy=False)

"""Outputs beside the cell embedding, as every format writes and checks them.

Genes travel as a list of the names that occur, and the place of each row's gene in it: a cell has thousands of genes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidEmbeddingError, InvalidParameterError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import OutputValues
from perturbscope.protocol import checks as check


def spec_to_dict(spec: OutputSpec) -> dict[str, Any]:
    """Return the JSON form of an output's description."""
    return {
        "name": spec.name,
        "per": spec.per,
        "width": spec.width,
        "meaning": spec.meaning,
        "names": None if spec.names is None else list(spec.names),
    }


def spec_from_dict(value: Any) -> OutputSpec:
    """Read an output's description. Raises InvalidParameterError."""
    if not isinstance(value, Mapping):
        raise InvalidParameterError(f"An output must be an object; got {check.shown(value)}.", field="outputs")
    names = value.get("names")
    per: Any = check.text(value.get("per"), "per")
    meaning: Any = check.text(value.get("meaning"), "meaning")
    try:
        return OutputSpec(
            name=check.text(value.get("name"), "name"),
            per=per,
            width=check.integer(value.get("width"), "width"),
            meaning=meaning,
            names=None if not names else check.texts(names, "names"),
        )
    except ValueError as error:
        raise InvalidParameterError(f"An output cannot be read: {error}.", field="outputs") from error


def genes_of(output: OutputValues) -> tuple[list[str], NDArray[np.int32]]:
    """Return the genes that occur in an output per token, and the place of each row's gene among them."""
    if output.genes is None:
        return [], np.zeros(0, dtype=np.int32)
    places, codes = np.unique(output.genes, return_inverse=True)
    return [output.gene_names[place] for place in places], codes.astype(np.int32)


def output_of(
    spec: OutputSpec,
    values: NDArray[Any],
    n_cells: int,
    *,
    offsets: NDArray[Any] | None = None,
    genes: NDArray[Any] | None = None,
    gene_names: tuple[str, ...] = (),
) -> OutputValues:
    """Build the values of an output from the parts of an answer, after checking that they agree.

    Raises
    ------
    InvalidEmbeddingError
        The values are not a finite matrix of the output's width.
    InvalidParameterError
        There is not one row a cell or gene.
    """
    rows = n_cells
    if spec.per == "token":
        if offsets is None or genes is None:
            raise InvalidParameterError(f"The output {spec.name!r} lacks its genes.", field="outputs")
        bad = offsets.shape != (n_cells + 1,) or offsets[0] != 0 or bool((np.diff(offsets) < 0).any())
        rows = -1 if bad else int(offsets[-1])
        if genes.shape != (rows,) or (rows and not 0 <= int(genes.min()) <= int(genes.max()) < len(gene_names)):
            raise InvalidParameterError(
                f"The genes of the output {spec.name!r} do not fit the {n_cells} cells.", field="outputs"
            )
    if values.shape != (rows, spec.width) or not np.isfinite(values).all():
        raise InvalidEmbeddingError(
            f"The output {spec.name!r} has the shape {values.shape}, or values that are not finite; {rows} rows of "
            f"{spec.width} are needed.",
            field="outputs",
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    if spec.per == "cell":
        return OutputValues(spec, values)
    assert offsets is not None and genes is not None  # noqa: S101, PT018  checked above
    return OutputValues(spec, values, offsets.astype(np.int64), genes.astype(np.int32), gene_names)

"""Results as files, each complete or absent: written under a temporary name beside its place, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd

METADATA_KEY = b"perturbscope"
"""Key of the provenance, as JSON, in the schema metadata of a result's parquet file."""


def check_output(path: Path, suffixes: Sequence[str], *, source: Path | None = None) -> None:
    """Refuse an output that could not be written, before any work is done.

    Raises
    ------
    InvalidParameterError
        A suffix that is not understood, a directory that does not exist, or the input itself.
    """
    if path.suffix.lower() not in suffixes:
        raise InvalidParameterError(f"The output {path} must end in {' or '.join(suffixes)}.", field="out")
    if not path.parent.is_dir():
        raise InvalidParameterError(f"The directory {path.parent} of the output does not exist.", field="out")
    if path.is_dir():
        raise InvalidParameterError(f"The output {path} is a directory.", field="out")
    if not os.access(path.parent, os.W_OK):
        raise InvalidParameterError(f"The directory {path.parent} of the output is not writable.", field="out")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise InvalidParameterError(f"The output {path} is the input; give another name.", field="out")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it at the end, removed after an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        yield staging
        commit(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def commit(staging: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on disk, with the permissions of a new file."""
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)
    os.umask(mask)
    staging.chmod(0o666 & ~mask)
    os.replace(staging, path)


def write_table(path: Path, table: pd.DataFrame, provenance: Mapping[str, Any]) -> None:
    """Write a table of scores.

    ``.parquet`` carries the provenance as JSON in its schema metadata, under ``perturbscope``. ``.csv`` has no place
    for it: it goes to ``<path>.provenance.json``.
    """
    text = json.dumps(provenance, sort_keys=True)
    plain = table.copy()
    plain.attrs = {}
    if path.suffix.lower() == ".csv":
        with atomic(path.with_name(path.name + ".provenance.json")) as staging:
            staging.write_text(json.dumps(provenance, sort_keys=True, indent=2) + "\n", encoding="utf-8")
        with atomic(path) as staging:
            plain.to_csv(staging, index=False)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(plain, preserve_index=False)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), METADATA_KEY: text.encode()})
    with atomic(path) as staging:
        pq.write_table(arrow, staging)


def write_matrix(
    path: Path,
    names: Sequence[str],
    n_cells: NDArray[np.int64],
    distances: NDArray[np.float32],
    provenance: Mapping[str, Any],
) -> None:
    """Write distances between all groups.

    ``.parquet`` and ``.csv`` as :func:`write_table`, a row and a column a group, after the column ``perturbation``
    (``perturbation_`` if a group is called that). ``.npz`` has ``names``, ``n_cells``, ``distances`` and
    ``provenance``, JSON; numpy reads it without pickle.
    """
    import pandas as pd

    if path.suffix.lower() == ".npz":
        with atomic(path) as staging, staging.open("wb") as file:
            text = json.dumps(provenance, sort_keys=True)
            np.savez(file, names=np.array(names), n_cells=n_cells, distances=distances, provenance=np.array(text))
        return
    key = "perturbation"
    while key in names:
        key += "_"
    table = pd.DataFrame(distances, columns=list(names), copy=False)
    table.insert(0, key, list(names))
    write_table(path, table, provenance)


def read_table(path: Path, *, field: str) -> pd.DataFrame:
    """Read a table that :func:`write_table` wrote, or any other ``.parquet`` or ``.csv``.

    Raises
    ------
    UnreadableFileError
        Neither of the two, not there, or damaged; `field` is the caller's name for it.
    """
    import pandas as pd

    try:
        if path.suffix.lower() == ".csv":
            return pd.read_csv(path, dtype={"perturbation": str, "flags": str}, keep_default_na=False, na_values=[""])
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"The table {path} cannot be read: {error}.", field=field) from error
    raise UnreadableFileError(f"The table {path} must end in .parquet or .csv.", field=field)

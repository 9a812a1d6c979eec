"""Files and directories that are complete or absent: each is written under a temporary name and then renamed."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.errors import InvalidParameterError, UnreadableFileError

if TYPE_CHECKING:
    import pandas as pd

_TEXTS = (
    "perturbation",
    "a",
    "b",
    "metric",
    "flags",
    "fired",
    "p_source",
    "p_tail_source",
    "gene_set",
    "gene",
    "gene_id",
    "symbol",
)
"""Columns of tables of this package that hold texts."""
METADATA_KEY = b"perturbscope"
"""Key of the provenance, as JSON, in the schema metadata of a result's parquet file."""


def check_output(path: Path, suffixes: Sequence[str], *, source: Path | None = None) -> None:
    """Refuse an output that could not be written, before any work is done.

    Raises
    ------
    InvalidParameterError
        The suffix is not understood, the directory does not exist, or the output is the input.
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
    """Give a temporary path beside `path`, to write one file to; rename it at the end, remove it after an error."""
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
    """Rename a finished file, once its content is on disk, and give it the permissions of a new file."""
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    _permit(staging, 0o666)
    os.replace(staging, path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory beside `path`; rename it at the end, remove it after an error.

    An older `path` is moved aside before the renaming, put back if that fails, and deleted afterwards. The directory
    that `path` lies in is made if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        _permit(staging, 0o777)
        _replace_directory(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_json(path: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write a JSON file with an indent of two spaces, complete or not at all."""
    with atomic(path) as staging:
        staging.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def write_table(path: Path, table: pd.DataFrame, provenance: Mapping[str, Any]) -> None:
    """Write a table of scores.

    ``.parquet`` carries the provenance as JSON in its schema metadata, under ``perturbscope``. The provenance of a
    ``.csv`` goes to ``<path>.provenance.json``. Its ``read_csv`` holds arguments with which ``pandas.read_csv`` reads
    every text back as it was: without them pandas takes a label such as NA for a missing value, and 007 for a number.
    """
    plain = table.copy()
    plain.attrs = {}
    if path.suffix.lower() == ".csv":
        facts = {**provenance, "read_csv": read_arguments(plain)}
        write_json(path.with_name(path.name + ".provenance.json"), facts, sort_keys=True)
        with atomic(path) as staging:
            plain.to_csv(staging, index=False)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(plain, preserve_index=False)
    text = json.dumps(provenance, sort_keys=True)
    arrow = arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), METADATA_KEY: text.encode()})
    with atomic(path) as staging:
        pq.write_table(arrow, staging)


class TableParts:
    """A table that is written part by part, as of :func:`write_table`; made by :func:`table_parts`.

    Parameters
    ----------
    path
        Temporary path to write to, ``.parquet`` or ``.csv``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None
        self.provenance: Mapping[str, Any] = {}
        """Provenance of the table, known when all is written."""
        self.read_arguments: dict[str, Any] = {}

    def write(self, part: pd.DataFrame) -> None:
        """Append rows. The first part decides on the types of the columns; an empty one is only needed as the first."""
        if self._path.suffix.lower() == ".csv":
            self.read_arguments = self.read_arguments or read_arguments(part)
            part.to_csv(self._path, index=False, header=self._writer is None, mode="w" if self._writer is None else "a")
            self._writer = self._writer or self._path
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            arrow = pa.Table.from_pandas(part, preserve_index=False)
            self._writer = pq.ParquetWriter(self._path, arrow.schema)
        else:
            arrow = pa.Table.from_pandas(part, schema=self._writer.schema, preserve_index=False)
        self._writer.write_table(arrow)

    def close(self, *, complete: bool) -> None:
        """Write the provenance, if the table is complete, and close the file."""
        if self._writer is None or self._path.suffix.lower() == ".csv":
            return
        if complete:
            self._writer.add_key_value_metadata({METADATA_KEY: json.dumps(self.provenance, sort_keys=True).encode()})
        self._writer.close()


@contextmanager
def table_parts(path: Path) -> Iterator[TableParts]:
    """Give a table to write part by part, so that memory never holds all of it; it is renamed to `path` at the end."""
    with atomic(path) as staging:
        parts = TableParts(staging)
        try:
            yield parts
        except BaseException:
            parts.close(complete=False)
            raise
        parts.close(complete=True)
        if path.suffix.lower() == ".csv":
            write_json(
                path.with_name(path.name + ".provenance.json"),
                {**parts.provenance, "read_csv": parts.read_arguments},
                sort_keys=True,
            )


def read_arguments(table: pd.DataFrame) -> dict[str, Any]:
    """Return the arguments of ``pandas.read_csv`` that read a table as it was: an empty field alone is missing."""
    texts = [str(name) for name, kind in table.dtypes.items() if kind.kind in "OU" or str(kind) in ("category", "str")]
    return {"keep_default_na": False, "na_values": [""], "dtype": dict.fromkeys(texts, "str")}


def misread_labels(table: pd.DataFrame) -> list[str]:
    """Return the texts of a table that ``pandas.read_csv`` takes for missing values by default, sorted."""
    import pandas as pd

    texts = {text for name in read_arguments(table)["dtype"] for text in table[name].dropna().astype(str).unique()}
    written = pd.Series(sorted(texts - {""}), dtype=object)
    if not len(written):
        return []
    read = pd.read_csv(io.StringIO(written.to_csv(index=False, header=False)), header=None, dtype=str)
    return sorted(written[read[0].isna()].tolist())


def write_matrix(
    path: Path,
    names: Sequence[str],
    n_cells: NDArray[np.int64],
    distances: NDArray[np.float32],
    provenance: Mapping[str, Any],
) -> None:
    """Write the distances between all groups, float32 [n_groups, n_groups].

    A ``.parquet`` or ``.csv`` is a table as of :func:`write_table`, with a row and a column for each group after the
    column ``perturbation`` (``perturbation_`` if a group is called that). A ``.npz`` has the arrays ``names``,
    ``n_cells``, ``distances`` and ``provenance`` (JSON), which numpy reads without pickle.
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
        The file is neither of the two, does not exist, or is damaged; `field` is the caller's name for it.
    """
    import pandas as pd

    try:
        if path.suffix.lower() == ".csv":
            texts = dict.fromkeys(_TEXTS, "str")
            return pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"The table {path} cannot be read: {error}.", field=field) from error
    raise UnreadableFileError(f"The table {path} must end in .parquet or .csv.", field=field)


def _permit(path: Path, mode: int) -> None:
    """Give a file or directory the permissions that one made without :mod:`tempfile` would have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)


def _replace_directory(staging: Path, path: Path) -> None:
    if not path.exists():
        staging.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.replace(path, aside / path.name)
    try:
        staging.rename(path)
    except OSError:
        with suppress(OSError):
            os.replace(aside / path.name, path)
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)

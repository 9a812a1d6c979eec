"""Models for users of AnnData: embed and score AnnData, files or count matrices, here or on a server."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import GENE_EMBEDDING, OutputSpec, selected
from perturbscope.inference.embeddings import Embeddings, GeneSums, gather
from perturbscope.inference.encoder import Device
from perturbscope.tasks.backends import (
    Backend,
    LocalBackend,
    StageProgress,
    chunk_cells,
    count_stage,
    embed_parts,
    open_backend,
)
from perturbscope.tasks.screen import Screen, opened

if TYPE_CHECKING:
    import pandas as pd

    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

__all__ = ["Backend", "LocalBackend", "Model", "load"]

_log = logging.getLogger("perturbscope")


class Model:
    """A model for users of AnnData, made by :func:`load`; a context manager that closes it.

    Cells are given as an AnnData object (which is only read), a path that :func:`perturbscope.open_cells` understands,
    an open :class:`CellSource`, or a :class:`CountMatrix`.

    Parameters
    ----------
    backend
        The model in this process, or the client of a server; :meth:`close` closes it.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def model_id(self) -> str:
        """Name, version and hash of the model's weights."""
        return self.backend.model_id

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """What the model computes for each cell or gene, the cell embedding among them."""
        return self.backend.outputs

    @overload
    def embed(
        self,
        cells: Any,
        *,
        outputs: None = None,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def embed(
        self,
        cells: Any,
        *,
        outputs: str | Sequence[str],
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
    ) -> Embeddings: ...

    def embed(
        self,
        cells: Any,
        *,
        outputs: str | Sequence[str] | None = None,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
    ) -> NDArray[np.float32] | Embeddings:
        """Embed cells.

        Parameters
        ----------
        cells
            Raw counts; see the class.
        outputs
            Names of other :attr:`outputs` that are wanted beside the cell embedding, such as ``gene_embedding``. All
            of them are held in memory: one float32 for each gene of each cell and value.
        layer, gene_key, total_counts_key, round_counts
            Location of the counts in `cells`; see :func:`perturbscope.open_cells`.
        progress
            Called with the stage (``embed``), the number of cells that are done, and that of all cells.

        Returns
        -------
        float32 [n_cells, width], in the order of `cells`. With `outputs` :class:`Embeddings`: ``.cell_embedding`` is
        that array, and ``.outputs[name]`` has the values of each other output (:class:`OutputValues`).

        Raises
        ------
        InvalidInputError
            The cells are bad; the subclass and message say how, and in which row. Or the model has no such output.
        """
        found = self.embeddings(
            cells,
            outputs=outputs,
            layer=layer,
            gene_key=gene_key,
            total_counts_key=total_counts_key,
            round_counts=round_counts,
            progress=progress,
        )
        return found.values if outputs is None else found

    def embeddings(
        self,
        cells: Any,
        *,
        outputs: str | Sequence[str] | None = None,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
    ) -> Embeddings:
        """Embed cells as :meth:`embed`; also return their lengths, shares of known genes, and the genes' coverage."""
        names = [outputs] if isinstance(outputs, str) else outputs
        counts = _where(layer, gene_key, total_counts_key, round_counts)
        with self._parts(cells, names, counts, progress) as (parts, n_cells):
            result = next(parts) if isinstance(cells, CountMatrix) else gather(parts, n_cells)
        for warning in result.warnings():
            _log.warning(warning)
        return result

    def gene_means(
        self,
        cells: Any,
        *,
        output: str = GENE_EMBEDDING,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
    ) -> pd.DataFrame:
        """Average an output per token by gene, over all cells that have the gene; only one chunk of them is in memory.

        Parameters
        ----------
        cells
            Raw counts; see the class. Give the cells of one perturbation to compare it with the controls.
        output
            Name of the output.
        layer, gene_key, total_counts_key, round_counts, progress
            See :meth:`embed`.

        Returns
        -------
        One row a gene, indexed by ``gene_id`` (Ensembl): ``n_cells``, the number of cells that have the gene among
        their tokens, and one column a value, float32.

        Raises
        ------
        InvalidInputError
            As :meth:`embed`; or the output is per cell.
        """
        specs = selected(self.outputs, [output])
        spec = next(spec for spec in specs if spec.name == output)
        if spec.per != "token":
            raise InvalidParameterError(f"The output {output!r} has one row a cell, and no genes.", field="output")
        size = chunk_cells(specs, self.backend.max_length)
        sums = GeneSums()
        counts = _where(layer, gene_key, total_counts_key, round_counts)
        with self._parts(cells, [output], counts, progress, size) as (parts, _):
            for part in parts:
                sums.add(part.outputs[output])
        return sums.table()

    @contextmanager
    def _parts(
        self,
        cells: Any,
        outputs: Sequence[str] | None,
        counts: Mapping[str, Any],
        progress: StageProgress | None,
        size: int | None = None,
    ) -> Iterator[tuple[Iterator[Embeddings], int]]:
        """Embed cells in chunks of at most `size`; gives the results in order, and the number of all cells."""
        if not isinstance(cells, CountMatrix):
            with opened(cells, **counts) as source:
                chunks = source if size is None else source.chunks(size)
                advance = count_stage("embed", source.n_cells, progress)
                parts = embed_parts(chunks, self.backend, outputs=outputs, progress=advance)
                yield (part.from_source(source) for part in parts), source.n_cells
            return
        _check_bare(counts)
        advance = count_stage("embed", len(cells), progress)
        pieces = (cells[start : start + size] for start in range(0, len(cells), size)) if size else cells
        yield embed_parts(pieces, self.backend, outputs=outputs, progress=advance), len(cells)

    def score(
        self,
        cells: Any,
        *,
        perturbation_key: str,
        control: str | Sequence[str],
        use_rep: str | None = None,
        batch_key: str | None = None,
        unit_key: str | None = None,
        metrics: Sequence[str] = ("e_distance",),
        seed: int = 0,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Score each perturbation by its distance from control.

        Parameters
        ----------
        cells
            AnnData, path or :class:`CellSource` with labels. Cells without a label are left out.
        perturbation_key
            Column of obs with the perturbation of each cell.
        control
            The label of control cells, or several: the cells of all of them are one group.
        use_rep
            Score this matrix of obsm (``X_pca``, ``X_scVI``, ...) in place of embedding the cells.
        batch_key
            Column of obs with each cell's batch; labels are permuted within batches, about their means.
        unit_key
            Column of obs with each cell's unit (well, guide, donor); whole units are exchanged too, in the columns
            n_units, z_unit, p_unit, q_unit. A server does not do this yet.
        metrics, seed, options
            See :class:`perturbscope.ScoreOptions`.
        layer, gene_key, total_counts_key, round_counts, progress
            See :meth:`embed`.

        Returns
        -------
        One row a perturbation and metric, with the columns perturbation, n_cells, n_controls, metric, distance,
        null_mean, null_sd, z, p, q, flags, n_used, p_source, exchanges, p_tail, p_tail_source, p_omnibus, q_omnibus,
        fired (:data:`perturbscope.scoring.results.SCORE_COLUMNS`). ``attrs["provenance"]`` holds model, options and
        input, ``attrs["warnings"]`` reasons to be careful.

        Raises
        ------
        MissingColumnError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
            The labels do not allow a score, which is found before any cell is embedded.
        InvalidParameterError
            An option is outside its range.
        InvalidInputError
            A cell cannot be embedded; the message names its row.
        """
        with opened(cells, **_where(layer, gene_key, total_counts_key, round_counts)) as source:
            screen = Screen.of(
                source,
                self.backend,
                perturbation_key=perturbation_key,
                control=control,
                use_rep=use_rep,
                batch_key=batch_key,
                unit_key=unit_key,
                options=_options(metrics, seed, options),
                progress=progress,
            )
            result = screen.score(progress)
        return _table(result)

    def compare(
        self,
        cells: Any,
        *,
        perturbation_key: str,
        control: str | Sequence[str] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        use_rep: str | None = None,
        batch_key: str | None = None,
        metrics: Sequence[str] = ("e_distance",),
        seed: int = 0,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Score pairs of perturbations by their distance: all pairs, or `pairs`. Else as :meth:`score`.

        With `control`, z is measured against the controls' null, and the default pairs leave the controls out; see
        :func:`perturbscope.compare_perturbations`.

        Returns
        -------
        One row a pair and metric: a, b, n_a, n_b, metric, distance, null_mean, null_sd, z, p, q, flags.
        """
        with opened(cells, **_where(layer, gene_key, total_counts_key, round_counts)) as source:
            screen = Screen.of(
                source,
                self.backend,
                perturbation_key=perturbation_key,
                control=control,
                use_rep=use_rep,
                batch_key=batch_key,
                options=_options(metrics, seed, options),
                progress=progress,
            )
            result = screen.compare(pairs, progress)
        return _table(result)

    def ask(
        self,
        operation: str,
        cells: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        round_counts: bool = False,
        progress: StageProgress | None = None,
        **values: Any,
    ) -> Any:
        """Ask any operation of the table: ``model.count_tokens(cells)`` is ``model.ask("count_tokens", cells)``.

        Parameters
        ----------
        operation
            Name of an operation of :mod:`perturbscope.operations`.
        cells
            Raw counts; see the class.
        layer, gene_key, total_counts_key, round_counts
            Location of the counts in `cells`; see :func:`perturbscope.open_cells`.
        progress
            Called with the operation, the number of cells that are done, and that of all cells.
        values
            Other fields of the request. Where `cells` has columns, a field with one entry a cell is given by the column
            that holds it (``perturbation_key``).

        Raises
        ------
        UnsupportedOperationError
            The model cannot do it.
        InvalidInputError
            The cells are bad; the subclass and message say how, and in which row.
        """
        from perturbscope.operations import OPERATIONS
        from perturbscope.tasks.requests import ask_source

        found = OPERATIONS.named(operation)
        if isinstance(cells, CountMatrix):
            _check_bare(_where(layer, gene_key, total_counts_key, round_counts))
            advance = count_stage(operation, len(cells), progress)
            answer = self.backend.ask(found.asked(cells, **values), progress=advance)
        else:
            with opened(cells, **_where(layer, gene_key, total_counts_key, round_counts)) as source:
                answer = ask_source(found, source, self.backend, values, progress=progress)
        for warning in getattr(getattr(answer, "meta", None), "warnings", ()):
            _log.warning(warning)
        return answer

    if not TYPE_CHECKING:  # a type checker knows `ask`; any other name would pass it here

        def __getattr__(self, name: str) -> Any:
            from perturbscope.operations import OPERATIONS

            if name not in OPERATIONS:
                raise AttributeError(f"A model has no attribute {name!r}; operations are {', '.join(OPERATIONS)}.")
            return partial(self.ask, name)

    def close(self) -> None:
        """Free the model, or close the connections to its server."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    bundle_or_url: str | Path,
    *,
    device: Device = "cpu",
    variant: str = "fp32",
    model: str | None = None,
    api_key: str | None = None,
    ca: str | Path | None = None,
    cert: tuple[str | Path, str | Path] | None = None,
    wait: float | None = None,
) -> Model:
    """Open a bundle, or reach a server.

    Parameters
    ----------
    bundle_or_url
        Directory of a bundle, ``http(s)://host:port``, or ``grpc(s)://host:port``.
    device
        Device that runs a bundle: ``cpu``, ``cuda`` or ``tensorrt``.
    variant
        Graph of a bundle: ``fp32``, ``fp16``, ``fp16-flash``, ``int8``.
    model
        Name of one of a server's models; None: its default.
    api_key, ca, cert
        API key of a server, file of trusted authorities, and files of the client's certificate and its private key.
        None: those of the environment, see :mod:`perturbscope.client.access`.
    wait
        Seconds to wait for a server that is overloaded, cannot be reached or starts again; None: about half a minute.

    Raises
    ------
    BundleError
        The bundle is damaged, or was made for another version.
    ProviderUnavailableError
        CUDA was asked for and is not available.
    InvalidParameterError
        An option is for the other kind of source.
    """
    return Model(
        open_backend(
            str(bundle_or_url),
            device=device,
            variant=variant,
            model=model,
            api_key=api_key,
            ca=ca,
            cert=cert,
            wait=wait,
        )
    )


def _where(layer: str | None, gene_key: str | None, total_counts_key: str | None, round_counts: bool) -> dict[str, Any]:
    """Return the options of :func:`perturbscope.open_cells` that say where counts are, and how they are read."""
    return {
        "layer": layer,
        "gene_key": gene_key,
        "total_counts_key": total_counts_key,
        "round_counts": round_counts,
    }


def _check_bare(counts: Mapping[str, Any]) -> None:
    """Refuse options of files for a CountMatrix."""
    if any(counts.values()):
        raise InvalidParameterError(
            "A CountMatrix has neither layers nor columns, and its counts are whole; leave layer, gene_key, "
            "total_counts_key and round_counts out.",
            field="layer",
        )


def _options(metrics: Sequence[str], seed: int, others: Mapping[str, Any]) -> ScoreOptions:
    from perturbscope.scoring.results import ScoreOptions

    names = [metrics] if isinstance(metrics, str) else list(metrics)
    return ScoreOptions.from_dict({"metrics": names, "seed": seed, **others})


def _table(result: ScoreResult | CompareResult) -> pd.DataFrame:
    for warning in result.warnings:
        _log.warning(warning)
    table = result.table.copy()
    table.attrs["provenance"] = result.provenance
    table.attrs["warnings"] = result.warnings
    return table

"""Models for users of AnnData: embed and score AnnData, files or count matrices, here or on a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.inference.encoder import Device
from perturbscope.tasks.backends import Backend, LocalBackend, StageProgress, count_stage, open_backend
from perturbscope.tasks.screen import Screen, embed_source, opened

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

    def embed(
        self,
        cells: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        progress: StageProgress | None = None,
    ) -> NDArray[np.float32]:
        """Embed cells.

        Parameters
        ----------
        cells
            Raw counts; see the class.
        layer, gene_key, total_counts_key
            Location of the counts in `cells`; see :func:`perturbscope.open_cells`.
        progress
            Called with the stage (``embed``), the number of cells that are done, and that of all cells.

        Returns
        -------
        float32 [n_cells, width], in the order of `cells`.

        Raises
        ------
        InvalidInputError
            The cells are bad; the subclass and message say how, and in which row.
        """
        return self.embeddings(
            cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key, progress=progress
        ).values

    def embeddings(
        self,
        cells: Any,
        *,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
        progress: StageProgress | None = None,
    ) -> Embeddings:
        """Embed cells as :meth:`embed`; also return their lengths, shares of known genes, and the genes' coverage."""
        if isinstance(cells, CountMatrix):
            if (layer, gene_key, total_counts_key) != (None, None, None):
                raise InvalidParameterError(
                    "A CountMatrix has neither layers nor columns; leave layer, gene_key and total_counts_key out.",
                    field="layer",
                )
            result = self.backend.embed_cells(cells, progress=count_stage("embed", len(cells), progress))
        else:
            with opened(cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
                result = embed_source(source, self.backend, progress=progress)
        for warning in result.warnings():
            _log.warning(warning)
        return result

    def score(
        self,
        cells: Any,
        *,
        perturbation_key: str,
        control: str,
        use_rep: str | None = None,
        batch_key: str | None = None,
        metrics: Sequence[str] = ("e_distance",),
        seed: int = 0,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
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
            The label of control cells.
        use_rep
            Score this matrix of obsm (``X_pca``, ``X_scVI``, ...) in place of embedding the cells.
        batch_key
            Column of obs with each cell's batch; labels are permuted within batches.
        metrics, seed, options
            See :class:`perturbscope.ScoreOptions`.
        layer, gene_key, total_counts_key, progress
            See :meth:`embed`.

        Returns
        -------
        One row a perturbation and metric, with the columns perturbation, n_cells, n_controls, metric, distance,
        null_mean, null_sd, z, p, q, flags. ``attrs["provenance"]`` holds model, options and input,
        ``attrs["warnings"]`` reasons to be careful.

        Raises
        ------
        MissingColumnError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
            The labels do not allow a score, which is found before any cell is embedded.
        InvalidParameterError
            An option is outside its range.
        InvalidInputError
            A cell cannot be embedded; the message names its row.
        """
        with opened(cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
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
            result = screen.score(progress)
        return _table(result)

    def compare(
        self,
        cells: Any,
        *,
        perturbation_key: str,
        control: str | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        use_rep: str | None = None,
        batch_key: str | None = None,
        metrics: Sequence[str] = ("e_distance",),
        seed: int = 0,
        layer: str | None = None,
        gene_key: str | None = None,
        total_counts_key: str | None = None,
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
        with opened(cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
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
        layer, gene_key, total_counts_key
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
            if (layer, gene_key, total_counts_key) != (None, None, None):
                raise InvalidParameterError(
                    "A CountMatrix has neither layers nor columns; leave layer, gene_key and total_counts_key out.",
                    field="layer",
                )
            advance = count_stage(operation, len(cells), progress)
            answer = self.backend.ask(found.asked(cells, **values), progress=advance)
        else:
            with opened(cells, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
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
        open_backend(str(bundle_or_url), device=device, variant=variant, model=model, api_key=api_key, ca=ca, cert=cert)
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

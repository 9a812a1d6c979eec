"""The library's front door: embed and score AnnData, files or count matrices, here or on a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embedder import Embedder, Embeddings
from perturbscope.inference.encoder import Device
from perturbscope.tasks.backends import Backend, LocalBackend, StageProgress, count_stage
from perturbscope.tasks.screen import Screen, embed_source, opened

if TYPE_CHECKING:
    import pandas as pd

    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

__all__ = ["Backend", "LocalBackend", "Model", "load"]

_log = logging.getLogger("perturbscope")


class Model:
    """A model for users of AnnData. Made by :func:`load`; a context manager.

    Cells are given as an AnnData object (which is only read), a path that :func:`perturbscope.open_cells` understands,
    an open :class:`CellSource`, or a :class:`CountMatrix`.

    Parameters
    ----------
    backend
        Where the work is done.
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
            Raw counts, see the class.
        layer, gene_key, total_counts_key
            Where they are in `cells`; see :func:`perturbscope.open_cells`.
        progress
            Told a stage (``check``, ``embed``), and how many cells of how many it has done.

        Returns
        -------
        float32 [n_cells, width], in the order of `cells`.

        Raises
        ------
        InvalidInputError
            One of its subclasses says what is wrong with the cells, and in which row.
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
        """As :meth:`embed`, with each cell's length and share of known genes, and the genes' coverage."""
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
        """How far each perturbation is from control.

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
            Column of obs; labels are permuted within its batches.
        metrics, seed, options
            See :class:`perturbscope.ScoreOptions`.
        layer, gene_key, total_counts_key, progress
            As for :meth:`embed`.

        Returns
        -------
        One row a perturbation and metric, with the columns perturbation, n_cells, n_controls, metric, distance,
        null_mean, null_sd, z, p, q, flags. ``attrs["provenance"]`` says what made the numbers,
        ``attrs["warnings"]`` what to be careful about.

        Raises
        ------
        MissingColumnError, ControlLabelMissingError, TooFewControlsError, TooFewCellsError
            Labels that do not allow a score; found before any cell is embedded.
        InvalidParameterError
            An option outside its range.
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
        """How far perturbations are from each other: all pairs, or `pairs`. Else as :meth:`score`.

        With `control`, z has the controls' null, and the default pairs leave the controls out; see
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

    def close(self) -> None:
        """Release the backend."""
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
        ``cpu``, ``cuda`` or ``tensorrt``, for a bundle.
    variant
        Which graph of a bundle: ``fp32``, ``fp16``, ``int8``.
    model
        Name of one of a server's models; its default if None.
    api_key, ca, cert
        For a server: the API key, the file of trusted authorities, and the files of the client's certificate and its
        private key. Left out, the environment says: see :mod:`perturbscope.client.access`.

    Raises
    ------
    BundleError
        The bundle is damaged, or made for another version.
    ProviderUnavailableError
        CUDA was asked for and is not there.
    InvalidParameterError
        An option that belongs to the other kind of source.
    """
    where = str(bundle_or_url)
    scheme = where.split("://", maxsplit=1)[0] if "://" in where else ""
    if not scheme:
        if model is not None:
            raise InvalidParameterError(
                "model chooses among a server's models; a bundle holds one. Leave it out.", field="model"
            )
        if (api_key, ca, cert) != (None, None, None):
            raise InvalidParameterError("api_key, ca and cert are for a server; leave them out.", field="api_key")
        from perturbscope.inference.bundle import Bundle

        return Model(LocalBackend(Embedder.from_bundle(Bundle.open(where), variant=variant, device=device)))
    if (device, variant) != ("cpu", "fp32"):
        raise InvalidParameterError(
            "device and variant are chosen where the server is started; leave them out for a URL.", field="device"
        )
    if scheme in ("http", "https"):
        from perturbscope.client import Client

        return Model(Client(where, model=model, api_key=api_key, ca=ca, cert=cert))
    if scheme in ("grpc", "grpcs"):
        from perturbscope.client import GrpcClient

        return Model(GrpcClient(where, model=model, api_key=api_key, ca=ca, cert=cert))
    raise InvalidParameterError(
        f"The address {where} has the scheme {scheme!r}; http://, https://, grpc:// and grpcs:// are understood.",
        field="bundle_or_url",
    )


def _options(metrics: Sequence[str], seed: int, others: Mapping[str, Any]) -> ScoreOptions:
    from perturbscope.scoring.results import ScoreOptions

    chosen = [metrics] if isinstance(metrics, str) else list(metrics)
    return ScoreOptions.from_dict({"metrics": chosen, "seed": seed, **others})


def _table(result: ScoreResult | CompareResult) -> pd.DataFrame:
    for warning in result.warnings:
        _log.warning(warning)
    table = result.table.copy()
    table.attrs["provenance"] = result.provenance
    table.attrs["warnings"] = result.warnings
    return table

"""Backends: the interface behind which a model in this process and a model on a server look alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import OutputSpec, selected
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings
from perturbscope.inference.encoder import Device

if TYPE_CHECKING:
    from perturbscope.protocol.messages import Answer, Request
    from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

CellProgress = Callable[[int], None]
"""Called with the number of cells that were finished since the last call."""
StageProgress = Callable[[str, int, int], None]
"""Called with the name of a stage (``embed``, or one of scoring), the amount that is done, and the total."""
CHUNK_BYTES = 64 * 2**20
"""Bytes of the values per token that are held at a time where they are not all wanted in memory."""
_LONG = 4096
"""Length of the longest cell of a model that does not say it."""


def count_stage(stage: str, total: int, progress: StageProgress | None) -> CellProgress | None:
    """Return a function that counts the cells of one stage and reports them to `progress`; None without `progress`."""
    if progress is None:
        return None
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        progress(stage, done, total)

    progress(stage, 0, total)
    return advance


class Backend(Protocol):
    """A model that embeds cells: in this process, or on a server over HTTP or gRPC. All give the same answers."""

    @property
    def model_id(self) -> str:
        """Name, version and hash of the model's weights."""
        ...

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs of the model, the cell embedding among them."""
        ...

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest cell that the model reads; 0 if a server does not say."""
        ...

    def embed_cells(
        self, cells: CountMatrix, *, outputs: Sequence[str] | None = None, progress: CellProgress | None = None
    ) -> Embeddings:
        """Embed cells, in their order; `outputs` names what is wanted beside the cell embedding."""
        ...

    def embed_stream(
        self,
        chunks: Iterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: CellProgress | None = None,
    ) -> Iterator[Embeddings]:
        """Embed chunks of cells that all have the same genes, one result a chunk; only a few chunks are held."""
        ...

    def ask(self, request: Request, *, progress: CellProgress | None = None) -> Answer:
        """Ask a request of any operation of :mod:`perturbscope.operations`."""
        ...

    def close(self) -> None:
        """Release the model, or the connections to its server."""
        ...


class Server(Backend, Protocol):
    """A backend that also scores embeddings, so that the work of scoring is not done in this process."""

    def score(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        control: str | Sequence[str],
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreResult:
        """Distance of each perturbation to control; see :func:`perturbscope.score_perturbations`."""
        ...

    def compare(
        self,
        embeddings: NDArray[np.float32],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | Sequence[str] | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareResult:
        """Distances between perturbations; see :func:`perturbscope.compare_perturbations`."""
        ...


def chunk_cells(outputs: Sequence[OutputSpec], max_length: int, *, most: int = 512) -> int:
    """Return how many cells a chunk may have so that their values per token stay within :data:`CHUNK_BYTES`.

    Parameters
    ----------
    outputs
        Outputs that are wanted.
    max_length
        Number of tokens of the longest cell; 0 if it is not known.
    most
        Number of cells that is enough in any case.
    """
    of_cell = 4 * (max_length or _LONG) * sum(spec.width for spec in outputs if spec.per == "token")
    return most if of_cell == 0 else min(most, max(1, CHUNK_BYTES // of_cell))


def embed_parts(
    cells: CountMatrix | Iterable[CountMatrix],
    backend: Backend,
    *,
    outputs: Sequence[str] | None = None,
    progress: CellProgress | None = None,
) -> Iterator[Embeddings]:
    """Embed a matrix, or chunks of one; gives the results in order.

    Raises
    ------
    InvalidParameterError
        The model has no such output.
    """
    if outputs is not None:
        selected(backend.outputs, outputs)  # refused before a cell is read
    if isinstance(cells, CountMatrix):
        return iter([backend.embed_cells(cells, outputs=outputs, progress=progress)])
    return backend.embed_stream(cells, outputs=outputs, progress=progress)


class LocalBackend:
    """A model in this process.

    Parameters
    ----------
    embedder
        Tokenizer and encoder; :meth:`close` closes it.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    @property
    def model_id(self) -> str:
        """See :attr:`Backend.model_id`."""
        return self.embedder.model_id

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """See :attr:`Backend.outputs`."""
        return self.embedder.outputs

    @property
    def max_length(self) -> int:
        """See :attr:`Backend.max_length`."""
        return self.embedder.family.max_length

    def embed_cells(
        self, cells: CountMatrix, *, outputs: Sequence[str] | None = None, progress: CellProgress | None = None
    ) -> Embeddings:
        """See :meth:`Backend.embed_cells`; raises the errors of :meth:`Embedder.embed`."""
        return self.embedder.embed(cells, outputs=outputs, progress=progress)

    def embed_stream(
        self,
        chunks: Iterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: CellProgress | None = None,
    ) -> Iterator[Embeddings]:
        """See :meth:`Backend.embed_stream`; raises the errors of :meth:`Embedder.embed`."""
        return self.embedder.embed_stream(chunks, outputs=outputs, progress=progress)

    def ask(self, request: Request, *, progress: CellProgress | None = None) -> Answer:
        """See :meth:`Backend.ask`.

        Raises
        ------
        UnsupportedOperationError
            The model cannot do it.
        InvalidParameterError
            The request is of no operation, of one that only a server answers, or names a model.
        """
        from perturbscope.operations import OPERATIONS
        from perturbscope.protocol.operations import check_capability

        operation = OPERATIONS.of(request)
        if getattr(request, "model", None) is not None:
            raise InvalidParameterError(
                "model chooses among a server's models; a bundle holds one. Leave it out.", field="model"
            )
        check_capability(operation, self.model_id, self.embedder.capabilities)
        answer = operation.answered(self.embedder, request)
        if progress:
            progress(operation.rows(request))
        return answer

    def close(self) -> None:
        """Release the encoder's session and its memory."""
        self.embedder.close()


def default_bundle(folder: Path = Path("bundles")) -> Path:
    """Find the bundle for whoever names none: the one called default in a folder of bundles, or else the only one.

    Raises
    ------
    InvalidParameterError
        The folder holds no bundle, or several and none that is called default.
    """
    from perturbscope.inference.bundle import MANIFEST

    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))
    chosen = [path for path in found if path.name == "default"] or found
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        raise InvalidParameterError(
            f"No model was chosen, and {folder}/ here holds no bundle. Give --bundle DIR, --server URL or --grpc "
            "HOST:PORT, or set PERTURBSCOPE_BUNDLE to a bundle's directory. A clone of PerturbScope has one in "
            "bundles/default; python -m export CHECKPOINT DIR makes one.",
            field="bundle",
        )
    raise InvalidParameterError(
        f"No model was chosen, and {folder}/ here holds {', '.join(path.name for path in found)}, none of them called "
        f"default. Give one: --bundle {found[0]}.",
        field="bundle",
    )


def open_backend(
    address: str,
    *,
    device: Device = "cpu",
    variant: str = "fp32",
    model: str | None = None,
    api_key: str | None = None,
    ca: str | Path | None = None,
    cert: tuple[str | Path, str | Path] | None = None,
    wait: float | None = None,
) -> Backend:
    """Open the bundle in a directory, or reach the server at a URL; see :func:`perturbscope.load`."""
    scheme = address.split("://", maxsplit=1)[0] if "://" in address else ""
    if not scheme:
        if model is not None:
            raise InvalidParameterError(
                "model chooses among a server's models; a bundle holds one. Leave it out.", field="model"
            )
        if (api_key, ca, cert, wait) != (None, None, None, None):
            raise InvalidParameterError("api_key, ca, cert and wait are for a server; leave them out.", field="api_key")
        from perturbscope.inference.bundle import Bundle

        return LocalBackend(Embedder.from_bundle(Bundle.open(address), variant=variant, device=device))
    if (device, variant) != ("cpu", "fp32"):
        raise InvalidParameterError(
            "device and variant are chosen where the server is started; leave them out for a URL.", field="device"
        )
    if scheme in ("http", "https"):
        from perturbscope.client import Client, RetryPolicy

        retries = RetryPolicy(wait=wait)
        return Client(address, model=model, api_key=api_key, ca=ca, cert=cert, retries=retries)
    if scheme in ("grpc", "grpcs"):
        from perturbscope.client import GrpcClient, RetryPolicy

        retries = RetryPolicy(wait=wait)
        return GrpcClient(address, model=model, api_key=api_key, ca=ca, cert=cert, retries=retries)
    from perturbscope.client.access import without_userinfo

    raise InvalidParameterError(
        f"The address {without_userinfo(address)} has the scheme {scheme!r}; http://, https://, grpc:// and grpcs:// "
        "are understood.",
        field="bundle_or_url",
    )

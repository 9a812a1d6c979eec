"""The methods that all clients have, each written once as a conversation, and what makes it block or be awaited."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import as_counts
from perturbscope.client.conversation import ChunkLimits, Conversation, RetryPolicy, ask, ask_in_chunks, expect
from perturbscope.client.streams import Flight
from perturbscope.errors import InvalidEmbeddingError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.checks import embedding_matrix, names, texts
from perturbscope.protocol.messages import (
    Answer,
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    ModelInfo,
    ModelsAnswer,
    ModelsRequest,
    Request,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

P = ParamSpec("P")
T = TypeVar("T")


class Conversations:
    """The common part of all clients: their settings, and the conversations of their methods.

    Parameters
    ----------
    model
        Name of the model; None: the server's default.
    retries
        When to try again.
    chunks
        Size of one request.
    seed
        Seed of the jitter between tries; None: a different one in each client.
    """

    def __init__(
        self, *, model: str | None, retries: RetryPolicy | None, chunks: ChunkLimits | None, seed: int | None
    ) -> None:
        self.model = model
        self._policy = retries or RetryPolicy()
        self._chunks = chunks or ChunkLimits()
        self._rng = np.random.default_rng(seed)

    def _flight(self, outputs: Sequence[str] | None) -> Flight:
        wanted = None if outputs is None else texts(list(outputs), "outputs")
        return Flight(model=self.model, outputs=wanted, limits=self._chunks, policy=self._policy, rng=self._rng)

    def _ask(self, request: Request, *, progress: Callable[[int], None] | None = None) -> Conversation[Answer]:
        """Ask a request of any operation; one that is answered cell by cell is divided into chunks.

        Every operation of :data:`perturbscope.protocol.operations.OPERATIONS` is a method too: ``client.count_tokens(
        cells)`` asks ``CountTokensRequest(cells=cells, model=...)``.

        Parameters
        ----------
        request
            The request; one that names no model asks that of the client.
        progress
            Called with the number of cells of each chunk.

        Raises
        ------
        UnsupportedOperationError
            The model cannot do it.
        """
        if self.model is not None and getattr(request, "model", self.model) is None:
            request = replace(request, model=self.model)
        return (
            yield from ask_in_chunks(
                OPERATIONS.of(request),
                _with_counts(request),
                limits=self._chunks,
                policy=self._policy,
                rng=self._rng,
                progress=progress,
            )
        )

    def _operation(self, name: str) -> Callable[..., Conversation[Answer]]:
        """Return the conversation of an operation of the table, as a function of its fields."""
        if name not in OPERATIONS:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}; operations are {', '.join(OPERATIONS)}",
                name=name,
                obj=self,
            )
        operation = OPERATIONS[name]

        def asking(*values: Any, progress: Callable[[int], None] | None = None, **fields: Any) -> Conversation[Answer]:
            return self._ask(operation.asked(*values, **fields), progress=progress)

        return asking

    def _models(self) -> Conversation[tuple[ModelInfo, ...]]:
        """List the models that the server offers; the first is the default."""
        answer = yield from ask(ModelsRequest(), self._policy, self._rng)
        return expect(answer, ModelsAnswer).models

    def _embed_cells(
        self,
        cells: CountMatrix,
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Conversation[Embeddings]:
        """Embed cells, in chunks that the server takes; `progress` is told the number of cells of each chunk.

        `cells` is a :class:`CountMatrix`, or an AnnData object whose X has the raw counts; see
        :func:`perturbscope.cells_from_anndata` for other places. `outputs` names outputs that are wanted
        beside the cell embedding; :class:`ModelInfo` lists those of a model.
        """
        wanted = None if outputs is None else texts(list(outputs), "outputs")
        return expect((yield from self._ask(EmbedRequest(cells=cells, outputs=wanted), progress=progress)), Embeddings)

    def _score(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        control: str | Sequence[str],
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> Conversation[ScoreResult]:
        """Score embeddings; see :func:`perturbscope.score_perturbations`."""
        source = {"embeddings": _matrix(embeddings)}
        answer = yield from self._labelled(ScoreRequest, source, perturbations, control, batches, options)
        return expect(answer, ScoreAnswer).result

    def _score_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        control: str | Sequence[str],
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> Conversation[ScoreAnswer]:
        """Embed and score cells in one request, which must fit within the server's limits."""
        source = {"cells": cells}
        answer = yield from self._labelled(ScoreRequest, source, perturbations, control, batches, options)
        return expect(answer, ScoreAnswer)

    def _compare(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | Sequence[str] | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> Conversation[CompareResult]:
        """Compare perturbations; see :func:`perturbscope.compare_perturbations`."""
        source = {"embeddings": _matrix(embeddings), "pairs": _pairs(pairs)}
        answer = yield from self._labelled(CompareRequest, source, perturbations, control, batches, options)
        return expect(answer, CompareAnswer).result

    def _compare_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | Sequence[str] | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> Conversation[CompareAnswer]:
        """Embed and compare cells in one request, which must fit within the server's limits."""
        source = {"cells": cells, "pairs": _pairs(pairs)}
        answer = yield from self._labelled(CompareRequest, source, perturbations, control, batches, options)
        return expect(answer, CompareAnswer)

    def _labelled(
        self,
        kind: Callable[..., ScoreRequest | CompareRequest],
        source: dict[str, Any],
        perturbations: Sequence[str],
        control: str | Sequence[str] | None,
        batches: Sequence[str] | None,
        options: ScoreOptions | None,
    ) -> Conversation[Answer]:
        """Check the labels of a request to score or to compare, and ask."""
        request = kind(
            **source,
            perturbations=texts(list(perturbations), "perturbations"),
            control=control if control is None else names(_one_or_list(control), "control"),
            batches=None if batches is None else texts(list(batches), "batches"),
            options=options or ScoreOptions(),
            model=self.model,
        )
        return (yield from ask(_with_counts(request), self._policy, self._rng))


def _with_counts(request: Any) -> Any:
    """Return a request with the raw counts of an AnnData object in place of the object. Raises as :func:`as_counts`."""
    fields = {item.name: item.required for item in OPERATIONS.of(request).takes.of("cells")}
    given = {name: getattr(request, name) for name in fields}
    given = {name: value for name, value in given.items() if value is not None or fields[name]}
    if all(isinstance(value, CountMatrix) for value in given.values()):
        return request
    return replace(request, **{name: as_counts(value) for name, value in given.items()})


def blocking(conversation: Callable[Concatenate[Any, P], Conversation[T]]) -> Callable[Concatenate[Any, P], T]:
    """Make the method of a blocking client that holds a conversation: same parameters, same documentation."""

    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return cast("T", self._hold(conversation(self, *args, **kwargs)))

    _describe(method, conversation)
    return method


def awaitable(
    conversation: Callable[Concatenate[Any, P], Conversation[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Make the method of an asynchronous client; see :func:`blocking`."""

    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return cast("T", await self._hold(conversation(self, *args, **kwargs)))

    _describe(method, conversation)
    return method


def _describe(method: Any, conversation: Callable[..., Any]) -> None:
    """Give a method the name and signature of a conversation, with what the conversation returns in the end."""
    update_wrapper(method, conversation)
    method.__name__ = conversation.__name__.lstrip("_")
    signature = inspect.signature(conversation)
    result = str(signature.return_annotation).removeprefix("Conversation[").removesuffix("]")
    method.__annotations__ = {**conversation.__annotations__, "return": result}
    method.__signature__ = signature.replace(return_annotation=result)


def _matrix(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    array = np.asarray(embeddings)
    if array.dtype.kind not in "iuf":
        raise InvalidEmbeddingError(f"Embeddings have dtype {array.dtype}; numbers are needed.", field="embeddings")
    return embedding_matrix(array)


def _one_or_list(control: str | Sequence[str]) -> str | list[str]:
    return control if isinstance(control, str) else list(control)


def _pairs(pairs: Sequence[tuple[str, str]] | None) -> tuple[tuple[str, str], ...] | None:
    return None if pairs is None else tuple((a, b) for a, b in pairs)

"""What all clients have in common: the questions, and the two ways to wait for answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.client.conversation import (
    ChunkLimits,
    Conversation,
    Failure,
    Pause,
    Reply,
    RetryPolicy,
    Step,
    Together,
    ask,
    embed_in_chunks,
    expect,
)
from perturbscope.client.streams import Flight, Later, each, fill, fill_async
from perturbscope.client.together import hold_together, hold_together_async
from perturbscope.errors import InvalidEmbeddingError, UnknownModelError
from perturbscope.inference.embedder import Embeddings
from perturbscope.protocol.checks import embedding_matrix, texts
from perturbscope.protocol.messages import (
    Answer,
    CompareAnswer,
    CompareRequest,
    ModelInfo,
    ModelsAnswer,
    ModelsRequest,
    Request,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.scoring.results import CompareResult, ScoreOptions, ScoreResult

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds to wait for one answer: a CPU needs minutes for a few hundred long cells."""
CONNECT_TIMEOUT = 10.0


class Conversations:
    """What a client says, whatever it says it over.

    Parameters
    ----------
    model
        Name of the model; None: the server's default.
    retries
        When to try again.
    chunks
        How many cells one request carries.
    seed
        Of the jitter between tries; None: a different one in each client.
    """

    def __init__(
        self, *, model: str | None, retries: RetryPolicy | None, chunks: ChunkLimits | None, seed: int | None
    ) -> None:
        self.model = model
        self._policy = retries or RetryPolicy()
        self._chunks = chunks or ChunkLimits()
        self._rng = np.random.default_rng(seed)

    def _ask(self, request: Request) -> Conversation[Answer]:
        return ask(request, self._policy, self._rng)

    def _embed(self, cells: CountMatrix, progress: Callable[[int], None] | None) -> Conversation[Embeddings]:
        return embed_in_chunks(
            cells, model=self.model, limits=self._chunks, policy=self._policy, rng=self._rng, progress=progress
        )

    def _flight(self) -> Flight:
        return Flight(model=self.model, limits=self._chunks, policy=self._policy, rng=self._rng)

    def _score(self, request: ScoreRequest) -> Conversation[ScoreAnswer]:
        answer = yield from self._ask(request)
        return expect(answer, ScoreAnswer)

    def _compare(self, request: CompareRequest) -> Conversation[CompareAnswer]:
        answer = yield from self._ask(request)
        return expect(answer, CompareAnswer)

    def _models(self) -> Conversation[tuple[ModelInfo, ...]]:
        answer = yield from self._ask(ModelsRequest())
        return expect(answer, ModelsAnswer).models

    def _score_request(
        self,
        source: CountMatrix | NDArray[Any],
        perturbations: Sequence[str],
        control: str,
        batches: Sequence[str] | None,
        options: ScoreOptions | None,
    ) -> ScoreRequest:
        return ScoreRequest(
            **_source(source),
            perturbations=texts(list(perturbations), "perturbations"),
            control=control,
            batches=None if batches is None else texts(list(batches), "batches"),
            options=options or ScoreOptions(),
            model=self.model,
        )

    def _compare_request(
        self,
        source: CountMatrix | NDArray[Any],
        perturbations: Sequence[str],
        pairs: Sequence[tuple[str, str]] | None,
        control: str | None,
        batches: Sequence[str] | None,
        options: ScoreOptions | None,
    ) -> CompareRequest:
        return CompareRequest(
            **_source(source),
            perturbations=texts(list(perturbations), "perturbations"),
            pairs=None if pairs is None else tuple((a, b) for a, b in pairs),
            control=control,
            batches=None if batches is None else texts(list(batches), "batches"),
            options=options or ScoreOptions(),
            model=self.model,
        )


class SyncBase(Conversations):
    """A client whose methods block; subclasses make one exchange."""

    def _exchange(self, request: Request) -> Answer:
        """One request and its answer. Raises :class:`Failure`."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connections."""
        raise NotImplementedError

    def _hold(self, conversation: Conversation[T]) -> T:
        try:
            step = next(conversation)
            while True:
                try:
                    reply = self._perform(step)
                except Failure as failure:
                    step = conversation.throw(failure)
                else:
                    step = conversation.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)

    def _perform(self, step: Step) -> Reply:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        if isinstance(step, Together):
            return hold_together(self._hold, step)
        return self._exchange(step)

    @property
    def model_id(self) -> str:
        """Id of the model that answers; asks the server."""
        return _chosen(self.models(), self.model).model_id

    def models(self) -> tuple[ModelInfo, ...]:
        """What the server offers; the first is the default."""
        return self._hold(self._models())

    def embed_cells(self, cells: CountMatrix, *, progress: Callable[[int], None] | None = None) -> Embeddings:
        """Embed cells, in chunks that the server takes; `progress` is told the number of cells of each chunk."""
        return self._hold(self._embed(cells, progress))

    def embed_stream(
        self, chunks: Iterable[CountMatrix], *, progress: Callable[[int], None] | None = None
    ) -> Iterator[Embeddings]:
        """Embed any number of cells, one result a chunk, in order and in bounded memory.

        Only chunks that are not answered are held, so many that ``at_a_time`` parts of :class:`ChunkLimits` are in
        flight; the next chunk is taken from `chunks` when results are. What breaks off is taken up again at the first
        cell that was not answered, as :class:`RetryPolicy` says.

        Parameters
        ----------
        chunks
            Cells, all chunks with the same genes. Rows are counted on from the `first_row` of the first.
        progress
            Told the number of cells of each part.

        Raises
        ------
        InvalidInputError
            One of its subclasses says what is wrong with the cells, and in which row; the results before stay good.
        UnknownModelError, ServerError
            The server has another model by now.
        """
        flight, source = self._flight(), iter(chunks)
        waiting: deque[Later[Embeddings]] = deque()
        while True:
            for part in fill(flight, source):
                waiting.append(Later(partial(self._hold, flight.ask(part))))
            if not waiting:
                return
            result = _landed(flight, waiting.popleft().result(), progress)
            if result is not None:
                yield result

    def score(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreResult:
        """Score embeddings; see :func:`perturbscope.score_perturbations`."""
        request = self._score_request(embeddings, perturbations, control, batches, options)
        return self._hold(self._score(request)).result

    def compare(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareResult:
        """Compare perturbations; see :func:`perturbscope.compare_perturbations`."""
        request = self._compare_request(embeddings, perturbations, pairs, control, batches, options)
        return self._hold(self._compare(request)).result

    def score_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreAnswer:
        """Embed and score cells in one request, which must fit within the server's limits."""
        return self._hold(self._score(self._score_request(cells, perturbations, control, batches, options)))

    def compare_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareAnswer:
        """Embed and compare cells in one request, which must fit within the server's limits."""
        request = self._compare_request(cells, perturbations, pairs, control, batches, options)
        return self._hold(self._compare(request))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncBase(Conversations):
    """A client whose methods are awaited; the same conversations as :class:`SyncBase`."""

    async def _exchange(self, request: Request) -> Answer:
        """One request and its answer. Raises :class:`Failure`."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connections."""
        raise NotImplementedError

    async def _hold(self, conversation: Conversation[T]) -> T:
        try:
            step = next(conversation)
            while True:
                try:
                    reply = await self._perform(step)
                except Failure as failure:
                    step = conversation.throw(failure)
                else:
                    step = conversation.send(reply)
        except StopIteration as stop:
            return cast("T", stop.value)

    async def _perform(self, step: Step) -> Reply:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        if isinstance(step, Together):
            return await hold_together_async(self._hold, step)
        return await self._exchange(step)

    async def models(self) -> tuple[ModelInfo, ...]:
        """What the server offers; the first is the default."""
        return await self._hold(self._models())

    async def embed_cells(self, cells: CountMatrix, *, progress: Callable[[int], None] | None = None) -> Embeddings:
        """See :meth:`Client.embed_cells`."""
        return await self._hold(self._embed(cells, progress))

    async def embed_stream(
        self,
        chunks: Iterable[CountMatrix] | AsyncIterable[CountMatrix],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Embeddings]:
        """See :meth:`Client.embed_stream`; `chunks` may be either kind of iterable."""
        flight, source = self._flight(), each(chunks)
        waiting: deque[asyncio.Task[Embeddings]] = deque()
        try:
            while True:
                async for part in fill_async(flight, source):
                    waiting.append(asyncio.ensure_future(self._hold(flight.ask(part))))
                if not waiting:
                    return
                result = _landed(flight, await waiting.popleft(), progress)
                if result is not None:
                    yield result
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def score(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreResult:
        """See :meth:`Client.score`."""
        request = self._score_request(embeddings, perturbations, control, batches, options)
        return (await self._hold(self._score(request))).result

    async def compare(
        self,
        embeddings: NDArray[Any],
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareResult:
        """See :meth:`Client.compare`."""
        request = self._compare_request(embeddings, perturbations, pairs, control, batches, options)
        return (await self._hold(self._compare(request))).result

    async def score_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        control: str,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> ScoreAnswer:
        """See :meth:`Client.score_cells`."""
        return await self._hold(self._score(self._score_request(cells, perturbations, control, batches, options)))

    async def compare_cells(
        self,
        cells: CountMatrix,
        perturbations: Sequence[str],
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        control: str | None = None,
        batches: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
    ) -> CompareAnswer:
        """See :meth:`Client.compare_cells`."""
        request = self._compare_request(cells, perturbations, pairs, control, batches, options)
        return await self._hold(self._compare(request))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _landed(flight: Flight, found: Embeddings, progress: Callable[[int], None] | None) -> Embeddings | None:
    if progress:
        progress(len(found))
    return flight.land(found)


def _source(source: CountMatrix | NDArray[Any]) -> dict[str, Any]:
    if isinstance(source, CountMatrix):
        return {"cells": source}
    array = np.asarray(source)
    if array.dtype.kind not in "iuf":
        raise InvalidEmbeddingError(f"Embeddings have dtype {array.dtype}; numbers are needed.", field="embeddings")
    return {"embeddings": embedding_matrix(array)}


def _chosen(models: Sequence[ModelInfo], name: str | None) -> ModelInfo:
    for model in models:
        if name in (None, model.name, f"{model.name}@{model.version}", model.model_id):
            return model
    names = ", ".join(model.name for model in models)
    raise UnknownModelError(f"The server has no model {name!r}; it has {names or 'none'}.", field="model")

"""The two ways to hold a conversation with a server: blocking, and with ``await``."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from perturbscope.cells.counts import CountMatrix
from perturbscope.client.conversation import Conversation, Failure, Pause, Reply, Step, Together
from perturbscope.client.methods import Conversations, awaitable, blocking
from perturbscope.client.streams import Flight, Later, chunks_of, each, fill, fill_async
from perturbscope.client.together import hold_together, hold_together_async
from perturbscope.errors import UnknownModelError
from perturbscope.families.outputs import OutputSpec, cell_embedding
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.messages import Answer, ModelInfo, Request
from perturbscope.protocol.outputs import spec_from_dict

T = TypeVar("T")
TIMEOUT = 600.0
"""Seconds to wait for one answer: a CPU needs minutes for a few hundred long cells."""
CONNECT_TIMEOUT = 10.0


class SyncBase(Conversations):
    """A client whose methods block; subclasses send one request and return its answer."""

    def _exchange(self, request: Request) -> Answer:
        """Send one request and return its answer. Raises :class:`Failure`."""
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
        """Id of the model that answers; every access asks the server."""
        return self._info().model_id

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """Outputs of the model that answers, the cell embedding among them; every access asks the server."""
        info = self._info()
        if not info.outputs:  # a server from before there were others
            return (cell_embedding(info.width),)
        return tuple(spec_from_dict(asdict(output)) for output in info.outputs)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest cell that the model reads, 0 if the server does not say; asks the server."""
        return self._info().max_length

    def _info(self) -> ModelInfo:
        return _pick(self.models(), self.model)

    ask = blocking(Conversations._ask)
    models = blocking(Conversations._models)
    embed_cells = blocking(Conversations._embed_cells)
    score = blocking(Conversations._score)
    compare = blocking(Conversations._compare)
    score_cells = blocking(Conversations._score_cells)
    compare_cells = blocking(Conversations._compare_cells)

    if not TYPE_CHECKING:  # a type checker knows `ask`; any other name would pass it here

        def __getattr__(self, name: str) -> Callable[..., Any]:
            conversation = self._operation(name)
            return lambda *values, **fields: self._hold(conversation(*values, **fields))

    def embed_stream(
        self,
        chunks: Iterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Embeddings]:
        """Embed any number of cells, one result a chunk, in order and in bounded memory.

        Memory holds only chunks that are not answered, enough for ``at_a_time`` parts of :class:`ChunkLimits` in
        flight; the next chunk is taken from `chunks` when a result is. After a failure that :class:`RetryPolicy` allows
        to retry, the stream continues at the first cell that was not answered.

        Parameters
        ----------
        chunks
            Cells; all chunks have the same genes. Rows are numbered from the `first_row` of the first chunk.
        outputs
            Names of outputs that are wanted beside the cell embedding.
        progress
            Called with the number of cells of each part.

        Raises
        ------
        InvalidInputError
            The cells are bad; the subclass and message say how, and in which row. Results before it stay good.
        UnknownModelError, ServerError
            The server has replaced its model.
        """
        flight, source = self._flight(outputs), chunks_of(chunks)
        waiting: deque[Later[Embeddings]] = deque()
        while True:
            for part in fill(flight, source):
                waiting.append(Later(partial(self._hold, flight.ask(part))))
            if not waiting:
                return
            result = _landed(flight, waiting.popleft().result(), progress)
            if result is not None:
                yield result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncBase(Conversations):
    """A client whose methods are awaited; it holds the same conversations as :class:`SyncBase`."""

    async def _exchange(self, request: Request) -> Answer:
        """Send one request and return its answer. Raises :class:`Failure`."""
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

    ask = awaitable(Conversations._ask)
    models = awaitable(Conversations._models)
    embed_cells = awaitable(Conversations._embed_cells)
    score = awaitable(Conversations._score)
    compare = awaitable(Conversations._compare)
    score_cells = awaitable(Conversations._score_cells)
    compare_cells = awaitable(Conversations._compare_cells)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]:
            conversation = self._operation(name)

            async def method(*values: Any, **fields: Any) -> Any:
                return await self._hold(conversation(*values, **fields))

            return method

    async def embed_stream(
        self,
        chunks: Iterable[CountMatrix] | AsyncIterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Embeddings]:
        """See :meth:`Client.embed_stream`; `chunks` may be either kind of iterable."""
        flight, source = self._flight(outputs), each(chunks)
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


def _pick(models: Sequence[ModelInfo], name: str | None) -> ModelInfo:
    for model in models:
        if name in (None, model.name, f"{model.name}@{model.version}", model.model_id):
            return model
    names = ", ".join(model.name for model in models)
    raise UnknownModelError(f"The server has no model {name!r}; it has {names or 'none'}.", field="model")

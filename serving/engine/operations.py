"""The operations as this server answers them, for both transports.

Embedding, scoring and the list of models have methods of the engine. Any other operation of the table brings a function
over a model, which runs on a thread of its own; tokenizing and inference inside of it go the way of an embed request.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.families.outputs import Outputs, OutputSpec, selected
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.embedder import Embedder
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.fields import PER_ROW, Meta
from perturbscope.protocol.operations import Operation, check_capability
from perturbscope.threads import usable_cores
from serving.access import limits
from serving.call import Call
from serving.engine.columns import Columns, columns_to_json
from serving.engine.engine import Engine, reserved_bytes
from serving.engine.reports import (
    HTML,
    ReportAnswer,
    ReportRequest,
    report_answer_to_html,
    report_request_from_arrow,
    report_request_from_json,
)
from serving.models.loading import ServedModel

T = TypeVar("T")
Answers = Callable[[Engine, Any, Call], Awaitable[Any]]
_STAGES: tuple[str, ...] = ("tokenize", "queue", "inference", "score")
_COMPUTING = threading.BoundedSemaphore(usable_cores())
"""Held by a thread while it runs a function over a model, and not while it waits for the model."""


@dataclass(frozen=True)
class Served:
    """One kind of request over HTTP.

    Attributes
    ----------
    name
        The last part of the path; also the route of its uploads.
    summary
        Sentence about it.
    call
        Answers a decoded request.
    decode, encode
        Functions by media type; the first of `encode` is the default.
    uploads
        Whether an uploaded file makes a request.
    operation
        The operation of the table; None: the server adds it, over HTTP alone.
    has_body
        Whether it is asked with POST.
    """

    name: str
    summary: str
    call: Answers
    decode: Mapping[str, Callable[[bytes], Any]]
    encode: Mapping[str, Callable[[Any], bytes]]
    uploads: bool = True
    operation: Operation[Any, Any] | None = None
    path: str = field(init=False)
    has_body: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"/v1/{self.name}")
        object.__setattr__(self, "has_body", self.uploads or bool(self.decode))


async def _score(engine: Engine, request: protocol.ScoreRequest, call: Call) -> protocol.ScoreAnswer:
    return await engine.scores.score(request, call)


async def _compare(engine: Engine, request: protocol.CompareRequest, call: Call) -> protocol.CompareAnswer:
    return await engine.scores.compare(request, call)


async def _models(engine: Engine, _request: Any, _call: Call) -> protocol.ModelsAnswer:
    return engine.models()


async def _report(engine: Engine, request: ReportRequest, call: Call) -> ReportAnswer:
    return await engine.scores.report(request, call)


async def _columns(_engine: Engine, columns: Columns, call: Call) -> Columns:
    """Everything is known once the file is read."""
    call.cells = columns.n_cells
    return columns


_ANSWERS: Mapping[str, Answers] = {"embed": Engine.embed, "score": _score, "compare": _compare, "models": _models}
REPORT = Served(
    "report",
    "As /v1/score, as a page to read.",
    _report,
    {protocol.JSON: report_request_from_json, protocol.ARROW: report_request_from_arrow},
    {HTML: report_answer_to_html},
)
COLUMNS = Served(
    "columns", "The labels of an .h5ad file, to choose from.", _columns, {}, {protocol.JSON: columns_to_json}
)


def served(operation: Operation[Any, Any]) -> Served:
    """Return an operation of the table as this server answers it."""
    decode: dict[str, Callable[[bytes], Any]] = {}
    if operation.has_body:
        decode = {
            protocol.JSON: partial(protocol.request_from_json, operation.request),
            protocol.ARROW: partial(protocol.request_from_arrow, operation.request),
        }
    encode: dict[str, Callable[[Any], bytes]] = {protocol.JSON: protocol.answer_to_json}
    if operation.has_arrow:
        encode[protocol.ARROW] = protocol.answer_to_arrow
    call = _ANSWERS.get(operation.name) or partial(_run, operation)
    uploads = bool(operation.takes.of("cells", *PER_ROW))
    return Served(operation.name, operation.summary, call, decode, encode, uploads, operation)


def all_served() -> list[Served]:
    """Return everything that this server answers over HTTP with one answer."""
    return [*map(served, OPERATIONS.values()), REPORT, COLUMNS]


async def _run(operation: Operation[Any, Any], engine: Engine, request: Any, call: Call) -> Any:
    """Answer a request by the function of its operation. Raises as :meth:`Engine.embed`, and what the function raises.

    Raises
    ------
    UnsupportedOperationError
        The model cannot do it.
    """
    cells = [value for item in operation.takes.of("cells") if (value := getattr(request, item.name)) is not None]
    vectors = [value for item in operation.takes.of("vectors") if (value := getattr(request, item.name)) is not None]
    call.take(max(map(len, [*cells, *vectors]), default=0))
    with engine.registry.lease(getattr(request, "model", None)) as model:
        call.model, call.model_id = model.embedder, model.info.model_id
        check_capability(operation, model.info.name, model.capabilities, engine.registry.capable(operation.capability))
        for matrix in cells:
            limits.check_shape(engine.settings, len(matrix), matrix.n_genes, int(matrix.counts.nnz))
            if operation.cost is None:
                call.reserve(reserved_bytes(model.embedder, matrix, (), call))
        for matrix in vectors:
            limits.check_vectors(engine.settings, len(matrix))
        if operation.cost is not None:
            answer = await engine.scores.computed(
                partial(operation.answered, model.embedder, request), partial(operation.cost, request), call
            )
        else:
            queued = _QueuedModel(engine, model, call)
            try:
                answer = await _on_a_thread(partial(queued.answer, operation, request))
            finally:
                queued.leave()
    arrays = sum(value.nbytes for value in vars(answer).values() if isinstance(value, np.ndarray))
    call.reserve((1 + call.growth) * arrays)
    return _timed(answer, call)


def _timed(answer: Any, call: Call) -> Any:
    """Return an answer with the seconds of this server's stages, if it says what made it."""
    meta = getattr(answer, "meta", None)
    if not isinstance(meta, Meta):
        return answer
    seconds = {stage: call.timings[stage] for stage in _STAGES if stage in call.timings}
    return replace(answer, meta=replace(meta, timings={**meta.timings, **seconds}))


class _QueuedModel(Embedder):
    """A model for one request: its cells are tokenized on the server's workers, and wait in the model's queue.

    Its methods block, and are called on a thread; the event loop does the work.
    """

    def __init__(self, engine: Engine, model: ServedModel, call: Call) -> None:
        vars(self).update(vars(model.embedder))
        self._engine, self._model, self._call = engine, model, call
        self._loop = asyncio.get_running_loop()
        # A thread that tokenizes the next chunk meanwhile would wait beside this one.
        self.overlap = False
        self._waiting: Future[Any] | None = None
        self._inferred = 0
        self._left = threading.Event()

    def answer(self, operation: Operation[Any, Any], request: Any) -> Any:
        """Call the function of an operation with this model."""
        with _COMPUTING:
            return operation.answered(self, request)

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """See :meth:`Embedder.tokenize`."""
        return self._wait(self._cells_tokenized, cells)

    async def _cells_tokenized(self, cells: CountMatrix) -> TokenizedCells:
        with self._call.stage("tokenize"):
            tokens, _ = await self._engine.tokenize(self._model.embedder, cells)
        return tokens

    def infer(
        self,
        tokens: TokenizedCells,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Outputs:
        """See :meth:`Embedder.infer`. Raises as :meth:`Dispatcher.submit`."""
        found = self._wait(self._cells_inferred, tokens, outputs)
        if progress:
            progress(len(found))
        return found

    def run(
        self, tokens: TokenizedCells, rows: NDArray[np.integer[Any]], outputs: Sequence[OutputSpec] | None = None
    ) -> Outputs:
        """See :meth:`Embedder.run`; the queue makes the batches."""
        return self.infer(tokens.take(rows), None if outputs is None else [spec.name for spec in outputs])

    async def _cells_inferred(self, tokens: TokenizedCells, outputs: Sequence[str] | None) -> Outputs:
        rows = {"cell": len(tokens), "token": int(tokens.offsets[-1])}
        needed = 4 * sum(rows[spec.per] * spec.width for spec in selected(self.outputs, outputs))
        if self._call.held is not None:
            # What was inferred before is likely summed up by now.
            self._call.held.release_reserved(self._inferred)
        self._inferred = 0
        self._call.reserve(needed)
        self._inferred = needed
        found, _ = await self._engine.infer_tokens(self._model, tokens, self._call, outputs)
        return found

    def close(self) -> None:
        """Do nothing: the model is the server's."""

    def leave(self) -> None:
        """Wait for nothing any more; called on the event loop, when the request is over."""
        self._left.set()
        if self._waiting is not None:
            self._waiting.cancel()

    def _wait(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        if self._left.is_set():
            raise CancelledError
        future = self._waiting = asyncio.run_coroutine_threadsafe(work(*args), self._loop)
        if self._left.is_set():
            future.cancel()
        _COMPUTING.release()
        try:
            found: T = future.result()
            return found
        finally:
            _COMPUTING.acquire()


async def _on_a_thread(function: Callable[[], T]) -> T:
    """Run a function that mostly waits on a thread of its own. Only admitted requests come here: they are few."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:  # noqa: BLE001  the event loop raises it
            error = caught
        with contextlib.suppress(RuntimeError):  # the server has stopped, and nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name="perturbscope-operation").start()
    return await done

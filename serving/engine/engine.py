"""What the server does with a request, whatever it came over.

The transports decode a request, hand it to the :class:`Engine`, and encode its answer. Decoding, tokenizing and
encoding run on worker threads, scores take turns on threads of their own, and each model runs behind its own
:class:`Dispatcher`: the event loop only ever waits.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.known_genes import PerArray
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.embedder import Embedder, Embeddings
from perturbscope.protocol.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    Meta,
    ModelsAnswer,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.tasks.trained_on import Fingerprint, Seen, find_seen
from serving.access import limits
from serving.access.front import Front
from serving.access.keys import doorkeeper
from serving.access.limits import Admission
from serving.call import Call
from serving.engine.columns import Columns
from serving.engine.reports import ReportAnswer, ReportRequest, make_report
from serving.engine.threads import Turns, Workers
from serving.models.loading import ServedModel
from serving.models.registry import ModelRegistry
from serving.settings import Settings

TOKENIZED = 1024
"""Cells tokenized at a time: a caller that goes away costs no more, and others come in between."""
T = TypeVar("T")
Scored = TypeVar("Scored")


class Engine:
    """Embeds, scores and compares for both transports.

    Parameters
    ----------
    registry
        What is served.
    settings
        Limits.
    """

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self.settings = settings
        self.registry = registry
        self.admission = Admission(settings)
        self.front = Front(self.admission, doorkeeper(settings.keys))
        """What every request passes first."""
        self.score_jobs = 0
        """Score requests that are computed, or wait for their turn."""
        self._met: PerArray[set[str]] = PerArray()
        """Models that have met a list of genes."""
        self._workers = Workers()
        # A thread for each score that may be in progress; no more than score_workers of them compute.
        self._scorers = ThreadPoolExecutor(settings.max_requests, thread_name_prefix="perturbscope-score")
        self._turns = Turns(settings.score_workers)
        self._close_by: float | None = None

    @classmethod
    def load(cls, settings: Settings, *, strict: bool = True) -> Engine:
        """Load and prove every bundle of the settings. Raises as :meth:`ModelRegistry.open`."""
        return cls(ModelRegistry.open(settings, strict=strict), settings)

    def models(self) -> ModelsAnswer:
        """What is served; the first is the default."""
        return ModelsAnswer(models=self.registry.infos())

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Run what would block the event loop (decode, tokenize, encode) on a worker thread."""
        return await self._workers.run(function, *args)

    async def embed(self, request: EmbedRequest, call: Call | None = None) -> Embeddings:
        """Vectors of cells.

        Raises
        ------
        UnknownModelError
            No model of that name is served.
        LimitExceededError
            More cells, genes or values than allowed.
        InvalidInputError
            The cells cannot be tokenized.
        OverloadedError
            The queue is full.
        InferenceError
            The forward pass failed.
        """
        with self.registry.lease(request.model) as model:
            return await self.embed_with(model, request.cells, call)

    async def embed_with(self, model: ServedModel, cells: CountMatrix, call: Call | None = None) -> Embeddings:
        """Vectors of cells by a leased model. Raises as :meth:`embed`."""
        call = call or Call("", "http")
        call.model = model.embedder
        limits.check_shape(self.settings, len(cells), cells.n_genes, int(cells.counts.nnz))
        model.dispatcher.require_room(len(cells), _most_tokens(model, cells), call.caller.name, call.deadline)
        call.reserve(self.memory(model, cells, call))
        with call.stage("tokenize"):
            tokens, seconds = await self.tokenize(model.embedder, cells)
        values, timings = await self.infer_tokens(model, tokens, call)
        return model.embedder.describe(tokens, values, {"tokenize": seconds, **timings})

    def memory(self, model: ServedModel, cells: CountMatrix, call: Call) -> int:
        """Bytes that tokens, vectors and encoded answer of cells will take, about."""
        return 4 * _most_tokens(model, cells) + 4 * len(cells) * model.embedder.width * (1 + call.growth)

    async def tokenize(self, embedder: Embedder, cells: CountMatrix) -> tuple[TokenizedCells, float]:
        """Tokens of cells, a thousand at a time, and seconds. Raises as :meth:`Embedder.tokenize`."""
        starts = range(0, max(len(cells), 1), TOKENIZED)
        met = self._met.get(cells.gene_ids)
        if met is None or embedder.model_id not in met:
            # Where a list of genes is new, each of them is looked up, however small the cells are: without arguments,
            # work is not taken for small.
            parts = [await self.work(functools.partial(_tokenize, embedder, cells, start)) for start in starts]
            self._met.put(cells.gene_ids, {embedder.model_id, *(met or ())})
        else:
            parts = [await self.work(_tokenize, embedder, cells, start) for start in starts]
        tokens = parts[0][0] if len(parts) == 1 else await self.work(concatenate, [part for part, _ in parts])
        return tokens, sum(seconds for _, seconds in parts)

    async def infer_tokens(
        self, model: ServedModel, tokens: TokenizedCells, call: Call | None = None
    ) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Vectors of cells that are tokens already, and seconds by stage. Raises as :meth:`Dispatcher.submit`."""
        call = call or Call("", "http")
        call.model, call.model_id = model.embedder, model.info.model_id
        call.tokens += int(tokens.offsets[-1])
        turn = None if call.trace is None else call.trace.turn()
        with call.stage("queue", turn) as stage:
            values, timings = await model.dispatcher.submit(
                tokens, flow=call.caller.name, deadline=call.deadline, tag=turn
            )
            stage.ended_with("inference", timings["inference"])
        return values, timings

    async def score(self, request: ScoreRequest, call: Call | None = None) -> ScoreAnswer:
        """Every perturbation against the controls. Raises as :meth:`embed`, and as `score_perturbations`."""
        from perturbscope.scoring.control import score_perturbations

        limits.check_options(self.settings, request.options)
        embeddings, meta, warnings = await self._embeddings(request, call)
        await self._reserve(request, embeddings, call)
        result, seconds = await self._scored(
            lambda progress: score_perturbations(
                embeddings,
                request.perturbations,
                control=request.control,
                batches=request.batches,
                options=request.options,
                progress=progress,
            ),
            call,
        )
        result = replace(result, warnings=[*warnings, *result.warnings])
        return ScoreAnswer(result=result, meta=_timed(meta, seconds))

    async def compare(self, request: CompareRequest, call: Call | None = None) -> CompareAnswer:
        """Perturbations against each other. Raises as :meth:`embed`, and as `compare_perturbations`."""
        from perturbscope.scoring.pairs import compare_perturbations

        limits.check_options(self.settings, request.options)
        embeddings, meta, warnings = await self._embeddings(request, call)
        await self._reserve(request, embeddings, call)
        result, seconds = await self._scored(
            lambda progress: compare_perturbations(
                embeddings,
                request.perturbations,
                pairs=request.pairs,
                control=request.control,
                batches=request.batches,
                options=request.options,
                progress=progress,
            ),
            call,
        )
        result = replace(result, warnings=[*warnings, *result.warnings])
        return CompareAnswer(result=result, meta=_timed(meta, seconds))

    async def report(self, request: ReportRequest, call: Call | None = None) -> ReportAnswer:
        """The result page of a score. Raises as :meth:`score`."""
        limits.check_options(self.settings, request.score.options)
        embeddings, meta, warnings = await self._embeddings(request.score, call)
        await self._reserve(request.score, embeddings, call)
        report, seconds = await self._scored(
            lambda progress: make_report(request, embeddings, meta, warnings, progress), call
        )
        return ReportAnswer(report=report, meta=_timed(meta, seconds))

    def seen(self, request: Any, file: Fingerprint | None, call: Call | None = None) -> Seen | None:
        """What the model that answered `request` was trained on of an uploaded file; None without a file."""
        if file is None:
            return None
        if call is not None and call.model is not None:
            return find_seen(call.model.training, file)
        asked = request.score if isinstance(request, ReportRequest) else request
        with self.registry.lease(asked.model) as model:
            return find_seen(model.embedder.training, file)

    async def columns(self, columns: Columns, call: Call | None = None) -> Columns:
        """What a file holds: all is known once it is read."""
        return columns

    async def ready(self) -> bool:
        """Whether the models answer. One that failed last is tried with one cell, so that it can recover."""
        if self.admission.closed:
            return False
        return await self.registry.ready()

    def begin_close(self) -> None:
        """Refuse what comes from now on, and not be ready any more. May be called twice."""
        if self._close_by is None:
            self._close_by = time.monotonic() + self.settings.shutdown_grace
        self.admission.closed = True

    async def close(self) -> None:
        """Finish what was accepted, within ``shutdown_grace`` seconds of the first sign; then stop all threads.

        What is not done by then is ended, and its callers are told so.
        """
        self.begin_close()
        assert self._close_by is not None  # noqa: S101  begin_close sets it
        if not await self.admission.drained(self._close_by - time.monotonic()):
            self.front.stop()
            await self.admission.drained(limits.LAST_WORDS)
        await self.registry.close()
        self._workers.close()
        self._scorers.shutdown(wait=False, cancel_futures=True)

    async def _embeddings(
        self, request: ScoreRequest | CompareRequest, call: Call | None
    ) -> tuple[NDArray[np.float32], Meta, list[str]]:
        """The vectors to be scored: the caller's own, or those of the cells."""
        if request.cells is None:
            given = cast("NDArray[np.float32]", request.embeddings)
            limits.check_vectors(self.settings, len(given))
            return given, Meta(), []
        # A missing control label should not cost the embedding of all cells.
        await self.work(_check_labels, request)
        found = await self.embed(EmbedRequest(cells=request.cells, model=request.model), call)
        meta = Meta(
            model_id=found.model_id,
            vocabulary_hash=found.vocabulary_hash,
            coverage=found.coverage,
            timings=found.timings,
            variant=found.variant,
        )
        return found.values, meta, found.warnings()

    async def _reserve(
        self, request: ScoreRequest | CompareRequest, embeddings: NDArray[np.float32], call: Call | None
    ) -> None:
        """Hold the memory of a score before it begins: scores that wait for their turn keep what they have computed."""
        if call is not None:
            needed = await self.work(_score_bytes, request, embeddings.shape[1])
            call.reserve(needed, "Ask for smaller groups (max_cells), or compare fewer perturbations at a time.")

    async def _scored(
        self, score: Callable[[Callable[[str, int, int], None]], Scored], call: Call | None
    ) -> tuple[Scored, float]:
        """Score on a thread of its own, when it is its turn. When the caller goes, it ends at its next progress."""
        call = call or Call("", "http")
        job = self._turns.new()

        def timed() -> tuple[Scored, float]:
            with self._turns.turn(job, call.caller.name):
                return score(lambda stage, done, total: job.step()), job.computed()

        self.score_jobs += 1
        try:
            with call.stage("score_queue") as stage:
                scored, seconds = await asyncio.get_running_loop().run_in_executor(self._scorers, timed)
                stage.ended_with("score", seconds)
        except asyncio.CancelledError:
            self._turns.cancel(job)
            raise
        finally:
            self.score_jobs -= 1
        return scored, seconds


def _most_tokens(model: ServedModel, cells: CountMatrix) -> int:
    """No fewer than the tokens of cells."""
    return int(np.minimum(np.diff(cells.counts.indptr), model.embedder.family.max_length).sum())


def _tokenize(embedder: Embedder, cells: CountMatrix, start: int) -> tuple[TokenizedCells, float]:
    started = time.perf_counter()
    part = cells if len(cells) <= TOKENIZED else cells[start : start + TOKENIZED]
    return embedder.tokenize(part), time.perf_counter() - started


def _score_bytes(request: ScoreRequest | CompareRequest, width: int) -> int:
    return limits.score_bytes(
        request.perturbations,
        request.control,
        request.options,
        pairs=isinstance(request, CompareRequest),
        width=width,
        batches=request.batches is not None,
    )


def _check_labels(request: ScoreRequest | CompareRequest) -> None:
    """The checks of labels that scoring makes, on vectors of ones."""
    from perturbscope.scoring.labels import Groups

    ones = np.ones((len(request.perturbations), 1))
    groups = Groups.of(ones, request.perturbations, request.batches, request.options, control=request.control)
    groups.scorable([name for name in groups.sizes if name != request.control], request.options)


def _timed(meta: Meta, seconds: float) -> Meta:
    return replace(meta, timings={**meta.timings, "score": seconds})

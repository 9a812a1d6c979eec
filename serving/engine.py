"""What the server does with a request, whatever it came over.

The transports decode a request, hand it to the :class:`Engine`, and encode its answer. Decoding, tokenizing and
encoding run on worker threads, scoring on threads of its own, and the model behind the one :class:`Dispatcher` of its
bundle: the event loop only ever waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.batching import BatchLimits
from perturbscope.bundle import Bundle
from perturbscope.counts import CountMatrix
from perturbscope.dispatcher import Dispatcher
from perturbscope.embedder import Embedder, Embeddings
from perturbscope.encoder import Device
from perturbscope.errors import LimitExceededError, OverloadedError, PerturbScopeError, UnknownModelError
from perturbscope.families import TokenizedCells
from perturbscope.results import ScoreOptions
from perturbscope.wire.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedRequest,
    Meta,
    ModelInfo,
    ModelsAnswer,
    ScoreAnswer,
    ScoreRequest,
)
from serving.settings import PREFIX, Settings

T = TypeVar("T")
Scored = TypeVar("Scored")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model and its queue.

    Attributes
    ----------
    info
        What a caller is told of it.
    embedder
        Tokenizer and graph.
    dispatcher
        The queue in front of the graph.
    probe
        One little cell, to warm the model up and to see whether it works.
    """

    info: ModelInfo
    embedder: Embedder
    dispatcher: Dispatcher
    probe: CountMatrix

    @classmethod
    def load(cls, path: str | os.PathLike[str], settings: Settings) -> ServedModel:
        """Open a bundle, build its session and run one cell through it.

        Raises
        ------
        BundleError
            The bundle is damaged, unsupported, or has no such variant.
        ProviderUnavailableError
            The device was asked for and is not there.
        InferenceError
            The graph does not run.
        """
        bundle = Bundle.open(os.fspath(path))
        device = cast("Device", settings.device)
        embedder = Embedder.from_bundle(
            bundle,
            variant=settings.variant,
            device=device,
            threads=settings.threads or None,
            limits=BatchLimits(max_tokens=settings.max_batch_tokens),
        )
        manifest = bundle.manifest
        info = ModelInfo(
            name=manifest.name,
            version=manifest.version,
            model_id=bundle.model_id,
            family=manifest.family,
            width=manifest.width,
            vocabulary_hash=manifest.vocabulary_hash,
            layer=manifest.layer,
            pooling=manifest.pooling,
            licence=manifest.licence,
            variant=settings.variant,
            device=device,
        )
        probe = CountMatrix.from_matrix([[1]], [bundle.vocabulary.gene_ids[0]])
        embedder.embed(probe)
        dispatcher = Dispatcher(embedder, max_queued_tokens=settings.max_queued_tokens)
        return cls(info, embedder, dispatcher, probe)


class Engine:
    """Embeds, scores and compares for both transports.

    Parameters
    ----------
    models
        What is served; the first is the default.
    settings
        Limits.
    """

    def __init__(self, models: Sequence[ServedModel], settings: Settings) -> None:
        assert models, "an engine needs a model"  # noqa: S101  our own bug: Settings demands a bundle
        self.settings = settings
        self._models = tuple(models)
        self._in_progress = 0
        self._held_bytes = 0
        self._closed = False
        self._workers = ThreadPoolExecutor(
            max_workers=max(2, len(os.sched_getaffinity(0))), thread_name_prefix="perturbscope-worker"
        )
        self._scorers = ThreadPoolExecutor(settings.score_workers, thread_name_prefix="perturbscope-score")

    @classmethod
    def load(cls, settings: Settings) -> Engine:
        """Load and warm up every bundle of the settings. Raises as :meth:`ServedModel.load`."""
        return cls([ServedModel.load(path, settings) for path in settings.bundles], settings)

    def models(self) -> ModelsAnswer:
        """What is served; the first is the default."""
        return ModelsAnswer(models=tuple(model.info for model in self._models))

    @contextlib.contextmanager
    def admit(self) -> Iterator[Callable[[int], None]]:
        """Count one request; entered before its body is read.

        Yields
        ------
        A function to be told of the bytes of the body as they arrive; it raises as this method does.

        Raises
        ------
        OverloadedError
            Too many requests, or too many bytes of requests, are in progress, or the server is stopping.
        LimitExceededError
            This request alone is too large.
        """
        settings, mine = self.settings, 0

        def hold(n_bytes: int) -> None:
            nonlocal mine
            if mine + n_bytes > settings.max_body_bytes:
                raise too_many_bytes(settings.max_body_bytes)
            if self._held_bytes + n_bytes > settings.max_held_bytes:
                raise OverloadedError(
                    f"Requests of {self._held_bytes:,} bytes are in progress; the limit is "
                    f"{settings.max_held_bytes:,}. Try again after the stated time.",
                )
            mine += n_bytes
            self._held_bytes += n_bytes

        if self._closed or self._in_progress >= settings.max_requests:
            raise OverloadedError(
                "The server is shutting down. Try again, or use another server."
                if self._closed
                else f"{self._in_progress} requests are in progress, which is the limit. "
                "Try again after the stated time."
            )
        self._in_progress += 1
        try:
            yield hold
        finally:
            self._in_progress -= 1
            self._held_bytes -= mine

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Run what would block the event loop (decode, tokenize, encode) on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    async def embed(self, request: EmbedRequest) -> Embeddings:
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
        model = self._model(request.model)
        self._check_cells(request.cells)
        model.dispatcher.check_room(len(request.cells))
        tokens, seconds = await self.work(_tokenize, model.embedder, request.cells)
        values, timings = await model.dispatcher.submit(tokens)
        return model.embedder.describe(tokens, values, {"tokenize": seconds, **timings})

    async def score(self, request: ScoreRequest) -> ScoreAnswer:
        """Every perturbation against the controls. Raises as :meth:`embed`, and as `score_perturbations`."""
        from perturbscope.scoring import score_perturbations

        self._check_options(request.options)
        embeddings, meta, warnings = await self._embeddings(request)
        result, seconds = await self._scored(
            lambda progress: score_perturbations(
                embeddings,
                request.perturbations,
                control=request.control,
                batches=request.batches,
                options=request.options,
                progress=progress,
            )
        )
        result = replace(result, warnings=[*warnings, *result.warnings])
        return ScoreAnswer(result=result, meta=_timed(meta, seconds))

    async def compare(self, request: CompareRequest) -> CompareAnswer:
        """Perturbations against each other. Raises as :meth:`embed`, and as `compare_perturbations`."""
        from perturbscope.scoring import compare_perturbations

        self._check_options(request.options)
        embeddings, meta, warnings = await self._embeddings(request)
        result, seconds = await self._scored(
            lambda progress: compare_perturbations(
                embeddings,
                request.perturbations,
                pairs=request.pairs,
                control=request.control,
                batches=request.batches,
                options=request.options,
                progress=progress,
            )
        )
        result = replace(result, warnings=[*warnings, *result.warnings])
        return CompareAnswer(result=result, meta=_timed(meta, seconds))

    async def ready(self) -> bool:
        """Whether the models answer. One that failed last is tried with one cell, so that it can recover."""
        if self._closed:
            return False
        for model in self._models:
            if model.dispatcher.last_batch_failed:
                try:
                    await model.dispatcher.submit(await self.work(model.embedder.tokenize, model.probe))
                except PerturbScopeError:
                    return False
        return True

    async def close(self) -> None:
        """Finish what was accepted, refuse the rest, and stop all threads."""
        self._closed = True
        await asyncio.gather(*(model.dispatcher.close() for model in self._models))
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._scorers.shutdown(wait=False, cancel_futures=True)

    def check_shape(self, n_cells: int, n_genes: int, n_values: int) -> None:
        """Refuse a matrix that is too large; callable before it is read.

        Raises
        ------
        LimitExceededError
            Names what is too large, the limit and the remedy.
        """
        limits = self.settings
        for field, found, limit, remedy in (
            ("cells", n_cells, limits.max_cells, "Send the cells in several requests; the client and CLI do so."),
            ("gene_ids", n_genes, limits.max_genes, "Send the genes of the transcriptome only."),
            ("data", n_values, limits.max_values, "Send the cells in several requests."),
        ):
            if found > limit:
                what = {"cells": "cells", "gene_ids": "genes", "data": "stored counts"}[field]
                raise LimitExceededError(
                    f"The request has {found:,} {what}; this server takes {limit:,}. {remedy}", field=field
                )

    def check_vectors(self, n_vectors: int) -> None:
        """Refuse too many embeddings. Raises :class:`LimitExceededError`."""
        if n_vectors > self.settings.max_vectors:
            raise LimitExceededError(
                f"The request has {n_vectors:,} vectors; this server takes {self.settings.max_vectors:,}. "
                "Score a sample of the cells, or score with the library.",
                field="embeddings",
            )

    def _check_cells(self, cells: CountMatrix) -> None:
        self.check_shape(len(cells), cells.n_genes, int(cells.counts.nnz))

    def _check_options(self, options: ScoreOptions) -> None:
        for name, limit in (
            ("permutations", self.settings.max_permutations),
            ("wasserstein_permutations", self.settings.max_permutations),
            ("null_draws", self.settings.max_permutations),
            ("max_cells", self.settings.max_group_cells),
        ):
            if getattr(options, name) > limit:
                raise LimitExceededError(
                    f"{name} is {getattr(options, name):,}; this server takes {limit:,}. "
                    "Ask for less, or score with the library or a server of your own "
                    f"({PREFIX}MAX_PERMUTATIONS, {PREFIX}MAX_GROUP_CELLS).",
                    field=name,
                )

    def _model(self, name: str | None) -> ServedModel:
        """The model of that name or id; None: the default."""
        if name is None:
            return self._models[0]
        for model in self._models:
            if name in (model.info.name, model.info.model_id):
                return model
        raise UnknownModelError(
            f"No model {name!r} is served here; there is {', '.join(model.info.name for model in self._models)}. "
            "Leave the model out to use the first.",
            field="model",
        )

    async def _embeddings(self, request: ScoreRequest | CompareRequest) -> tuple[NDArray[np.float32], Meta, list[str]]:
        """The vectors to be scored: the caller's own, or those of the cells."""
        if request.cells is None:
            given = cast("NDArray[np.float32]", request.embeddings)
            self.check_vectors(len(given))
            return given, Meta(), []
        # A missing control label should not cost the embedding of all cells.
        await self.work(_check_labels, request)
        found = await self.embed(EmbedRequest(cells=request.cells, model=request.model))
        meta = Meta(
            model_id=found.model_id,
            vocabulary_hash=found.vocabulary_hash,
            coverage=found.coverage,
            timings=found.timings,
        )
        return found.values, meta, found.warnings()

    async def _scored(self, score: Callable[[Callable[[str, int, int], None]], Scored]) -> tuple[Scored, float]:
        """Score on a thread of its own. When the caller goes, or the server stops, it ends at its next progress."""
        gone = threading.Event()

        def progress(stage: str, done: int, total: int) -> None:
            if gone.is_set() or self._closed:
                raise _CallerGoneError(stage, done, total)

        def timed() -> tuple[Scored, float]:
            progress("start", 0, 1)
            started = time.perf_counter()
            return score(progress), time.perf_counter() - started

        try:
            return await asyncio.get_running_loop().run_in_executor(self._scorers, timed)
        except asyncio.CancelledError:
            gone.set()
            raise


class _CallerGoneError(Exception):
    """Ends a computation that nobody waits for any more."""


def _tokenize(embedder: Embedder, cells: CountMatrix) -> tuple[TokenizedCells, float]:
    started = time.perf_counter()
    return embedder.tokenize(cells), time.perf_counter() - started


def _check_labels(request: ScoreRequest | CompareRequest) -> None:
    """The checks of labels that scoring makes, on vectors of ones."""
    from perturbscope.groups import Groups

    ones = np.ones((len(request.perturbations), 1))
    groups = Groups.of(ones, request.perturbations, request.batches, request.options, control=request.control)
    groups.scorable([name for name in groups.sizes if name != request.control], request.options)


def _timed(meta: Meta, seconds: float) -> Meta:
    return replace(meta, timings={**meta.timings, "score": seconds})


def too_many_bytes(limit: int) -> LimitExceededError:
    """The error of a body over the limit."""
    return LimitExceededError(
        f"The request is larger than the {limit:,} bytes that this server takes. Send the cells in several requests; "
        "the client and CLI do so.",
        field="body",
    )

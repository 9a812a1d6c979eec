"""The engine: embeds cells for both transports, and owns what requests share.

The transports decode a request, hand it to the :class:`Engine`, and encode its answer. Decoding, tokenizing and
encoding run on worker threads, scores take turns on threads of their own (:mod:`serving.engine.scores`), and each model
runs behind its own :class:`Dispatcher`: the event loop only ever waits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar

import numpy as np

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import PerArray
from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import Outputs, OutputSpec, selected
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.messages import EmbedRequest, ModelsAnswer
from serving.access import limits
from serving.access.front import Front
from serving.access.keys import doorkeeper
from serving.access.limits import Admission
from serving.call import Call
from serving.engine.scores import STUCK, Scores
from serving.engine.threads import Workers
from serving.models.loading import ServedModel
from serving.models.registry import ModelRegistry
from serving.settings import Settings

TOKENIZED = 1024
"""Cells tokenized at a time: a caller that goes away costs no more, and others come in between."""
LARGE = 2**20
"""Bytes from which on work is large: about ten milliseconds of decoding."""
SMALL = 2**13
"""Bytes up to which work is done at once: half a millisecond at most, about what two threads take to hand it on."""
T = TypeVar("T")


class Engine:
    """Embeds cells, and owns what requests share: front door, models, threads.

    Parameters
    ----------
    registry
        The models that are served.
    settings
        Limits of requests.
    """

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self.settings = settings
        self.registry = registry
        self.admission = Admission(settings)
        self.front = Front(self.admission, doorkeeper(settings.keys))
        self._met: PerArray[set[str]] = PerArray()
        """Ids of the models that have met a list of genes."""
        self._workers = Workers()
        self.scores = Scores(settings, registry, self.embed_cells, self.work)
        self._close_by: float | None = None

    @classmethod
    def load(cls, settings: Settings, *, strict: bool = True) -> Engine:
        """Load and prove every bundle of the settings. Raises as :meth:`ModelRegistry.open`."""
        return cls(ModelRegistry.open(settings, strict=strict), settings)

    def models(self) -> ModelsAnswer:
        """Return the models that are served, the default first, and the folders that are not, with the reason."""
        return ModelsAnswer(models=self.registry.infos(), problems=self.registry.problems())

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Run what would block the event loop (decode, tokenize, encode) on a worker thread; small work at once.

        Whatever takes time must be among `args`, for their size decides. Work that has not begun when the caller goes
        is never run.
        """
        size = sum(map(size_of, args))
        if 0 < size <= SMALL:
            return function(*args)
        return await self._workers.run(size >= LARGE, function, *args)

    async def embed(self, request: EmbedRequest, call: Call | None = None) -> Embeddings:
        """Embed cells, after taking them from the caller's share.

        Raises
        ------
        RateLimitedError
            The caller has had its share.
        UnknownModelError
            No model of that name is served.
        LimitExceededError
            More cells, genes or values than allowed, or more cells than the caller's share of a minute.
        InvalidInputError
            The cells cannot be tokenized.
        OverloadedError
            The queue is full.
        InferenceError
            The forward pass failed.
        """
        call = call or Call("", "http")
        call.take(len(request.cells))
        return await self.embed_cells(request.model, request.cells, call, request.outputs)

    async def embed_cells(
        self, name: str | None, cells: CountMatrix, call: Call, outputs: Sequence[str] | None = None
    ) -> Embeddings:
        """Embed cells, which are counted already, with the model of that name. Raises as :meth:`embed`."""
        with self.registry.lease(name) as model:
            call.model = model.embedder
            specs = self.wanted(model, outputs)
            limits.check_shape(self.settings, len(cells), cells.n_genes, int(cells.counts.nnz))
            cost = int(model.embedder.limits.costs_of(model.embedder.family.bound(cells)).sum())
            model.dispatcher.require_room(len(cells), cost, call.caller.name, call.deadline)
            call.reserve(reserved_bytes(model.embedder, cells, specs, call))
            with call.stage("tokenize"):
                tokens, seconds = await self.tokenize(model.embedder, cells)
            values, timings = await self.infer_tokens(model, tokens, call, outputs)
            return model.embedder.describe(tokens, values, {"tokenize": seconds, **timings})

    def wanted(self, model: ServedModel, outputs: Sequence[str] | None) -> tuple[OutputSpec, ...]:
        """Return the outputs of a model that a caller names; the cell embedding is always among them.

        Raises
        ------
        InvalidParameterError
            The model has no output of a name; the message says which models of this server have it.
        """
        try:
            return selected(model.embedder.outputs, outputs)
        except InvalidParameterError as error:
            known = {spec.name for spec in model.embedder.outputs}
            missing = next(name for name in outputs or () if name not in known)
            able = [info.name for info in self.registry.infos() if missing in {spec.name for spec in info.outputs}]
            remedy = f"Name one of the models that have it: {', '.join(able)}." if able else "No model here has it."
            raise InvalidParameterError(f"{error.message} {remedy}", field=error.field) from error

    async def tokenize(self, embedder: Embedder, cells: CountMatrix) -> tuple[TokenizedCells, float]:
        """Tokenize cells, a thousand at a time; also return the seconds. Raises as :meth:`Embedder.tokenize`."""
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
        self,
        model: ServedModel,
        tokens: TokenizedCells,
        call: Call | None = None,
        outputs: Sequence[str] | None = None,
    ) -> tuple[Outputs, dict[str, float]]:
        """Return outputs of tokenized cells, and seconds by stage. Raises as :meth:`Dispatcher.submit`."""
        call = call or Call("", "http")
        call.model, call.model_id = model.embedder, model.info.model_id
        call.tokens += int(tokens.offsets[-1])
        turn = None if call.trace is None else call.trace.turn()

        def progress(n_done: int) -> None:
            call.at = "inference", n_done / len(tokens)

        with call.stage("queue", turn) as stage:
            values, timings = await model.dispatcher.submit(
                tokens, outputs=outputs, flow=call.caller.name, deadline=call.deadline, tag=turn, progress=progress
            )
            stage.ended_with("inference", timings["inference"])
        return values, timings

    async def ready(self) -> bool:
        """Tell whether models and scores answer. A model that failed last is tried with one cell: it can recover."""
        if self.leaving or self.scores.stuck_seconds > STUCK:
            return False
        return await self.registry.ready()

    @property
    def leaving(self) -> bool:
        """Whether the server stops, now or after its drain delay, so that nothing shall be sent to it any more."""
        return self.admission.closed or self.admission.leaving

    def leave(self) -> None:
        """Be not ready from now on, and still admit requests: balancers shall send theirs elsewhere."""
        self.admission.leaving = True

    def begin_close(self) -> None:
        """Refuse requests from now on, and be not ready. May be called twice."""
        if self._close_by is None:
            self._close_by = time.monotonic() + self.settings.shutdown_grace
        self.leave()
        self.admission.closed = True

    async def close(self) -> None:
        """Finish accepted requests, within ``shutdown_grace`` seconds of the first sign; then stop all threads.

        Requests that are not done by then are ended, and their callers are told so.
        """
        self.begin_close()
        assert self._close_by is not None  # noqa: S101  begin_close sets it
        if not await self.admission.drained(self._close_by - time.monotonic()):
            self.front.stop()
            await self.admission.drained(limits.LAST_WORDS)
        await self.registry.close()
        self._workers.close()
        self.scores.close()


def reserved_bytes(embedder: Embedder, cells: CountMatrix, outputs: Sequence[OutputSpec], call: Call) -> int:
    """Estimate the bytes that tokens, outputs and encoded answer of cells will take."""
    rows = {"cell": len(cells), "token": int(embedder.family.bound(cells).sum())}
    return 4 * rows["token"] + 4 * sum(rows[spec.per] * spec.width for spec in outputs) * (1 + call.growth)


def _tokenize(embedder: Embedder, cells: CountMatrix, start: int) -> tuple[TokenizedCells, float]:
    started = time.perf_counter()
    part = cells if len(cells) <= TOKENIZED else cells[start : start + TOKENIZED]
    return embedder.tokenize(part), time.perf_counter() - started


def kept_bytes(value: Any) -> int:
    """Estimate the bytes of memory that a decoded request keeps: its arrays, and its labels one by one."""
    if isinstance(value, CountMatrix):
        counts = value.counts
        arrays = (counts.data, counts.indices, counts.indptr, value.totals, value.gene_ids)
        return sum(int(array.nbytes) for array in arrays)
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, tuple):
        return _ITEM * len(value)
    return sum(map(kept_bytes, vars(value).values())) if is_dataclass(value) and hasattr(value, "__dict__") else 0


_ITEM = 80
"""Bytes of a label or a pair in a tuple."""


def size_of(value: Any) -> int:
    """Estimate the bytes of a body, a message or an answer; 0 for what is small anyway."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return len(value)
    if callable(size := getattr(value, "ByteSize", None)):  # a message of protobuf
        return int(size())
    for name in ("cells", "score", "counts", "values", "embeddings", "data"):
        inner = getattr(value, name, None)
        if inner is not None:
            nbytes = getattr(inner, "nbytes", None)
            others = getattr(value, "outputs", None)
            more = sum(other.values.nbytes for other in others.values()) if isinstance(others, Mapping) else 0
            return more + (int(nbytes) if isinstance(nbytes, int) else size_of(inner))
    return 0

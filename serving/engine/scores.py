"""Scores, comparisons and result pages, for both transports: their turns on threads, and their limits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import DeadlineExceededError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.fields import Meta
from perturbscope.protocol.messages import CompareAnswer, CompareRequest, ScoreAnswer, ScoreRequest
from perturbscope.report import Absent
from perturbscope.scoring.cleaning import Cleaned, cleaned_for
from perturbscope.scoring.cost import Cost, compare_cost, report_cost, score_cost
from perturbscope.tasks.requests import warned
from perturbscope.tasks.trained_on import Fingerprint, Seen, find_seen
from perturbscope.threads import interruptible
from serving.access import limits
from serving.call import Call
from serving.engine.reports import ReportAnswer, ReportRequest, make_report
from serving.engine.threads import GoneError, Job, Turns
from serving.models.registry import ModelRegistry
from serving.settings import Settings

Scored = TypeVar("Scored")
STUCK = 60.0
"""Seconds after which a score that has reached no step holds up all others for too long: the server is not ready."""
_LAST_STEP = 1.0
"""Seconds for which a request that is cancelled waits for its score to end; nearly all end within a tenth of one."""


@dataclass(frozen=True)
class _Begun:
    """A request whose labels are clean and whose cells have vectors.

    Attributes
    ----------
    request, call
        The request with its cleaned labels, and its call.
    embeddings, meta, warnings
        Vectors of its cells, the model behind them, and what is doubtful about them.
    facts
        What was done to the labels.
    """

    request: Any
    call: Call
    embeddings: NDArray[np.float32]
    meta: Meta
    warnings: list[str]
    facts: dict[str, Any]

    def complete(self, result: Any) -> Any:
        """Add warnings and facts to a result."""
        warnings = list(dict.fromkeys([*self.warnings, *result.warnings]))
        return replace(result, warnings=warnings, provenance={**result.provenance, **self.facts})


class Scores:
    """Scores and compares cells, embedding them first if the caller brings counts.

    Parameters
    ----------
    settings
        Limits of requests.
    registry
        The models that are served.
    embed
        Embeds cells, as :meth:`Engine.embed_cells`.
    work
        Runs what would block, as :meth:`Engine.work`.
    """

    def __init__(
        self,
        settings: Settings,
        registry: ModelRegistry,
        embed: Callable[[str | None, CountMatrix, Call], Awaitable[Embeddings]],
        work: Callable[..., Awaitable[Any]],
    ) -> None:
        self._settings, self._registry, self._embed, self._work = settings, registry, embed, work
        self.n_jobs = 0
        """Score requests that are computed, or wait for their turn."""
        # A thread for each score that may be in progress; no more than score_workers of them compute.
        self._threads = ThreadPoolExecutor(settings.max_requests, thread_name_prefix="perturbscope-score")
        self._turns = Turns(settings.score_workers)

    async def score(self, request: ScoreRequest, call: Call | None = None) -> ScoreAnswer:
        """Score every perturbation against the controls. Raises as :meth:`Engine.embed` and `score_perturbations`."""
        from perturbscope.scoring.control import score_perturbations

        begun = await self._begin(request, call)
        request = begun.request
        score = partial(
            score_perturbations,
            begun.embeddings,
            request.perturbations,
            control=request.control,
            batches=request.batches,
            options=request.options,
        )
        result, seconds = await self._scored(score, begun.call)
        return ScoreAnswer(result=begun.complete(result), meta=_timed(begun.meta, seconds))

    async def compare(self, request: CompareRequest, call: Call | None = None) -> CompareAnswer:
        """Compare perturbations with each other. Raises as :meth:`Engine.embed` and `compare_perturbations`."""
        from perturbscope.scoring.pairs import compare_perturbations

        begun = await self._begin(request, call)
        request = begun.request
        compare = partial(
            compare_perturbations,
            begun.embeddings,
            request.perturbations,
            pairs=request.pairs,
            control=request.control,
            batches=request.batches,
            options=request.options,
        )
        result, seconds = await self._scored(compare, begun.call)
        return CompareAnswer(result=begun.complete(result), meta=_timed(begun.meta, seconds))

    async def report(self, request: ReportRequest, call: Call | None = None) -> ReportAnswer:
        """Make the result page of a score. Raises as :meth:`score`."""
        begun = await self._begin(request, call)
        make = partial(make_report, begun.request, begun.embeddings, begun.meta, begun.complete)
        report, seconds = await self._scored(make, begun.call)
        return ReportAnswer(report=report, meta=_timed(begun.meta, seconds))

    async def computed(self, compute: Callable[[], Scored], cost: Callable[[], Cost], call: Call) -> Scored:
        """Compute something else that costs as much as a score, in turn with the scores.

        Parameters
        ----------
        compute
            The computation, which calls :func:`perturbscope.threads.checkpoint`.
        cost
            Estimates what it takes.
        call
            The call that asks for it.

        Raises
        ------
        LimitExceededError
            It would take too long.
        DeadlineExceededError
            The time that the caller allowed is over.
        """
        found = await self._work(cost)
        limits.check_cost(self._settings, found)
        call.take_work(found.seconds)
        call.reserve(found.n_bytes, "Ask for fewer perturbations at a time.")
        answer, _ = await self._scored(lambda progress: compute(), call)
        return answer

    def seen(self, request: Any, file: Fingerprint | None, call: Call | None = None) -> Seen | None:
        """Return which cells of an uploaded file the answering model was trained on; None without a file."""
        if file is None:
            return None
        if call is not None and call.model is not None:
            return find_seen(call.model.training, file)
        asked = _asked(request)
        with self._registry.lease(asked.model) as model:
            return find_seen(model.embedder.training, file)

    @property
    def abandoned(self) -> int:
        """Number of scores that compute although nobody waits for them any more."""
        return self._turns.abandoned

    @property
    def stuck_seconds(self) -> float:
        """Seconds since one of the scores that compute has reached a step, the most of all; a tenth is usual."""
        return self._turns.held()

    def close(self) -> None:
        """Begin no more scores."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, request: ScoreRequest | CompareRequest | ReportRequest, call: Call | None) -> _Begun:
        """Count and check a request, clean its labels, embed its cells, and hold the memory of its score.

        What would take too long is refused before its cells are embedded. The memory is held before the score begins:
        scores that wait for their turn keep what they have computed.
        """
        call = call or Call("", "http")
        call.take(len(_asked(request).perturbations))
        # Without arguments it is done on a thread: the number of labels or pairs, say, is not in the size of a request.
        request, cleaned = await self._work(partial(_cleaned, request))
        asked = _asked(request)
        limits.check_options(self._settings, asked.options)
        if asked.embeddings is not None:
            limits.check_vectors(self._settings, len(asked.embeddings))
        cost = await self._work(partial(_cost, request, self._width(asked), self._settings))
        limits.check_cost(self._settings, cost)
        call.take_work(cost.seconds)
        embeddings, meta, warnings = await self._embeddings(asked, call)
        call.reserve(cost.n_bytes, "Ask for smaller groups (max_cells), or compare fewer perturbations at a time.")
        return _Begun(request, call, embeddings, meta, [*warnings, *cleaned.warnings], cleaned.facts)

    def _width(self, request: ScoreRequest | CompareRequest) -> int:
        """Return the dimensions of the vectors to be scored."""
        if request.embeddings is not None:
            return int(request.embeddings.shape[1])
        with self._registry.lease(request.model) as model:
            return model.embedder.width

    async def _embeddings(
        self, request: ScoreRequest | CompareRequest, call: Call
    ) -> tuple[NDArray[np.float32], Meta, list[str]]:
        """Return the vectors to be scored: the caller's own, or those of the cells."""
        if request.cells is None:
            return cast("NDArray[np.float32]", request.embeddings), Meta(), []
        # A missing control label should not cost the embedding of all cells.
        await self._work(_check_labels, request)
        embedded = await self._embed(request.model, request.cells, call)
        meta = Meta(
            model_id=embedded.model_id,
            vocabulary_hash=embedded.vocabulary_hash,
            coverage=embedded.coverage,
            timings=embedded.timings,
            variant=embedded.variant,
        )
        return embedded.values, meta, embedded.warnings()

    async def _scored(self, score: Callable[..., Scored], call: Call) -> tuple[Scored, float]:
        """Score on a thread of its own, when it is its turn. It ends at its next step when the caller goes."""
        job = self._turns.new(call.deadline)
        self.n_jobs += 1
        try:
            running = asyncio.get_running_loop().run_in_executor(self._threads, _in_turn, self._turns, job, call, score)
            with call.stage("score_queue") as stage:
                scored, seconds = await asyncio.shield(running)
                stage.ended_with("score", seconds)
        except asyncio.CancelledError:
            self._turns.cancel(job)
            # What the request holds is given back when this returns: its thread should have ended by then.
            await asyncio.wait([running], timeout=_LAST_STEP)
            raise
        except GoneError as error:  # the score has looked at the clock before the event loop did
            raise DeadlineExceededError(
                "The time that the caller allowed is over. Allow more, or ask for fewer permutations."
            ) from error
        finally:
            self.n_jobs -= 1
        return scored, seconds


def annotated(answer: Any, warnings: list[str], seen: Seen | None) -> Any:
    """Return the answer to an uploaded file with its warnings, first that the model was trained on the cells."""
    if isinstance(answer, ReportAnswer):
        scores = answer.report.scores
        scores = replace(scores, warnings=scores.warnings + warnings)
        return replace(answer, report=replace(answer.report, scores=seen.add_to(scores) if seen else scores))
    if isinstance(answer, ScoreAnswer | CompareAnswer):
        result: Any = replace(answer.result, warnings=answer.result.warnings + warnings)
        return replace(answer, result=seen.add_to(result) if seen else result)
    if isinstance(answer, Embeddings):
        return replace(answer, notes=(*answer.notes, *warnings))
    return warned(answer, [*([seen.warning()] if seen else []), *warnings])


def read_from_file(answer: Any, left_out: Mapping[str, int], *, round_counts: bool) -> Any:
    """Return the answer to an uploaded file with what became of its features and counts: coverage, provenance."""
    if isinstance(answer, Embeddings):
        return replace(answer, coverage=replace(answer.coverage, left_out=left_out))
    meta = getattr(answer, "meta", None)
    if left_out and isinstance(meta, Meta) and meta.coverage is not None:
        answer = replace(answer, meta=replace(meta, coverage=replace(meta.coverage, left_out=left_out)))
    if round_counts and isinstance(answer, ScoreAnswer | CompareAnswer):
        result: Any = answer.result
        return replace(answer, result=replace(result, provenance={**result.provenance, "round_counts": True}))
    if round_counts and isinstance(answer, ReportAnswer):
        scores = answer.report.scores
        scores = replace(scores, provenance={**scores.provenance, "round_counts": True})
        return replace(answer, report=replace(answer.report, scores=scores))
    return answer


def _in_turn(turns: Turns, job: Job, call: Call, score: Callable[..., Scored]) -> tuple[Scored, float]:
    def progress(stage: str, done: int, total: int) -> None:
        call.at = stage, done / max(total, 1)
        job.step()

    with turns.turn(job, call.caller.name), interruptible(job.step):
        return score(progress=progress), job.computed()


def _cost(request: ScoreRequest | CompareRequest | ReportRequest, width: int, settings: Settings) -> Cost:
    """Estimate the cost of a request.

    Raises
    ------
    LimitExceededError
        A comparison has too many pairs, or a score too many perturbations.
    """
    asked = _asked(request)
    control = None if asked.control is None else str(asked.control)
    sizes = Counter(asked.perturbations)
    batches = 0 if asked.batches is None else len(set(asked.batches))
    if isinstance(asked, CompareRequest):
        others = len(sizes) - (control in sizes)
        limits.check_pairs(settings, others * (others - 1) // 2 if asked.pairs is None else len(asked.pairs))
        return compare_cost(sizes, control, asked.options, width=width, pairs=asked.pairs, batches=batches)
    if not isinstance(request, ReportRequest):
        return score_cost(sizes, str(control), asked.options, width=width, batches=batches)
    counts = request.counts if asked.cells is None else asked.cells
    n_counts, n_genes = (0, 0) if isinstance(counts, Absent) else (int(counts.counts.nnz), counts.n_genes)
    return report_cost(
        sizes, str(control), asked.options, width=width, batches=batches, n_counts=n_counts, n_genes=n_genes
    )


def _check_labels(request: ScoreRequest | CompareRequest) -> None:
    """Make the checks of labels that scoring makes, on vectors of ones."""
    from perturbscope.scoring.labels import Groups

    ones = np.ones((len(request.perturbations), 1))
    control = None if request.control is None else str(request.control)
    groups = Groups.of(ones, request.perturbations, request.batches, request.options, control=control)
    groups.scorable([name for name in groups.sizes if name != control], request.options)


def _asked(request: Any) -> Any:
    """Return the request to score or compare within a request."""
    return request.score if isinstance(request, ReportRequest) else request


def _cleaned(request: Any) -> tuple[Any, Cleaned]:
    """Return a request with clean labels, and what was done.

    Raises
    ------
    ControlLabelMissingError
        No cell has one of several control labels.
    """
    asked = _asked(request)
    cleaned = cleaned_for(asked.options, asked.perturbations, asked.control, asked.batches)
    if not cleaned.facts:
        return request, cleaned
    values: dict[str, Any] = {"perturbations": tuple(cleaned.labels), "control": cleaned.control}
    values |= {name: cleaned.kept(getattr(asked, name)) for name in ("cells", "embeddings", "batches")}
    if isinstance(asked, CompareRequest) and asked.pairs is not None:
        values["pairs"] = tuple(cleaned.pairs(asked.pairs) or ())
    asked = replace(asked, **values)
    if not isinstance(request, ReportRequest):
        return asked, cleaned
    counts = request.counts if isinstance(request.counts, Absent) else cleaned.kept(request.counts)
    return replace(request, score=asked, counts=counts), cleaned


def _timed(meta: Meta, seconds: float) -> Meta:
    return replace(meta, timings={**meta.timings, "score": seconds})

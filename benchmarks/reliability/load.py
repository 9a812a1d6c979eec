"""Load of mixed sizes over every interface, and small requests beside a bulk job."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.reliability.inputs import Asker, embedder, is_right, labels, real_cells, right_vectors
from benchmarks.reliability.trial import MIB, Trial, fault
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import AsyncClient, AsyncGrpcClient
from perturbscope.errors import PerturbScopeError
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.results import ScoreOptions
from tests.integration.server import RunningServer, Usage

POOL = 3000
"""Number of cells of the Papalexi screen from which requests are drawn."""
OPTIONS = ScoreOptions(permutations=199, repeats=2)
SAMPLE_SECONDS = 5.0
BULK_CELLS = 100_000


@dataclass
class Kind:
    """One kind of request: how many callers ask so, and how long each rests between two requests."""

    name: str
    callers: int
    rest: float
    ask: Callable[[np.random.Generator], Awaitable[bool]]
    seconds: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)


@fault("load", "Load held: mixed sizes over every interface")
async def load(trial: Trial) -> None:
    """Callers of eleven kinds, each asking again as soon as it has rested: single cells, 64 cells and 2,000 cells;
    embedding, streaming and scoring; HTTP with JSON, Arrow and .h5ad bodies, and gRPC. Cells are drawn at random from
    the Papalexi screen and pbmc3k of data/; the default model. Every answer is compared with what the library gives
    offline. One thread of the model; the clients have the other core."""
    with trial.service(max_body_bytes=64 * MIB) as server:
        async with Asker(server) as asker:
            kinds = _kinds(server, asker)
            await _warm(kinds)
            samples: list[tuple[float, Usage]] = []
            end = time.monotonic() + 60 * (min(trial.plan.minutes, 0.5) if trial.plan.quick else trial.plan.minutes)
            wrong: list[str] = []
            watch = asyncio.ensure_future(_watch(server, samples, end))
            callers = [
                _call(trial, kind, np.random.default_rng([at, n]), end, wrong)
                for at, kind in enumerate(kinds)
                for n in range(kind.callers)
            ]
            started = time.monotonic()
            await asyncio.gather(*callers)
            took = time.monotonic() - started
            await watch
        _tell(trial, kinds, samples, took, wrong)
        trial.check("the service is alive and ready at the end", server.answers("/livez") and server.answers("/readyz"))


def _kinds(server: RunningServer, asker: Asker) -> list[Kind]:
    papalexi, vectors = real_cells("papalexi", POOL), right_vectors("papalexi", POOL)
    pbmc, pbmc_vectors = real_cells("pbmc3k", 64), right_vectors("pbmc3k", 64)
    names = np.array(labels("papalexi", POOL))

    def embed(way: str, n: int, source: CountMatrix = papalexi, expected: Any = vectors) -> Any:
        async def ask(rng: np.random.Generator) -> bool:
            rows = rng.choice(len(source), n, replace=False)
            return is_right(await asker.ways[way](source[rows]), expected[rows])

        return ask

    def stream(client: Any) -> Any:
        async def ask(rng: np.random.Generator) -> bool:
            at = int(rng.integers(0, POOL - 1000))
            chunks = [papalexi[start : start + 250] for start in range(at, at + 1000, 250)]
            found = [part.values async for part in client.embed_stream(chunks)]
            return is_right(np.concatenate(found), vectors[at : at + 1000])

        return ask

    def score(client: AsyncClient | AsyncGrpcClient, with_cells: bool) -> Any:
        chosen = np.flatnonzero(np.isin(names, ("control", "STAT1", "BRD4")))[:600]
        given = names[chosen].tolist()
        expected = score_perturbations(vectors[chosen], given, control="control", options=OPTIONS).table

        async def ask(_: np.random.Generator) -> bool:
            if with_cells:
                answer = await client.score_cells(papalexi[chosen], given, control="control", options=OPTIONS)
                table = answer.result.table
            else:
                table = (await client.score(vectors[chosen], given, control="control", options=OPTIONS)).table
            return bool(np.allclose(table["distance"], expected["distance"], atol=1e-4))

        return ask

    return [
        Kind("1 cell, HTTP JSON", 2, 0.2, embed("HTTP JSON", 1)),
        Kind("1 cell, gRPC", 2, 0.2, embed("gRPC", 1)),
        Kind("64 cells, HTTP Arrow", 1, 1.0, embed("HTTP Arrow", 64)),
        Kind("64 cells, gRPC", 1, 1.0, embed("gRPC", 64)),
        Kind("16 cells of pbmc3k, .h5ad", 1, 4.0, embed("HTTP h5ad", 16, pbmc, pbmc_vectors)),
        Kind("16 cells of pbmc3k, form", 1, 4.0, embed("HTTP form", 16, pbmc, pbmc_vectors)),
        Kind("2,000 cells, HTTP Arrow", 1, 20.0, embed("HTTP Arrow", 2000)),
        Kind("1,000 cells in a stream, gRPC", 1, 15.0, stream(asker.grpc)),
        Kind("score of 600 cells, HTTP Arrow", 1, 15.0, score(asker.arrow, True)),
        Kind("score of 600 vectors, HTTP JSON", 1, 3.0, score(asker.json, False)),
        Kind("score of 600 vectors, gRPC", 1, 3.0, score(asker.grpc, False)),
    ]


async def _warm(kinds: list[Kind]) -> None:
    rng = np.random.default_rng(0)
    for kind in kinds:
        if not await kind.ask(rng):
            raise AssertionError(f"{kind.name}: wrong before the load")


async def _call(trial: Trial, kind: Kind, rng: np.random.Generator, end: float, wrong: list[str]) -> None:
    await asyncio.sleep(float(rng.uniform(0, kind.rest)))
    while time.monotonic() < end:
        started = time.monotonic()
        code, right = await trial.outcome(kind.ask(rng))
        kind.codes[code] += 1
        if code == "ok":
            kind.seconds.append(time.monotonic() - started)
            if not right:
                wrong.append(kind.name)
        await asyncio.sleep(kind.rest)


async def _watch(server: RunningServer, samples: list[tuple[float, Usage]], end: float) -> None:
    started = time.monotonic()
    while time.monotonic() < end:
        samples.append((time.monotonic() - started, await asyncio.to_thread(server.usage)))
        await asyncio.sleep(SAMPLE_SECONDS)


def _tell(trial: Trial, kinds: list[Kind], samples: list[tuple[float, Usage]], took: float, wrong: list[str]) -> None:
    n = sum(trial.seen.values())
    failed = {code: count for code, count in trial.seen.items() if code not in ("ok", "overloaded")}
    refused = trial.seen["overloaded"]
    trial.check(
        f"{n:,} requests in {took / 60:.1f} minutes: error rate {sum(failed.values()) / n:.2%} ({failed or 'none'}), "
        f"{refused} refused with 429 or RESOURCE_EXHAUSTED",
        not failed,
    )
    trial.check(f"every answer has the right vectors or distances ({len(wrong)} wrong)", not wrong)
    for kind in kinds:
        if kind.seconds:
            p50, p99 = np.quantile(kind.seconds, (0.5, 0.99))
            trial.note(
                f"{kind.name}, {kind.callers} callers: {sum(kind.codes.values()):,} requests, "
                f"p50 {1000 * p50:,.0f} ms, p99 {1000 * p99:,.0f} ms"
            )
    times = np.array([at for at, _ in samples])
    rss = np.array([usage.rss for _, usage in samples]) / MIB
    late = times >= times[-1] / 3
    slope = float(np.polyfit(times[late], rss[late], 1)[0]) * 3600 if late.sum() > 2 else float("nan")
    third = max(1, len(rss) // 3)
    start, stop = float(np.median(rss[third : 2 * third])), float(np.median(rss[-third:]))
    trial.check(
        f"RSS flat: median {start:.0f} MiB in the second third, {stop:.0f} MiB in the last (at most 64 more); most "
        f"{rss.max():.0f} MiB; slope over the last two thirds {slope:+.0f} MiB an hour",
        stop - start <= 64,
    )
    for name in ("files", "threads"):
        values = np.array([getattr(usage, name) for _, usage in samples])
        first, last = int(values[: 2 * third].max()), int(values[-third:].max())
        trial.check(f"open {name} flat: at most {first} in the first two thirds, {last} in the last", last <= first + 8)
    first_usage, last_usage = samples[0][1], samples[-1][1]
    trial.row.service.append(
        f"RSS {first_usage.rss / MIB:.0f} to {last_usage.rss / MIB:.0f} MiB, files {first_usage.files} to "
        f"{last_usage.files}, threads {first_usage.threads} to {last_usage.threads}"
    )


@fault("bulk", "Small requests beside a job of 100,000 cells")
async def bulk(trial: Trial) -> None:
    """A caller embeds 100,000 cells (the Jurkat screen of data/, 7,500 cells, again and again; the default model) over
    gRPC as one stream, while another asks for one cell of pbmc3k after the other, over HTTP and gRPC in turn. The same
    small requests to the idle service before."""
    n_cells = trial.plan.times(BULK_CELLS, 5000)
    jurkat = real_cells("jurkat", 7500)
    with trial.service() as server:
        async with Asker(server) as asker:
            idle = await _small(trial, asker, 300 if not trial.plan.quick else 40, None)
            before = trial.before(server)
            job = asyncio.ensure_future(_job(asker.grpc, jurkat, n_cells))
            await asyncio.sleep(2)
            busy = await _small(trial, asker, 1_000_000, job)
            seconds, sums = await job
        repeats, rest = divmod(n_cells, len(jurkat))
        vectors = embedder().embed(jurkat).values
        expected = repeats * vectors.sum(axis=0, dtype=np.float64) + vectors[:rest].sum(axis=0, dtype=np.float64)
        trial.check(
            f"the job's {n_cells:,} vectors came, and their sum is right, in {seconds:.0f} s "
            f"({n_cells / seconds:.0f} cells/s)",
            bool(np.allclose(sums, expected, rtol=0, atol=1e-5 * n_cells)),
        )
        quiet, loud = np.quantile(idle, (0.5, 0.99)), np.quantile(busy, (0.5, 0.99))
        batch = longest_batch(server)
        bound = float(quiet[1]) + 2 * batch
        trial.note(f"idle: {len(idle)} requests, p50 {1000 * quiet[0]:.0f} ms, p99 {1000 * quiet[1]:.0f} ms")
        trial.check(
            f"beside the job: {len(busy)} requests, p50 {1000 * loud[0]:.0f} ms, p99 {1000 * loud[1]:.0f} ms, at most "
            f"{1000 * max(busy):.0f} ms; the bound is {1000 * bound:.0f} ms "
            "(p99 when idle, the batch that runs, the own; a batch took at most "
            f"{1000 * batch:.0f} ms)",
            loud[1] <= bound,
        )
        trial.all_typed()
        trial.after(server, before, rss_mib=128)


def longest_batch(server: RunningServer) -> float:
    """Return an upper bound of the seconds of a batch: the edge of the metric's bucket."""
    name = "perturbscope_batch_duration_seconds"
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
    samples = [sample for family in families if family.name == name for sample in family.samples]
    total = max(sample.value for sample in samples if sample.name.endswith("_count"))
    edges = [float(s.labels["le"]) for s in samples if s.name.endswith("_bucket") and s.value == total]
    return min(edges)


async def _small(trial: Trial, asker: Asker, most: int, beside: asyncio.Task[Any] | None) -> list[float]:
    cell, expected = real_cells("pbmc3k", 1), right_vectors("pbmc3k", 1)
    found = []
    for number in range(most):
        if beside is not None and beside.done():
            break
        started = time.monotonic()
        code, values = await trial.outcome(asker.ways[("HTTP JSON", "gRPC")[number % 2]](cell))
        found.append(time.monotonic() - started)
        if code == "ok" and not is_right(values, expected):
            raise AssertionError("wrong vectors")
        await asyncio.sleep(0.05)
    return found


async def _job(client: AsyncGrpcClient, cells: CountMatrix, n: int) -> tuple[float, Any]:
    started, sums, done = time.monotonic(), 0.0, 0

    def chunks() -> Any:
        left = n
        while left:
            part = cells[: min(left, len(cells))]
            left -= len(part)
            for start in range(0, len(part), 2000):
                yield part[start : start + 2000]

    async for part in client.embed_stream(chunks()):
        sums = sums + part.values.sum(axis=0, dtype=np.float64)
        done += len(part)
    if done != n:
        raise PerturbScopeError(f"{done} of {n} cells came")
    return time.monotonic() - started, sums

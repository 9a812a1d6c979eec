"""The page that Prometheus reads: the counters, and the state of the server at this moment."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request, Response
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from perturbscope import __version__, container
from serving.telemetry.metrics import REGISTRY

if TYPE_CHECKING:
    from serving.engine.engine import Engine
    from serving.models.loading import ServedModel


class Exposition(CollectorRegistry):
    """All metrics and states of a server, for an encoder of `prometheus_client`.

    Parameters
    ----------
    engine
        Engine of the server.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(auto_describe=False)
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield counters and histograms, then gauges."""
        yield from REGISTRY.collect()
        yield from server_states(self._engine)
        yield from model_states(self._engine)


async def metrics_page(request: Request) -> Response:
    """Answer ``GET /metrics`` in the text format of Prometheus, or in OpenMetrics on request."""
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    # On the event loop, where the states agree with each other.
    return Response(encode(Exposition(request.app.state.engine)), headers={"content-type": media_type})


def server_states(engine: Engine) -> Iterator[Metric]:
    """Yield the gauges of the whole server."""
    admission, settings = engine.admission, engine.settings
    for name, text, value in (
        ("requests_in_progress", "Requests that were let in and are not answered.", admission.in_progress),
        ("requests_in_progress_limit", "Requests above this number are refused.", settings.max_requests),
        ("held_bytes", "Bytes of requests in progress.", admission.held_bytes),
        ("held_bytes_limit", "Bytes above this number are refused.", settings.max_held_bytes),
        ("score_jobs_in_progress", "Scores that are computed or wait for their turn.", engine.scores.n_jobs),
        ("score_jobs_abandoned", "Scores that compute although their callers have gone.", engine.scores.abandoned),
        (
            "score_step_seconds",
            "Seconds since a score that computes could last be ended or halted, the most of all scores.",
            engine.scores.stuck_seconds,
        ),
        ("score_workers", "Scores that are computed at a time.", settings.score_workers),
        ("shutting_down", "1 from the signal to stop to the end, else 0.", int(engine.leaving)),
        (
            "memory_bytes",
            "Resident memory of this process, BentoML's above it, and the readers of files below.",
            memory(),
        ),
        (
            "memory_limit_bytes",
            "Memory that the process may use: the container's limit, or the machine's.",
            container.memory(),
        ),
    ):
        yield _gauge(f"perturbscope_{name}", text, [({}, value)])
    build = {"version": __version__, "python": platform.python_version(), "onnxruntime": _onnxruntime()}
    yield _gauge("perturbscope_build_info", "1, with versions as labels.", [(build, 1)])


def model_states(engine: Engine) -> Iterator[Metric]:
    """Yield the gauges of loaded models, and of bundles that should be loaded."""
    registry = engine.registry
    models = registry.models()
    for name, text, value in (
        ("models_loaded", "Models that are loaded.", len(models)),
        ("bundles_failed", "Folders whose bundle, as it is now, could not be loaded.", registry.n_failed),
        ("bundles_missing", "Bundles of the settings without which the server is not ready.", registry.n_missing),
        ("model_memory_bytes", "Memory of all models, as estimated when they were loaded.", registry.model_bytes),
        ("model_memory_limit_bytes", "What they may take; 0: no limit.", engine.settings.max_model_bytes),
    ):
        yield _gauge(f"perturbscope_{name}", text, [({}, value)])
    named = [({"model": model.info.name, "version": model.info.version}, model) for model in models]
    infos = [
        (
            {
                **labels,
                "model_id": model.info.model_id,
                "family": model.info.family,
                "variant": model.info.variant,
                "device": model.info.device,
                "provider": provider_of(model),
                "golden": model.info.golden,
            },
            1,
        )
        for labels, model in named
    ]
    yield _gauge(
        "perturbscope_model_info",
        "1 for every loaded model: the device that was asked for, the provider that runs it, its golden vectors.",
        infos,
    )
    for name, text, values in (
        (
            "model_ready",
            "1 while the model answers, 0 after a forward pass failed.",
            [(labels, int(model.verified)) for labels, model in named],
        ),
        (
            "queue_tokens",
            "Tokens that were accepted and are not answered.",
            [(labels, model.dispatcher.pending_tokens) for labels, model in named],
        ),
        (
            "queue_callers",
            "Requests with cells in the queue or in a batch.",
            [(labels, model.dispatcher.pending_callers) for labels, model in named],
        ),
        (
            "queue_tokens_limit",
            "Tokens above this number are refused.",
            [(labels, model.dispatcher.max_queued_tokens) for labels, model in named],
        ),
    ):
        yield _gauge(f"perturbscope_{name}", text, values)


def provider_of(model: ServedModel) -> str:
    """Return the ONNX Runtime provider that truly runs a model; empty if the encoder has none."""
    return str(getattr(model.embedder.encoder, "provider", ""))


def memory() -> int:
    """Sum the bytes of all processes of the service, since all count for the limit; shared pages count twice."""
    found, waiting = 0, [os.getpid()]
    if b"bentoml" in _read(f"/proc/{os.getppid()}/cmdline"):
        found += _resident(os.getppid())
    while waiting:
        process = waiting.pop()
        found += _resident(process)
        # A child is listed below the thread that made it.
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            waiting += [int(child) for child in _read(path).split()]
    return found


def _resident(process: int) -> int:
    fields = _read(f"/proc/{process}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0


def _read(path: str | Path) -> bytes:
    """Read a file of the system; empty if it does not exist, or not any more."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _gauge(name: str, text: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text)
    for labels, value in values:
        family.add_sample(name, dict(labels), value)
    return family


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)

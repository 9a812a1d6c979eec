"""Answering a request for vectors of tokens, whatever it came over."""

from __future__ import annotations

import time
from collections.abc import Callable

from perturbscope.errors import PerturbScopeError
from perturbscope.families.tokens import TokenizedCells
from serving.call import Call
from serving.engine.engine import Engine
from serving.models.loading import ServedModel
from serving.openinference.tensors import InferAnswer, InferRequest, tokens_of


async def infer(engine: Engine, name: str, version: str, read: Callable[[], InferRequest], call: Call) -> InferAnswer:
    """Vectors of the cells that `read` brings; it is called on a worker thread.

    Raises
    ------
    UnknownModelError
        No model of that name and version is served.
    InvalidInputError, LimitExceededError
        As :func:`serving.openinference.tensors.tokens_of`, and as `read`.
    OverloadedError, DeadlineExceededError, InferenceError
        As :meth:`Engine.infer_tokens`.
    """
    started = time.perf_counter()
    with engine.registry.lease(name, version or None) as model:
        try:
            with call.stage("decode"):
                request, tokens = await engine.work(_read, read, model, engine)
            call.take(len(tokens))
            values, timings = await engine.infer_tokens(model, tokens, call)
        except PerturbScopeError:
            engine.token_statistics.failed(model.info, time.perf_counter() - started)
            raise
        engine.token_statistics.succeeded(model.info, len(tokens), time.perf_counter() - started, timings)
        return InferAnswer(
            name=model.info.name,
            version=model.info.version,
            id=request.id,
            values=values,
            wants_bytes=request.wants_bytes,
        )


def _read(read: Callable[[], InferRequest], model: ServedModel, engine: Engine) -> tuple[InferRequest, TokenizedCells]:
    request = read()
    return request, tokens_of(request, model.embedder.family, engine.settings)

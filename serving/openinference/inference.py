"""Vectors of tokens: the one operation of the protocol, over either transport."""

from __future__ import annotations

import time
from collections.abc import Callable

from perturbscope.errors import PerturbScopeError
from perturbscope.families.tokens import TokenizedCells
from serving.call import Call
from serving.engine.engine import Engine
from serving.models.loading import ServedModel
from serving.openinference.statistics import Statistics
from serving.openinference.tensors import InferAnswer, InferRequest, tokens_of


class TokenEngine:
    """Embeds tokens for both transports of the protocol, and counts such requests.

    Parameters
    ----------
    engine
        The engine whose models, queue and threads are used.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.statistics = Statistics()

    async def infer(self, name: str, version: str, read: Callable[[], InferRequest], call: Call) -> InferAnswer:
        """Return the vectors of the cells that `read` returns; it is called on a worker thread.

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
        with self.engine.registry.lease(name, version or None) as model:
            try:
                with call.stage("decode"):
                    request, tokens = await self.engine.work(_read, read, model, self.engine)
                call.take(len(tokens))
                values, timings = await self.engine.infer_tokens(model, tokens, call)
            except PerturbScopeError:
                self.statistics.failed(model.info, time.perf_counter() - started)
                raise
            self.statistics.succeeded(model.info, len(tokens), time.perf_counter() - started, timings)
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

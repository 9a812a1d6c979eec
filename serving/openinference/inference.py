"""Vectors of tokens: the one operation of the protocol, over either transport."""

from __future__ import annotations

import time
from collections.abc import Callable

from perturbscope.errors import PerturbScopeError
from perturbscope.families.outputs import OutputSpec
from perturbscope.families.tokens import TokenizedCells
from serving.call import Call
from serving.engine.engine import Engine
from serving.models.loading import ServedModel
from serving.openinference.statistics import Statistics
from serving.openinference.tensors import InferAnswer, InferOutput, InferRequest, padded, tokens_of


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
        """Return outputs for the cells that `read` returns; it is called on a worker thread.

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
                outputs = request.wanted(model.embedder.outputs)
                call.reserve(_answer_bytes(request, outputs))
                names = [spec.name for spec in outputs]
                values, timings = await self.engine.infer_tokens(model, tokens, call, names)
            except PerturbScopeError:
                self.statistics.failed(model.info, time.perf_counter() - started)
                raise
            self.statistics.succeeded(model.info, len(tokens), time.perf_counter() - started, timings)
            return InferAnswer(
                name=model.info.name,
                version=model.info.version,
                id=request.id,
                outputs=[
                    InferOutput(spec.name, padded(values, spec, request.length), request.wants_bytes(spec.name))
                    for spec in outputs
                ],
            )


def _answer_bytes(request: InferRequest, outputs: tuple[OutputSpec, ...]) -> int:
    """Estimate the bytes of outputs per token, with padding, and of their copies; vectors of cells are small."""
    return 3 * 4 * sum(request.n_slots * spec.width for spec in outputs if spec.per == "token")


def _read(read: Callable[[], InferRequest], model: ServedModel, engine: Engine) -> tuple[InferRequest, TokenizedCells]:
    request = read()
    return request, tokens_of(request, model.embedder.family, engine.settings)

"""The shutdown begins with the signal."""

from __future__ import annotations

import asyncio
import signal
import threading

from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from serving.access.front import Front
from serving.engine.engine import Engine
from serving.engine.shutdown import Stopping
from tests.fakes import FakeEncoder


class Recorder:
    """A server that notes when it is stopped, and a signal handler that notes when it is called."""

    def __init__(self) -> None:
        self.stopped = 0
        self.signals: list[int] = []

    async def stop(self) -> None:
        self.stopped += 1

    def handle(self, number: int, frame: object) -> None:
        self.signals.append(number)


async def test_the_signal_refuses_what_is_new_at_once_and_finishes_the_rest(
    engine: Engine, tiny_cells: CountMatrix, fake_embedder: Embedder
) -> None:
    assert isinstance(fake_embedder.encoder, FakeEncoder)
    gate = fake_embedder.encoder.gate = threading.Event()
    recorder, call = Recorder(), Front.begin("/v1/embed", "http", {})

    async def ask() -> int:
        async with engine.front.admitted(call):
            return len(await engine.embed(EmbedRequest(cells=tiny_cells), call))

    accepted = asyncio.ensure_future(ask())
    async with asyncio.timeout(60):
        while not fake_embedder.encoder.batches:
            await asyncio.sleep(0.001)
    before = {number: signal.signal(number, recorder.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stopping = Stopping(engine, recorder)
        stopping.listen()
        signal.raise_signal(signal.SIGTERM)
        assert recorder.signals == [signal.SIGTERM]
        async with asyncio.timeout(60):
            while not engine.admission.closed:
                await asyncio.sleep(0.001)
        assert not await engine.ready()
        assert not accepted.done()
        gate.set()
        await stopping.begin()
        assert await accepted == 24
        assert recorder.stopped == 1
        assert stopping.begin().done()
        stopping.forget()
        assert signal.getsignal(signal.SIGTERM) == recorder.handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

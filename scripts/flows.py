"""The files of the project that run in four flows: an HTTP embed, ``perturbscope score``, a training step, an export.

``python scripts/flows.py [embed score ...]`` runs each flow twice in this process and lists the files of which
a function was called the second time; what is imported or made once does not count. Threads are followed, other
processes are not. ``tests/architecture/test_flows.py`` holds the first two to their length.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
OURS = ("perturbscope", "serving", "training", "export", "evaluation")
BUNDLE = ROOT / "bundles" / "default"
SCREEN = ROOT / "data" / "datlinger_jurkat_cropseq.h5ad"
LABELS = ("--perturbation-key", "perturbation", "--control", "control", "--permutations", "9", "--top", "0")


class Recorder:
    """A profiler that notes the files of called functions, in all threads that begin after it."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.on = False
        self._of: dict[str, str] = {}

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if not self.on or event != "call" or frame.f_code.co_name == "<module>":
            return
        name = frame.f_code.co_filename
        found = self._of.get(name)
        if found is None:
            path = Path(name)
            found = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
            found = self._of[name] = found if found.startswith(OURS) and "_pb2" not in found else ""
        if found:
            self.files.add(found)

    def second(self, flow: Callable[[], object]) -> list[str]:
        """Run a flow twice and return the files of the second time."""
        flow()
        self.on = True
        try:
            flow()
        finally:
            self.on = False
        return sorted(self.files)


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        yield recorder
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  None ends it


def embed(bundle: Path = BUNDLE) -> list[str]:
    """From the socket of an HTTP server to the vector of a cell; what then encodes the answer does not count."""
    import uvicorn

    from serving.engine.engine import Engine
    from serving.http import gate
    from serving.http.app import build_app
    from serving.http.gate import Gate
    from serving.http.sites import Sites
    from serving.settings import Settings

    body = {"cells": {"gene_ids": ["STAT1", "JAK2"], "indptr": [0, 2], "indices": [0, 1], "data": [3, 1]}}
    ready: list[int] = []
    began, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        engine = Engine.load(Settings(bundle=str(bundle), threads=1))
        app: Any = build_app()
        app.state.engine = engine
        # As serving.service puts it around the application.
        app.add_middleware(Gate, front=lambda: engine.front, sites=Sites(engine.settings))
        gate.install(Settings(head_timeout=10))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]  the main thread's
        running = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.append(server.servers[0].sockets[0].getsockname()[1])
        began.set()
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await running
        await engine.close()

    def ask() -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{ready[0]}/v1/embed", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["embeddings"]

    whole = Engine.embed_cells

    async def until_the_vector(*given: Any) -> Any:
        try:
            return await whole(*given)
        finally:
            recorder.on = False

    with recording() as recorder, mock.patch.object(Engine, "embed_cells", until_the_vector):
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            if not began.wait(60):
                raise RuntimeError("The server did not start within a minute.")
            return recorder.second(ask)
        finally:
            stop.set()
            thread.join()


def score(screen: Path = SCREEN) -> list[str]:
    """``perturbscope score --use-rep`` of vectors that are in the file."""
    import anndata
    import numpy as np

    from perturbscope.cli.app import run

    with tempfile.TemporaryDirectory() as folder, recording() as recorder:
        cells = anndata.read_h5ad(screen)
        cells.obsm["X_any"] = np.random.default_rng(0).standard_normal((len(cells), 8)).astype(np.float32)
        cells.write_h5ad(f"{folder}/embedded.h5ad")
        return recorder.second(lambda: _run(run, f"{folder}/embedded.h5ad", folder, "--use-rep", "X_any"))


def embed_and_score(bundle: Path = BUNDLE, screen: Path = SCREEN) -> list[str]:
    """``perturbscope score --bundle`` of the cells of a file."""
    from perturbscope.cli.app import run

    with tempfile.TemporaryDirectory() as folder, recording() as recorder:
        return recorder.second(lambda: _run(run, str(screen), folder, "--bundle", str(bundle)))


def _run(run: Callable[[list[str]], int], cells: str, folder: str, *options: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = run(["score", cells, f"{folder}/scores.parquet", *LABELS, *options])
    if code:
        raise RuntimeError(f"perturbscope score ended with {code}.")


def train() -> list[str]:
    """One step of pre-training: the next batch is made while the loss of this one is computed."""
    from training.loop import loop

    with tempfile.TemporaryDirectory() as folder, recording() as recorder:
        step = loop._Run._step

        def noted(*given: Any) -> dict[str, Any]:
            recorder.on = True
            try:
                return step(*given)
            finally:
                recorder.on = False

        loop._Run._step = noted  # type: ignore[method-assign, assignment]
        try:
            _pretrained(Path(folder))
        finally:
            loop._Run._step = step  # type: ignore[method-assign]
        return sorted(recorder.files)


def export() -> list[str]:
    """From a checkpoint to a bundle that is checked against torch."""
    from export.pipeline import export_checkpoint

    with tempfile.TemporaryDirectory() as folder, recording() as recorder:
        checkpoint = _pretrained(Path(folder))
        bundle = Path(folder) / "bundle"
        return recorder.second(lambda: export_checkpoint(checkpoint, bundle, name="flow", version="1", overwrite=True))


def _pretrained(folder: Path) -> Path:
    """Train a checkpoint for four steps on a small data set."""
    from tests.training_data import pretrain_values
    from training.commands.pretrain import pretrain
    from training.config.stages import PretrainConfig
    from training.config.strict import parse

    checkpoint = pretrain(parse(PretrainConfig, pretrain_values(folder, max_steps=4)))
    assert checkpoint is not None
    return checkpoint


FLOWS: dict[str, Callable[[], list[str]]] = {
    "embed": embed,
    "score": score,
    "embed-and-score": embed_and_score,
    "train": train,
    "export": export,
}


def main() -> int:
    sys.path.insert(0, str(ROOT))
    for name in sys.argv[1:] or FLOWS:
        files = FLOWS[name]()
        print(f"{name}: {len(files)} files", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

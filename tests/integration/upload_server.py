"""``python -m tests.integration.upload_server PORT``: the HTTP routes over a fake model, without BentoML."""

from __future__ import annotations

import sys

import uvicorn

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import load_family
from perturbscope.inference.embedder import Embedder
from serving.engine.engine import Engine
from serving.http.app import build_app
from serving.models.registry import ModelRegistry
from serving.settings import Settings
from tests.bundles import TINY_WIDTH
from tests.fakes import FakeEncoder
from tests.unit.serving.conftest import served


def main(port: int) -> None:
    vocabulary = GeneVocabulary.geneformer_gc30m()
    embedder = Embedder(
        load_family("rank", {}, vocabulary),
        FakeEncoder(TINY_WIDTH),
        model_id="fake-1.0-000000000000",
        vocabulary_hash=vocabulary.hash,
    )
    app = build_app()
    settings = Settings.from_env()
    app.state.engine = Engine(ModelRegistry(settings, [served(embedder)]), settings)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))

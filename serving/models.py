"""A model that is served: its bundle, loaded and warm, and its queue."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import cast

from perturbscope.batching import BatchLimits
from perturbscope.bundle import Bundle
from perturbscope.counts import CountMatrix
from perturbscope.dispatcher import Dispatcher
from perturbscope.embedder import Embedder
from perturbscope.encoder import Device
from perturbscope.wire.messages import ModelInfo
from serving.settings import Settings
from serving.telemetry.metrics import ModelMetrics


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model and its queue.

    Attributes
    ----------
    info
        What a caller is told of it.
    embedder
        Tokenizer and graph.
    dispatcher
        The queue in front of the graph.
    probe
        One little cell, to warm the model up and to see whether it works.
    """

    info: ModelInfo
    embedder: Embedder
    dispatcher: Dispatcher
    probe: CountMatrix

    @classmethod
    def load(cls, path: str | os.PathLike[str], settings: Settings) -> ServedModel:
        """Open a bundle, build its session and run one cell through it.

        Raises
        ------
        BundleError
            The bundle is damaged, unsupported, or has no such variant.
        ProviderUnavailableError
            The device was asked for and is not there.
        InferenceError
            The graph does not run.
        """
        bundle = Bundle.open(os.fspath(path))
        device = cast("Device", settings.device)
        embedder = Embedder.from_bundle(
            bundle,
            variant=settings.variant,
            device=device,
            threads=settings.threads or None,
            limits=BatchLimits(max_tokens=settings.max_batch_tokens),
        )
        manifest = bundle.manifest
        info = ModelInfo(
            name=manifest.name,
            version=manifest.version,
            model_id=bundle.model_id,
            family=manifest.family,
            width=manifest.width,
            vocabulary_hash=manifest.vocabulary_hash,
            layer=manifest.layer,
            pooling=manifest.pooling,
            licence=manifest.licence,
            variant=settings.variant,
            device=device,
            golden="absent",
        )
        probe = CountMatrix.from_matrix([[1]], [bundle.vocabulary.gene_ids[0]])
        embedder.embed(probe)
        dispatcher = Dispatcher(
            embedder,
            max_queued_tokens=settings.max_queued_tokens,
            observer=ModelMetrics(manifest.name, manifest.version),
        )
        return cls(info, embedder, dispatcher, probe)

    @property
    def verified(self) -> bool:
        """Whether the last forward pass on the provider was good; if not, :meth:`check` tries one."""
        return not self.dispatcher.last_batch_failed

    async def check(self) -> None:
        """Run the probe through the queue. Raises as :meth:`Dispatcher.submit`."""
        await self.dispatcher.submit(await asyncio.to_thread(self.embedder.tokenize, self.probe))

    async def close(self) -> None:
        """Finish what was accepted, and stop. May be called twice."""
        await self.dispatcher.close()

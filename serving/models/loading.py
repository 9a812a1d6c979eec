"""One served model: loading its bundle, checking that it gives the right vectors, and its queue."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import PerturbScopeError, UnsupportedBundleError
from perturbscope.inference import memory
from perturbscope.inference.batching import BatchLimits
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.encoder import Device
from perturbscope.inference.golden import Golden, check_golden, read_golden
from perturbscope.inference.gpu import GpuOptions, gpu_limits
from perturbscope.inference.signatures import Signature, files_of, read_signers, signature_of
from perturbscope.protocol.messages import ModelInfo, OutputInfo
from serving.queue import Dispatcher
from serving.settings import Settings
from serving.telemetry import log
from serving.telemetry.metrics import ModelMetrics


@dataclass(eq=False)
class ServedModel:
    """A model and its queue.

    Attributes
    ----------
    info
        Description of the model for callers.
    embedder
        Tokenizer and graph.
    dispatcher
        Queue in front of the graph.
    probe
        One small cell, to check a model without golden vectors.
    metrics
        Observer of the dispatcher; closed with the model.
    golden
        Golden cells with their vectors, if the bundle has them.
    matched
        Whether the model gave those vectors when it was last checked.
    """

    info: ModelInfo
    embedder: Embedder
    dispatcher: Dispatcher
    probe: CountMatrix
    golden: Golden | None = None
    metrics: ModelMetrics | None = None
    matched: bool = True

    @classmethod
    def load(cls, path: str | os.PathLike[str], settings: Settings) -> ServedModel:
        """Open a bundle, build its session, and check it: run its golden cells, or one small cell.

        Raises
        ------
        BundleError
            The bundle is damaged, unsupported, or has no such variant, or no trusted signature where one is required.
        GoldenMismatchError
            On this device, the model gives other vectors than its bundle records.
        ProviderUnavailableError
            The device of the settings is not available.
        InferenceError
            The graph does not run.
        """
        bundle = Bundle.open(os.fspath(path))
        signature = signature_check(settings)(bundle)
        try:
            return cls._of(bundle, settings, signature)
        except PerturbScopeError:
            raise
        except Exception as error:
            # Of what runs here only the code of the family is not known to raise errors of the one tree.
            raise UnsupportedBundleError(
                f"{bundle.model_id} of the family {bundle.manifest.family!r} does not run ({type(error).__name__}: "
                f"{' '.join(str(error).split())}). Correct the family's module, or install the perturbscope that the "
                "bundle was made with.",
                field="family",
            ) from error

    @classmethod
    def _of(cls, bundle: Bundle, settings: Settings, signature: Signature) -> ServedModel:
        """Build and check the model of an opened bundle. Raises as :meth:`load`, and what the family raises."""
        golden = read_golden(bundle)
        device = cast("Device", settings.device)
        embedder = Embedder.from_bundle(
            bundle,
            variant=settings.variant,
            device=device,
            threads=settings.threads or None,
            limits=BatchLimits(max_tokens=settings.batch_tokens)
            if device == "cpu"
            else gpu_limits(device, bundle.family().max_length, max_tokens=settings.batch_tokens),
            gpu=GpuOptions(engine_cache=Path(settings.engine_cache) if settings.engine_cache else None),
        )
        probe = CountMatrix.from_matrix([[1]], [bundle.vocabulary.gene_ids[0]])
        try:
            differences = _first_check(embedder, golden, probe)
        except BaseException:
            embedder.close()
            raise
        info = replace(
            _describe(bundle, embedder, settings, golden), signature=signature.state, signer=signature.signer
        )
        log.event(
            "model_loaded",
            "warning" if golden is None else "info",
            model=info.model_id,
            variant=info.variant,
            provider=embedder.provider,
            golden=info.golden,
            signature=str(signature),
            **differences,
        )
        dispatcher = Dispatcher(
            embedder,
            max_queued_tokens=settings.max_queued_tokens,
            max_batch_seconds=settings.inference_timeout,
            observer=(metrics := ModelMetrics(info.name, info.version)),
        )
        return cls(info, embedder, dispatcher, probe, golden, metrics=metrics)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the model can be asked for; see :func:`perturbscope.inference.bundle.capabilities_of`."""
        return self.embedder.capabilities

    @property
    def verified(self) -> bool:
        """Whether the model is known to work on its device; if not, :meth:`check` runs it."""
        if self.dispatcher.last_batch_failed:
            # A later batch that succeeds does not prove that the vectors are right again.
            self.matched = False
        return self.matched

    async def check(self) -> None:
        """Check the model again, through the queue.

        Raises
        ------
        GoldenMismatchError
            The model gives other vectors than its bundle records.
        InferenceError, OverloadedError
            See :meth:`Dispatcher.submit`.
        """
        self.matched = False
        if self.golden is None:
            await self.dispatcher.submit(await asyncio.to_thread(self.embedder.tokenize, self.probe))
        else:
            tokens = await asyncio.to_thread(self.golden.tokenize, self.embedder)
            values, _ = await self.dispatcher.submit(tokens, outputs=self.golden.outputs)
            self.golden.compare(values, variant=self.embedder.variant, provider=self.embedder.provider).require(
                self.info.model_id
            )
        self.matched = True

    async def close(self) -> None:
        """Finish the accepted requests, and free the graph. May be called twice."""
        await self.dispatcher.close()
        self._free()

    def discard(self) -> None:
        """Free the graph of a model that no request has found."""
        self.dispatcher.stop()
        self._free()

    def _free(self) -> None:
        self.embedder.close()
        if self.metrics is not None:
            self.metrics.close()


def _first_check(embedder: Embedder, golden: Golden | None, probe: CountMatrix) -> dict[str, object]:
    """Run a model for the first time; return its differences from the golden vectors, for the log."""
    if golden is None:
        embedder.embed(probe)
        return {}
    result = check_golden(embedder, golden)
    result.require(embedder.model_id)
    return {"largest_difference": result.largest_difference, "lowest_cosine": result.lowest_cosine}


def _describe(bundle: Bundle, embedder: Embedder, settings: Settings, golden: Golden | None) -> ModelInfo:
    """Return the description of a model for callers."""
    manifest = bundle.manifest
    return ModelInfo(
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
        device=settings.device,
        golden="absent" if golden is None else "matched",
        outputs=tuple(
            OutputInfo(name=spec.name, per=spec.per, width=spec.width, meaning=spec.meaning, names=spec.names or ())
            for spec in manifest.outputs
        ),
        task=manifest.task,
        capabilities=embedder.capabilities,
        classes=manifest.classes or (),
        max_length=embedder.family.max_length,
        vocabulary_genes=len(bundle.vocabulary.gene_ids),
        panel_genes=len(manifest.gene_panel or ()),
    )


def signature_check(settings: Settings) -> Callable[[Bundle], Signature]:
    """Return a function that tells what is known of the signature of a bundle.

    It raises UntrustedBundleError where a signature is required and is not a trusted one.

    Raises
    ------
    InvalidParameterError
        A file of the trusted signers cannot be used.
    """
    signers = read_signers(files_of(settings.signers))

    def checked(bundle: Bundle) -> Signature:
        signature = signature_of(bundle, signers)
        if settings.require_signatures == "yes":
            signature.require(bundle)
        return signature

    return checked


def estimate_bytes(path: Path, settings: Settings) -> int:
    """Estimate the bytes of memory of a bundle's model before it is loaded; 0 if the bundle lacks the variant.

    Raises
    ------
    CorruptBundleError, UnsupportedBundleError
        See :func:`perturbscope.inference.memory.estimate_bytes`.
    """
    return memory.estimate_bytes(path, settings.variant, batch_tokens=settings.batch_tokens)

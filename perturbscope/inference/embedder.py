"""Embedding of cells: the only place where tokens are batched by length and run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError, UnknownGenesError
from perturbscope.families import Family
from perturbscope.families.tokens import TokenizedCells, pad
from perturbscope.inference.batching import BatchLimits, cpu_limits, form_batches
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embeddings import Embeddings, gather
from perturbscope.inference.encoder import Device, Encoder, OnnxEncoder
from perturbscope.inference.gpu import GpuOptions, gpu_limits
from perturbscope.threads import ahead

MIN_COVERAGE = 0.1
"""Smallest share of the columns that must be genes of the vocabulary."""
CHUNK_CELLS = 4096
"""Cells tokenized at a time, which bounds memory and is a wide enough window to sort by length."""


class Embedder:
    """Tokenizer and encoder of one model.

    Parameters
    ----------
    family
        Tokenizer of the model.
    encoder
        Runner of the graph.
    width
        Dimensions of an embedding.
    model_id, vocabulary_hash
        Names of the model, passed on with results.
    limits
        Budget of a batch.
    training
        Making of the weights, from the bundle's manifest; see :mod:`perturbscope.tasks.trained_on`.
    variant
        Graph of the bundle that the encoder runs.
    overlap
        Tokenize the next chunk, and pad the next batch, in a thread while one is computed: for an encoder that leaves
        the processor idle. Results are the same.
    """

    def __init__(
        self,
        family: Family,
        encoder: Encoder,
        *,
        width: int,
        model_id: str,
        vocabulary_hash: str,
        limits: BatchLimits | None = None,
        training: Mapping[str, Any] | None = None,
        variant: str = "fp32",
        overlap: bool = False,
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.width = width
        self.model_id = model_id
        self.vocabulary_hash = vocabulary_hash
        self.limits = limits or BatchLimits()
        self.training: Mapping[str, Any] = training or {}
        self.variant = variant
        self.overlap = overlap

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        variant: str = "fp32",
        device: Device = "cpu",
        threads: int | None = None,
        limits: BatchLimits | None = None,
        gpu: GpuOptions | None = None,
    ) -> Embedder:
        """Build the embedder of an opened bundle, with batches for its device. Raises as :class:`OnnxEncoder`."""
        encoder = OnnxEncoder(bundle, variant=variant, device=device, threads=threads, gpu=gpu)
        family = bundle.family()
        if limits is None:
            limits = cpu_limits() if device == "cpu" else gpu_limits(device, family.max_length)
        return cls(
            family,
            encoder,
            width=bundle.manifest.width,
            model_id=bundle.model_id,
            vocabulary_hash=bundle.manifest.vocabulary_hash,
            limits=limits,
            training=bundle.manifest.training,
            variant=variant,
            overlap=device != "cpu",
        )

    @property
    def provider(self) -> str:
        """Execution provider that runs the graph; empty if the encoder has none."""
        return str(getattr(self.encoder, "provider", ""))

    def close(self) -> None:
        """Free the encoder's memory; nothing can be embedded afterwards. May be called twice."""
        release = getattr(self.encoder, "close", None)
        if release is not None:
            release()

    def tokenize(self, cells: CountMatrix) -> TokenizedCells:
        """Tokenize cells.

        Raises
        ------
        UnknownGenesError
            Fewer than a tenth of the columns are genes of the vocabulary.
        EmptyCellError
            A cell expresses no gene of the vocabulary.
        """
        tokens = self.family.tokenize(cells)
        coverage = tokens.coverage
        if coverage.share < MIN_COVERAGE:
            raise UnknownGenesError(
                f"Only {coverage.n_matched} of {coverage.n_genes} genes are in the model's vocabulary; at least "
                f"{MIN_COVERAGE:.0%} are needed (unknown: {', '.join(coverage.unmatched[:3])}). "
                "Give human Ensembl ids or symbols, and name the column that holds them (gene_key) "
                "if they are not the index.",
                field="gene_ids",
            )
        return tokens

    def plan(self, tokens: TokenizedCells) -> list[NDArray[np.intp]]:
        """Cut tokens into batches of similar length within the budget; returns indices of cells."""
        return form_batches(tokens.lengths, self.limits)

    def run(self, tokens: TokenizedCells, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Embed one batch, float32 [len(rows), width].

        Raises
        ------
        InferenceError
            The forward pass failed, or returned values that are not finite.
        """
        return self._checked(self.encoder.run(self._padded(tokens, rows)), len(rows))

    def _padded(self, tokens: TokenizedCells, rows: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs of one batch; padding to a bucket may repeat its last cell."""
        length = None
        if self.limits.buckets is not None:
            length = self.limits.buckets.length(int(tokens.lengths[rows].max()))
            rows = self.limits.buckets.fill(rows)
        return pad(tokens, rows, self.family.inputs, length=length)

    def _checked(self, values: NDArray[np.float32], n_cells: int) -> NDArray[np.float32]:
        """Return the vectors of a batch's own cells. Raises as :meth:`run`."""
        if self.limits.buckets is not None:
            values = values[:n_cells]
        if values.shape != (n_cells, self.width) or not np.isfinite(values).all():
            raise InferenceError(
                f"The model returned shape {values.shape} for {n_cells} cells of width {self.width}"
                f"{'' if np.isfinite(values).all() else ', with values that are not finite'}."
            )
        return values

    def embed_tokens(
        self, tokens: TokenizedCells, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embed tokenized cells, in their order; `progress` is called with the number of cells of each batch."""
        values = np.empty((len(tokens), self.width), dtype=np.float32)
        run: Callable[[Any], NDArray[np.float32]] = self.encoder.run
        batches: Iterator[tuple[NDArray[np.intp], Any]]
        batches = ((rows, self._padded(tokens, rows)) for rows in self.plan(tokens))
        if self.overlap:
            stage, finish = getattr(self.encoder, "stage", None), getattr(self.encoder, "finish", None)
            if stage is not None and finish is not None:
                # The thread that pads a batch also copies it to the device.
                batches, run = _staged(batches, stage), finish
            batches = ahead(batches)
        for rows, batch in batches:
            values[rows] = self._checked(run(batch), len(rows))
            if progress:
                progress(len(rows))
        return values

    def embed(self, cells: CountMatrix, *, progress: Callable[[int], None] | None = None) -> Embeddings:
        """Embed cells in bounded memory beyond the result. Raises as :meth:`tokenize` and :meth:`run`."""
        chunks = (cells[start : start + CHUNK_CELLS] for start in range(0, len(cells), CHUNK_CELLS))
        return gather(self.embed_stream(chunks, progress=progress), len(cells))

    def embed_stream(
        self, chunks: Iterable[CountMatrix], *, progress: Callable[[int], None] | None = None
    ) -> Iterator[Embeddings]:
        """Embed a stream of chunks, one result a chunk.

        At most one chunk is held at a time, or with `overlap` the tokens of one and the next chunk, which is then read
        and tokenized in a thread.
        """
        tokenized = self._tokenized(chunks)
        for tokens, seconds in ahead(tokenized) if self.overlap else tokenized:
            started = time.perf_counter()
            values = self.embed_tokens(tokens, progress)
            yield self.describe(tokens, values, {"tokenize": seconds, "inference": time.perf_counter() - started})

    def _tokenized(self, chunks: Iterable[CountMatrix]) -> Iterator[tuple[TokenizedCells, float]]:
        """Yield the tokens of each chunk, and the seconds that tokenizing took."""
        for cells in chunks:
            started = time.perf_counter()
            tokens = self.tokenize(cells)
            del cells
            yield tokens, time.perf_counter() - started

    def describe(self, tokens: TokenizedCells, values: NDArray[np.float32], timings: dict[str, float]) -> Embeddings:
        """Return vectors with the facts about their cells and model."""
        return Embeddings(
            values,
            tokens.lengths.astype(np.int32),
            tokens.n_detected,
            tokens.known_share,
            tokens.coverage,
            self.model_id,
            self.vocabulary_hash,
            timings,
            self.variant,
        )


def _staged(
    batches: Iterable[tuple[NDArray[np.intp], Any]], stage: Callable[[Any], Any]
) -> Iterator[tuple[NDArray[np.intp], Any]]:
    """Yield batches, each copied to the device."""
    for rows, padded in batches:
        yield rows, stage(padded)

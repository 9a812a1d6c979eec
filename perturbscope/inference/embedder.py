"""Embedding of cells: the only place where tokens are batched by length and run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InferenceError
from perturbscope.families import Family
from perturbscope.families.outputs import CELL_EMBEDDING, Outputs, OutputSpec, selected
from perturbscope.families.tokens import MIN_COVERAGE, TokenizedCells, pad, unknown_genes
from perturbscope.inference.batching import BatchLimits, cpu_limits, form_batches
from perturbscope.inference.bundle import Bundle, capabilities_of
from perturbscope.inference.embeddings import Embeddings, OutputValues, gather
from perturbscope.inference.encoder import Device, Encoder, OnnxEncoder, StagedEncoder, Values
from perturbscope.inference.gpu import GpuOptions, gpu_limits
from perturbscope.threads import ahead

CHUNK_CELLS = 4096
"""Cells tokenized at a time, which bounds memory and is a wide enough window to sort by length."""


class Embedder:
    """Tokenizer and encoder of one model.

    Parameters
    ----------
    family
        Tokenizer of the model.
    encoder
        Runner of the graph, whose outputs are those of the model.
    model_id, vocabulary_hash
        Names of the model, passed on with results.
    limits
        Budget of a batch; the cost of a cell in it is that of the family.
    training
        Making of the weights, from the bundle's manifest; see :mod:`perturbscope.tasks.trained_on`.
    variant
        Graph of the bundle that the encoder runs.
    capabilities
        What the model can be asked for; by default what its outputs allow.
    overlap
        Tokenize the next chunk, and pad the next batch, in a thread while one is computed: for an encoder that leaves
        the processor idle. Results are the same.
    """

    def __init__(
        self,
        family: Family,
        encoder: Encoder,
        *,
        model_id: str,
        vocabulary_hash: str,
        limits: BatchLimits | None = None,
        training: Mapping[str, Any] | None = None,
        variant: str = "fp32",
        capabilities: Sequence[str] | None = None,
        overlap: bool = False,
    ) -> None:
        self.family = family
        self.encoder = encoder
        self.outputs = encoder.outputs
        self.width = next(spec.width for spec in encoder.outputs if spec.name == CELL_EMBEDDING)
        self.capabilities = tuple(capabilities or capabilities_of(encoder.outputs))
        self.model_id = model_id
        self.vocabulary_hash = vocabulary_hash
        self.limits = replace(limits or BatchLimits(), cost=family.cost)
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
            model_id=bundle.model_id,
            vocabulary_hash=bundle.manifest.vocabulary_hash,
            limits=limits,
            training=bundle.manifest.training,
            variant=variant,
            capabilities=bundle.manifest.capabilities,
            overlap=device != "cpu",
        )

    @property
    def provider(self) -> str:
        """Execution provider that runs the graph; empty if the encoder has none."""
        return self.encoder.provider

    def close(self) -> None:
        """Free the encoder's memory; nothing can be embedded afterwards. May be called twice."""
        self.encoder.close()

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
            raise unknown_genes(coverage, coverage.unmatched)
        return tokens

    def plan(self, tokens: TokenizedCells) -> list[NDArray[np.intp]]:
        """Cut tokens into batches of similar length within the budget; returns indices of cells."""
        return form_batches(tokens.lengths, self.limits)

    def run(
        self, tokens: TokenizedCells, rows: NDArray[np.integer[Any]], outputs: Sequence[OutputSpec] | None = None
    ) -> Outputs:
        """Compute outputs of one batch; None: the cell embedding.

        Raises
        ------
        InferenceError
            The forward pass failed, or returned values that are not finite.
        """
        specs = selected(self.outputs, None) if outputs is None else tuple(outputs)
        values = self.encoder.run(self._padded(tokens, rows), [spec.name for spec in specs])
        return self._checked(values, specs, tokens.lengths[rows])

    def _padded(self, tokens: TokenizedCells, rows: NDArray[np.integer[Any]]) -> dict[str, NDArray[Any]]:
        """Return the graph's inputs of one batch; padding to a bucket may repeat its last cell."""
        length = None
        if self.limits.buckets is not None:
            length = self.limits.buckets.length(int(tokens.lengths[rows].max()))
            rows = self.limits.buckets.fill(rows)
        return pad(tokens, rows, self.family.inputs, length=length)

    def _checked(self, values: Values, specs: tuple[OutputSpec, ...], lengths: NDArray[np.int64]) -> Outputs:
        """Return the values of a batch's own cells, without padding. Raises as :meth:`run`."""
        n_cells = len(lengths)
        found: dict[str, NDArray[np.float32]] = {}
        for spec in specs:
            array = values[spec.name]
            if self.limits.buckets is not None:
                array = array[:n_cells]
            length = array.shape[1:2] if spec.per == "token" else ()
            if array.shape != (n_cells, *length, spec.width) or (length and length[0] < lengths.max()):
                raise InferenceError(
                    f"The model returned the shape {array.shape} as {spec.name} of {n_cells} cells of up to "
                    f"{lengths.max()} tokens; the width is {spec.width}."
                )
            if length:
                array = array[np.arange(length[0]) < lengths[:, None]]
            if not np.isfinite(array).all():
                raise InferenceError(f"The model returned values of {spec.name} that are not finite.")
            found[spec.name] = array
        return Outputs(specs, found, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))

    def infer(
        self,
        tokens: TokenizedCells,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Outputs:
        """Compute outputs of tokenized cells, in their order.

        Parameters
        ----------
        tokens
            Cells from :meth:`tokenize`.
        outputs
            Names of outputs; the cell embedding is always computed, and alone by default.
        progress
            Called with the number of cells of each batch.

        Raises
        ------
        InvalidParameterError
            The model has no such output.
        InferenceError
            As :meth:`run`.
        """
        specs = selected(self.outputs, outputs)
        names = [spec.name for spec in specs]
        found = Outputs.empty(specs, tokens.offsets)
        run: Callable[[Any], Values] = functools.partial(self.encoder.run, outputs=names)
        batches: Iterator[tuple[NDArray[np.intp], Any]]
        batches = ((rows, self._padded(tokens, rows)) for rows in self.plan(tokens))
        if self.overlap:
            if isinstance(self.encoder, StagedEncoder):
                # The thread that pads a batch also copies it to the device.
                batches, run = _staged(batches, self.encoder, names), self.encoder.finish
            batches = ahead(batches)
        lengths = tokens.lengths
        for rows, batch in batches:
            found.put(rows, self._checked(run(batch), specs, lengths[rows]))
            if progress:
                progress(len(rows))
        return found

    def embed_tokens(
        self, tokens: TokenizedCells, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embed tokenized cells, in their order; float32 [n_cells, width]. See :meth:`infer`."""
        return self.infer(tokens, progress=progress).cell_embedding

    def embed(
        self,
        cells: CountMatrix,
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Embed cells in bounded memory beyond the result. Raises as :meth:`tokenize` and :meth:`infer`."""
        chunks = (cells[start : start + CHUNK_CELLS] for start in range(0, len(cells), CHUNK_CELLS))
        return gather(self.embed_stream(chunks, outputs=outputs, progress=progress), len(cells))

    def embed_stream(
        self,
        chunks: Iterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Embeddings]:
        """Embed a stream of chunks, one result a chunk, with the values of the `outputs` that are named.

        At most one chunk is held at a time, or with `overlap` the tokens of one and the next chunk, which is then read
        and tokenized in a thread.
        """
        tokenized = self._tokenized(chunks)
        for tokens, seconds in ahead(tokenized) if self.overlap else tokenized:
            started = time.perf_counter()
            values = self.infer(tokens, outputs, progress)
            yield self.describe(tokens, values, {"tokenize": seconds, "inference": time.perf_counter() - started})

    def _tokenized(self, chunks: Iterable[CountMatrix]) -> Iterator[tuple[TokenizedCells, float]]:
        """Yield the tokens of each chunk, and the seconds that tokenizing took."""
        for cells in chunks:
            started = time.perf_counter()
            tokens = self.tokenize(cells)
            del cells
            yield tokens, time.perf_counter() - started

    def describe(self, tokens: TokenizedCells, values: Outputs, timings: dict[str, float]) -> Embeddings:
        """Return outputs with the facts about their cells and model."""
        return Embeddings(
            values.cell_embedding,
            tokens.lengths.astype(np.int32),
            tokens.n_detected,
            tokens.known_share,
            tokens.coverage,
            self.model_id,
            self.vocabulary_hash,
            timings,
            self.variant,
            self._others(tokens, values),
        )

    def _others(self, tokens: TokenizedCells, values: Outputs) -> dict[str, OutputValues]:
        """Return the outputs beside the cell embedding; those per token without special tokens, and with genes."""
        others = [spec for spec in values.specs if spec.name != CELL_EMBEDDING]
        found = {spec.name: OutputValues(spec, values[spec.name]) for spec in others if spec.per == "cell"}
        per_token = [spec for spec in others if spec.per == "token"]
        if per_token:
            rows = self.family.gene_rows(tokens)
            is_gene = rows >= 0
            offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(is_gene)])[tokens.offsets]
            names = self.family.vocabulary.gene_ids
            for spec in per_token:
                kept = values[spec.name] if is_gene.all() else values[spec.name][is_gene]
                found[spec.name] = OutputValues(spec, kept, offsets, rows[is_gene], names)
        return {spec.name: found[spec.name] for spec in others}


def _staged(
    batches: Iterable[tuple[NDArray[np.intp], Any]], encoder: StagedEncoder, outputs: Sequence[str]
) -> Iterator[tuple[NDArray[np.intp], Any]]:
    """Yield batches, each copied to the device."""
    for rows, padded in batches:
        yield rows, encoder.stage(padded, outputs)

"""The embedder: one vector a cell, the same whatever else is embedded with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import EmptyCellError, InferenceError, InvalidParameterError, UnknownGenesError
from perturbscope.families.outputs import CELL_EMBEDDING, GENE_EMBEDDING
from perturbscope.inference import embedder as embedder_module
from perturbscope.inference.batching import BatchLimits, cpu_limits
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.embeddings import gather, join
from perturbscope.inference.gpu import gpu_limits
from tests.bundles import CLASSES, TINY_OUTPUTS, tiny_table, write_outputs_bundle
from tests.fakes import FakeEncoder

TOLERANCE = 1e-6
"""A cell's vector alone against the same cell in a batch."""


@pytest.fixture(scope="module")
def embedder(tiny_bundle: Path) -> Embedder:
    return Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of five cells, so that a little input has several."""
    monkeypatch.setattr(embedder_module, "CHUNK_CELLS", 5)
    return 5


def chunks(cells: CountMatrix, size: int) -> list[CountMatrix]:
    return [cells[start : start + size] for start in range(0, len(cells), size)]


# The vector of a cell


def test_a_bundle_embeds(embedder, tiny_cells, tiny_bundle):
    result = embedder.embed(tiny_cells)
    bundle = Bundle.open(tiny_bundle)
    assert result.values.shape == (24, 8)
    assert result.values.dtype == np.float32
    assert len(result) == 24
    assert result.model_id == bundle.model_id
    assert result.vocabulary_hash == bundle.vocabulary.hash
    np.testing.assert_array_equal(result.lengths, tiny_cells.counts.getnnz(axis=1))
    np.testing.assert_array_equal(result.n_detected, result.lengths)
    np.testing.assert_array_equal(result.known_share, 1.0)
    assert result.coverage.n_matched == 40
    assert set(result.timings) == {"tokenize", "inference"}


def test_a_cell_is_the_same_alone(embedder, tiny_cells):
    together = embedder.embed(tiny_cells).values
    alone = np.concatenate([embedder.embed(tiny_cells[cell : cell + 1]).values for cell in range(24)])
    np.testing.assert_allclose(alone, together, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("max_cells", [1, 2, 7, 24])
@pytest.mark.parametrize("max_tokens", [1, 40, 100_000])
def test_a_cell_is_the_same_in_any_batch(embedder, tiny_cells, max_cells, max_tokens):
    limits = BatchLimits(max_cells=max_cells, max_tokens=max_tokens)
    other = Embedder(embedder.family, embedder.encoder, model_id="m", vocabulary_hash="v", limits=limits)
    np.testing.assert_allclose(
        other.embed(tiny_cells).values, embedder.embed(tiny_cells).values, atol=TOLERANCE, rtol=0
    )


@given(order=st.permutations(range(24)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cell_is_the_same_in_any_order(embedder, tiny_cells, order):
    np.testing.assert_allclose(
        embedder.embed(tiny_cells[list(order)]).values,
        embedder.embed(tiny_cells).values[list(order)],
        atol=TOLERANCE,
        rtol=0,
    )


def test_every_cell_gets_its_own_vector(fake_embedder, tiny_cells):
    fake_embedder.limits = BatchLimits(max_tokens=60)
    result = fake_embedder.embed(tiny_cells)
    tokens = fake_embedder.tokenize(tiny_cells)
    np.testing.assert_array_equal(result.values[:, 0], tokens.lengths)
    np.testing.assert_array_equal(result.values[:, 1], [cell["input_ids"][0] for cell in tokens])


def test_batches_keep_the_budget(fake_embedder, tiny_cells):
    fake_embedder.limits = BatchLimits(max_tokens=60)
    fake_embedder.embed(tiny_cells)
    assert sum(cells for cells, _ in fake_embedder.encoder.batches) == 24
    assert all(cells * longest <= 60 for cells, longest in fake_embedder.encoder.batches)
    assert len(fake_embedder.encoder.batches) > 5


# Chunks and streams


@pytest.mark.parametrize("size", [1, 5, 24, 100])
def test_a_stream_equals_the_whole(embedder, tiny_cells, size):
    whole = embedder.embed(tiny_cells)
    streamed = join(list(embedder.embed_stream(chunks(tiny_cells, size))))
    np.testing.assert_allclose(streamed.values, whole.values, atol=TOLERANCE, rtol=0)
    for name in ("lengths", "n_detected", "known_share"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(whole, name))
    assert (streamed.coverage, streamed.model_id) == (whole.coverage, whole.model_id)


def test_embed_works_in_chunks(fake_embedder, tiny_cells, small_chunks):
    whole = fake_embedder.embed(tiny_cells)
    assert max(cells for cells, _ in fake_embedder.encoder.batches) <= small_chunks
    np.testing.assert_array_equal(whole.values[:, 0], whole.lengths)


def test_a_stream_holds_one_chunk_at_a_time(fake_embedder, tiny_cells):
    """Nothing is read ahead: the next chunk is asked for after the last one was embedded."""
    events = []

    def source():
        for number, cells in enumerate(chunks(tiny_cells, 12)):
            events.append(f"read {number}")
            yield cells

    for number, _ in enumerate(fake_embedder.embed_stream(source())):
        events.append(f"embedded {number}")
    assert events == ["read 0", "embedded 0", "read 1", "embedded 1"]


def test_progress_counts_every_cell(fake_embedder, tiny_cells, small_chunks):
    done = []
    fake_embedder.embed(tiny_cells, progress=done.append)
    assert sum(done) == 24
    assert len(done) >= 24 / small_chunks


def test_timings_of_chunks_add_up(fake_embedder, tiny_cells):
    parts = list(fake_embedder.embed_stream(chunks(tiny_cells, 8)))
    assert join(parts).timings["tokenize"] == pytest.approx(sum(part.timings["tokenize"] for part in parts))


# Outputs beside the cell embedding

ALL = [spec.name for spec in TINY_OUTPUTS]


@pytest.fixture(scope="module")
def versatile(outputs_bundle: Path) -> Embedder:
    """An embedder of the bundle with several outputs."""
    return Embedder.from_bundle(Bundle.open(outputs_bundle), threads=1)


@pytest.fixture(scope="module")
def with_ends(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """The same, of cells with special tokens at both ends."""
    path = write_outputs_bundle(tmp_path_factory.mktemp("ends") / "bundle", ends=True)
    return Embedder.from_bundle(Bundle.open(path), threads=1)


@pytest.mark.parametrize("limits", [BatchLimits(max_cells=1), BatchLimits(max_tokens=90), gpu_limits("cuda", 2048)])
@pytest.mark.parametrize("overlap", [False, True])
def test_outputs_of_any_batches_are_those_of_each_cell(versatile, tiny_cells, limits, overlap):
    other = Embedder(
        versatile.family, versatile.encoder, model_id="m", vocabulary_hash="v", limits=limits, overlap=overlap
    )
    tokens = other.tokenize(tiny_cells)
    ids = tokens.arrays["input_ids"]
    done = []
    found = other.infer(tokens, ALL, done.append)
    assert (sum(done), [spec.name for spec in found.specs]) == (24, ALL)
    table = tiny_table(len(versatile.family.vocabulary))
    np.testing.assert_array_equal(found[GENE_EMBEDDING], table[ids])
    np.testing.assert_array_equal(found["gene_value"], ids[:, None] / 2)
    means = [table[cell["input_ids"]].mean(axis=0) for cell in tokens]
    np.testing.assert_allclose(found.cell_embedding, means, atol=TOLERANCE)
    np.testing.assert_array_equal(found["cell_logits"], found.cell_embedding[:, : len(CLASSES)])


def test_only_outputs_that_are_asked_for_are_in_the_answer(versatile, tiny_cells):
    plain = versatile.embed(tiny_cells)
    assert plain.outputs == {}
    found = versatile.embed(tiny_cells, outputs=["cell_logits", CELL_EMBEDDING])
    assert list(found.outputs) == ["cell_logits"]
    np.testing.assert_array_equal(found.values, plain.values)
    with pytest.raises(InvalidParameterError, match="no output 'gene_logits'; it has cell_embedding, gene_embedding,"):
        versatile.embed(tiny_cells, outputs=["gene_logits"])


@pytest.mark.parametrize("size", [1, 7, 24])
@pytest.mark.parametrize("name", ["versatile", "with_ends"])
def test_values_of_tokens_have_their_genes_and_leave_special_tokens_out(request, tiny_cells, small_chunks, name, size):
    embedder = request.getfixturevalue(name)
    found = join(list(embedder.embed_stream(chunks(tiny_cells, size), outputs=ALL)))
    vocabulary = embedder.family.vocabulary
    table, gene_of = tiny_table(len(vocabulary)), dict(zip(vocabulary.tokens, vocabulary.gene_ids, strict=True))
    vectors, values = found.outputs[GENE_EMBEDDING], found.outputs["gene_value"]
    for cell, tokens in enumerate(embedder.tokenize(tiny_cells)):
        ids = [token for token in tokens["input_ids"] if token in gene_of]
        assert len(tokens["input_ids"]) - len(ids) == (2 if name == "with_ends" else 0)
        assert vectors.genes_of(cell).tolist() == [gene_of[token] for token in ids]
        np.testing.assert_array_equal(vectors.of_cell(cell), table[ids])
        np.testing.assert_array_equal(values.of_cell(cell)[:, 0], np.array(ids) / 2)
    assert vectors.gene_ids.tolist() == np.concatenate([vectors.genes_of(cell) for cell in range(24)]).tolist()
    assert vectors.cells.tolist() == np.repeat(np.arange(24), np.diff(vectors.offsets)).tolist()
    assert found.outputs["cell_logits"].spec.names == CLASSES
    assert found.outputs["cell_logits"].of_cell(3).shape == (3,)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (GENE_EMBEDDING, (3, 7, 8), r"shape \(3, 7, 8\) as gene_embedding of 3 cells of up to 9 tokens"),
        (GENE_EMBEDDING, (3, 9, 5), "the width is 8"),
        ("cell_logits", (3, 9, 3), "as cell_logits"),
        ("cell_logits", (2, 3), "as cell_logits"),
    ],
)
def test_an_output_of_another_shape(versatile, tiny_cells, monkeypatch, name, shape, message):
    tokens = versatile.tokenize(CountMatrix.from_matrix(np.ones((3, 9), int), tiny_cells.gene_ids[:9]))
    encoder = SimpleNamespace(run=lambda inputs, outputs: {name: np.zeros(shape, np.float32)})
    monkeypatch.setattr(versatile, "encoder", encoder)
    specs = [spec for spec in TINY_OUTPUTS if spec.name == name]
    with pytest.raises(InferenceError, match=message):
        versatile.run(tokens, np.arange(3), specs)


# Bad input


def test_too_few_known_genes(fake_embedder, tiny_cells):
    known = tiny_cells.gene_ids[:3]
    cells = CountMatrix.from_matrix(np.ones((2, 31), int), [*known, *(f"LOC{number}" for number in range(28))])
    with pytest.raises(UnknownGenesError, match=r"Only 3 of 31 genes .* at least 10% .*LOC0, LOC1, LOC2.*gene_key"):
        fake_embedder.embed(cells)


def test_just_enough_known_genes(fake_embedder, tiny_cells):
    known = tiny_cells.gene_ids[:3]
    cells = CountMatrix.from_matrix(np.ones((2, 30), int), [*known, *(f"LOC{number}" for number in range(27))])
    result = fake_embedder.embed(cells)
    np.testing.assert_array_equal(result.lengths, 3)
    np.testing.assert_allclose(result.known_share, 0.1)


@pytest.mark.parametrize("first_row", [0, 1000])
@pytest.mark.parametrize("row", [0, 4, 5, 17, 23])
def test_an_empty_cell_has_its_row_in_the_whole_input(fake_embedder, tiny_cells, small_chunks, row, first_row):
    counts = np.hstack([tiny_cells.counts.toarray(), np.ones((24, 1), int)])
    counts[row, :-1] = 0
    cells = CountMatrix.from_matrix(counts, [*tiny_cells.gene_ids, "unheard of"], first_row=first_row)
    with pytest.raises(EmptyCellError, match=f"The cell in row {first_row + row} expresses no gene"):
        fake_embedder.embed(cells)


def test_values_that_are_not_finite(fake_embedder, tiny_cells, monkeypatch):
    def run(inputs, outputs):
        return {"cell_embedding": np.full((len(inputs["attention_mask"]), 8), np.nan, dtype=np.float32)}

    monkeypatch.setattr(fake_embedder.encoder, "run", run)
    with pytest.raises(InferenceError, match="not finite"):
        fake_embedder.embed(tiny_cells)


def test_values_of_the_wrong_width(fake_embedder, tiny_cells):
    fake_embedder.encoder = FakeEncoder(width=5)
    with pytest.raises(InferenceError, match=r"shape \(\d+, 5\) as cell_embedding of \d+ cells .* the width is 8\."):
        fake_embedder.embed(tiny_cells)


def test_an_error_of_the_encoder_reaches_the_caller(fake_embedder, tiny_cells):
    fake_embedder.encoder = FakeEncoder(error=InferenceError("out of memory"))
    with pytest.raises(InferenceError, match="out of memory"):
        fake_embedder.embed(tiny_cells)


# What a careful reader should know


def test_shallow_cells_are_flagged_not_dropped(fake_embedder):
    genes = GeneVocabulary.geneformer_gc30m().gene_ids[:600]
    counts = np.ones((2, 600), int)
    counts[1, 499:] = 0
    result = fake_embedder.embed(CountMatrix.from_matrix(counts, genes))
    assert result.below_min_genes.tolist() == [False, True]
    assert result.warnings() == [
        "1 of 2 cells express fewer than 500 genes of the vocabulary; their embeddings rest on little."
    ]


def test_cells_whose_counts_are_mostly_unknown(fake_embedder):
    genes = GeneVocabulary.geneformer_gc30m().gene_ids[:600]
    counts = np.ones((2, 601), int)
    counts[0, -1] = 601
    result = fake_embedder.embed(CountMatrix.from_matrix(counts, [*genes, "spike-in"]))
    assert result.known_share[0] == pytest.approx(600 / 1201)
    assert result.warnings() == ["1 of 2 cells have over half of their counts in genes that the model does not know."]


def test_ambiguous_genes_are_named(fake_embedder):
    vocabulary = GeneVocabulary.geneformer_gc30m()
    aliases = fake_embedder.family.resolver._aliases
    alias, gene = next(
        (alias, gene) for alias, (gene, ambiguous) in aliases.items() if ambiguous and gene in vocabulary
    )
    genes = [alias, *(other for other in vocabulary.gene_ids[:600] if other != gene)]
    warnings = fake_embedder.embed(CountMatrix.from_matrix(np.ones((1, len(genes)), int), genes)).warnings()
    assert len(warnings) == 1
    assert f"1 gene identifiers are ambiguous; the first reading was taken ({alias} -> {gene}" in warnings[0]


def test_nothing_to_say_of_good_cells(fake_embedder):
    genes = GeneVocabulary.geneformer_gc30m().gene_ids[:600]
    assert fake_embedder.embed(CountMatrix.from_matrix(np.ones((2, 600), int), genes)).warnings() == []


def test_gathered_parts_are_what_one_call_gives(fake_embedder: Embedder, tiny_cells: CountMatrix) -> None:
    chunks = [tiny_cells[:5], tiny_cells[5:6], tiny_cells[6:]]
    whole = fake_embedder.embed(tiny_cells)
    place = np.empty((24, 8), dtype=np.float32)
    for values in (None, place):
        found = gather(fake_embedder.embed_stream(chunks), 24, values)
        for name in ("values", "lengths", "n_detected", "known_share"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        assert (found.coverage, found.maker, set(found.timings)) == (whole.coverage, whole.maker, set(whole.timings))
    assert found.values is place


def test_a_stream_holds_few_chunks(fake_embedder: Embedder, tiny_cells: CountMatrix) -> None:
    made: list[weakref.ref[CountMatrix]] = []
    most = 0

    def chunks() -> Iterator[CountMatrix]:
        nonlocal most
        for at in range(24):
            chunk = tiny_cells[at : at + 1]
            made.append(weakref.ref(chunk))
            most = max(most, sum(ref() is not None for ref in made))
            yield chunk

    assert len(gather(fake_embedder.embed_stream(chunks()), 24)) == 24
    assert most <= 3


def test_an_embedder_of_a_cpu_has_its_batches(embedder, tiny_bundle):
    assert embedder.limits == cpu_limits()
    wide = BatchLimits(max_tokens=9)
    assert Embedder.from_bundle(Bundle.open(tiny_bundle), threads=1, limits=wide).limits == wide


def test_vectors_of_many_chunks_are_held_once(fake_embedder, monkeypatch):
    """A chunk's vectors are let go of as soon as they are in the result."""
    monkeypatch.setattr(embedder_module, "CHUNK_CELLS", 2)
    held = []
    describe = fake_embedder.describe

    def watched(*args):
        held.append(weakref.ref(args[1]))
        # The first is the template of the result's other fields; of the others only the newest two can be in use.
        assert sum(chunk() is not None for chunk in held[1:-2]) == 0
        return describe(*args)

    monkeypatch.setattr(fake_embedder, "describe", watched)
    genes = GeneVocabulary.geneformer_gc30m().gene_ids[:3]
    cells = CountMatrix.from_matrix(np.arange(1, 61).reshape(20, 3), genes)
    assert len(fake_embedder.embed(cells)) == 20
    assert len(held) == 10

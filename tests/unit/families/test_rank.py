"""Rank tokens against the published algorithm, restated plainly, on real and on awkward cells."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perturbscope.cells.counts import MAX_COUNT, CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import (
    CorruptBundleError,
    EmptyCellError,
    UnknownGenesError,
    UnsupportedBundleError,
    VocabularyMismatchError,
)
from perturbscope.families import rank
from perturbscope.families._ragged import row_blocks
from perturbscope.families.rank import RankFamily, build

GENEFORMER = GeneVocabulary.geneformer_gc30m()
GENEFORMER_2 = GeneVocabulary.geneformer_gc95m()
VERSION_2 = {"max_length": 4096, "start": "<cls>", "end": "<eos>"}
TOTAL = "total_umi_full_transcriptome"


def geneformer_tokens(
    counts: NDArray[np.integer],
    total: float,
    medians: NDArray[np.float64],
    tokens: NDArray[np.int32],
    max_length: int = 2048,
) -> list[int]:
    """Theodoris et al. 2023, one cell: expressed genes by count per 10,000 over the gene's median, highest first.

    Ties, which the paper leaves open, go to the lower token id.
    """
    expressed = np.flatnonzero(counts)
    value = counts[expressed] / total * 10_000 / medians[expressed]
    order = np.lexsort((tokens[expressed], -value))
    return tokens[expressed[order]][:max_length].tolist()


def plain_tokens(cells: CountMatrix, family: RankFamily) -> list[list[int]]:
    """The published algorithm cell by cell: columns of one gene added up, unknown columns dropped."""
    vocabulary = family.vocabulary
    rows = family.resolver.map(cells.gene_ids, vocabulary).rows
    found = []
    for cell in range(len(cells)):
        entries = slice(cells.counts.indptr[cell], cells.counts.indptr[cell + 1])
        row = rows[cells.counts.indices[entries]]
        counts = np.zeros(len(vocabulary.gene_ids), dtype=np.int64)
        np.add.at(counts, row[row >= 0], cells.counts.data[entries][row >= 0])
        found.append(
            geneformer_tokens(counts, cells.totals[cell], vocabulary.medians, vocabulary.tokens, family.max_length)
        )
    return found


def tokens_of(cells: CountMatrix, family: RankFamily) -> list[list[int]]:
    return [cell["input_ids"].tolist() for cell in family.tokenize(cells)]


def toy_family(medians, max_length=2048, aliases=None) -> RankFamily:
    """A family over genes ENSG00000000000, ...1, ...2 with tokens 2, 3, 4, ..."""
    vocabulary = GeneVocabulary(
        tuple(gene(number) for number in range(len(medians))),
        np.arange(2, len(medians) + 2, dtype=np.int32),
        np.asarray(medians, dtype=np.float64),
        {"<pad>": 0, "<mask>": 1},
        "a test",
    )
    family = build({"max_length": max_length}, vocabulary)
    return RankFamily(family.config, vocabulary, GeneResolver(aliases or {}))


def gene(number: int) -> str:
    return f"ENSG{number:011d}"


def matrix(counts, genes=None, **options) -> CountMatrix:
    counts = np.atleast_2d(counts)
    return CountMatrix.from_matrix(counts, genes or [gene(number) for number in range(counts.shape[1])], **options)


@pytest.fixture(scope="module")
def family() -> RankFamily:
    return build({}, GENEFORMER)


def read_cells(path: Path, n_cells: int, seed: int = 0) -> CountMatrix:
    """`n_cells` of a shipped file, drawn at random; all if there are fewer."""
    cells = anndata.read_h5ad(path)
    chosen = np.sort(np.random.default_rng(seed).permutation(cells.n_obs)[:n_cells])
    totals = cells.obs[TOTAL].to_numpy()[chosen] if TOTAL in cells.obs else None
    return CountMatrix.from_matrix(cells.X[chosen], cells.var_names, totals=totals)


# Real cells


@pytest.mark.parametrize(
    ("file", "n_cells"),
    [
        ("pbmc3k_10x", 2700),
        ("baron2016_pancreas", 300),
        ("kang2018_ifnb_pbmc", 500),
        ("papalexi2021_eccite_thp1_panel", 500),
        ("datlinger_jurkat_cropseq", 500),
    ],
)
def test_tokens_of_real_cells_are_those_of_the_published_algorithm(family, data_dir, file, n_cells):
    cells = read_cells(data_dir / f"{file}.h5ad", n_cells)
    assert len(cells) == n_cells
    assert tokens_of(cells, family) == plain_tokens(cells, family)


def version_2(
    counts: NDArray[np.integer], gene_ids: list[str], total: float, max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Geneformer's second version, one cell: genes under one id by the mapping of ids, ``<cls>``, ``<eos>``, 2 less.

    Returns the tokens, and the value that each gene is ranked by. The published sort is not stable, so that genes of
    equal value have no order.
    """
    vocabulary = GENEFORMER_2
    mapping = {gene_id: gene_id for gene_id in vocabulary.gene_ids} | dict(vocabulary.retired)
    token = dict(zip(vocabulary.gene_ids, vocabulary.tokens.tolist(), strict=True))
    median = dict(zip(vocabulary.gene_ids, vocabulary.medians.tolist(), strict=True))
    summed: dict[str, int] = {}
    for name, count in zip(gene_ids, counts.tolist(), strict=True):
        if count and name.upper() in mapping:
            summed[mapping[name.upper()]] = summed.get(mapping[name.upper()], 0) + count
    names = list(summed)
    values = np.array([summed[name] / total * 10_000 / median[name] for name in names])
    best = np.argsort(-values)[: max_length - 2]
    return np.array([2, *(token[names[place]] for place in best), 3]), values[best]


@pytest.mark.parametrize("max_length", [4096, 700])
@pytest.mark.parametrize(
    ("file", "n_cells", "n_retired"),
    [
        ("pbmc3k_10x", 200, 137),
        ("baron2016_pancreas", 100, 21),
        ("kang2018_ifnb_pbmc", 100, 19),
        ("datlinger_jurkat_cropseq", 200, 8),
    ],
)
def test_tokens_of_real_cells_are_those_of_the_second_version(data_dir, file, n_cells, n_retired, max_length):
    """Retired Ensembl ids count towards their successors, as in the published tokenizer."""
    cells = read_cells(data_dir / f"{file}.h5ad", n_cells)
    ensembl = np.flatnonzero(np.char.startswith(cells.gene_ids, "ENSG"))
    cells = CountMatrix.from_matrix(cells.counts[:, ensembl], cells.gene_ids[ensembl], totals=cells.totals)
    assert sum(name in GENEFORMER_2.retired for name in cells.gene_ids) == n_retired
    family = build({**VERSION_2, "max_length": max_length}, GENEFORMER_2)
    tokens = family.tokenize(cells)
    assert (tokens.lengths <= family.bound(cells)).all()
    if file == "baron2016_pancreas":
        assert (tokens.lengths == max_length).any() == (max_length == 700)
    for number, found in enumerate(tokens):
        ids = found["input_ids"]
        wanted, values = version_2(
            cells.counts[number].toarray()[0], cells.gene_ids.tolist(), cells.totals[number], max_length
        )
        assert len(ids) == len(wanted)
        assert (ids[0], ids[-1]) == (2, 3)
        apart = ~np.isclose(values[1:], values[:-1], rtol=1e-12, atol=0)
        alone = np.r_[True, apart] & np.r_[apart, len(wanted) < max_length]
        np.testing.assert_array_equal(ids[1:-1][alone], wanted[1:-1][alone])
        if len(wanted) < max_length:  # a cut may fall between equal genes
            assert set(ids) == set(wanted)


@pytest.fixture(scope="module")
def pancreas(data_dir: Path) -> CountMatrix:
    """60 deep cells: counts in the thousands, some with more genes than fit."""
    return read_cells(data_dir / "baron2016_pancreas.h5ad", 60, seed=1)


@pytest.mark.parametrize("factor", [2, 7, 1000, 400_000])
def test_scaling_a_cell_changes_nothing(family, pancreas, factor):
    scaled = CountMatrix.from_matrix(pancreas.counts.astype(np.int64) * factor, pancreas.gene_ids)
    assert pancreas.counts.max() > 1000
    assert tokens_of(scaled, family) == tokens_of(pancreas, family)


def test_the_order_of_columns_changes_nothing(family, pancreas, rng):
    order = rng.permutation(pancreas.n_genes)
    permuted = CountMatrix.from_matrix(pancreas.counts[:, order], pancreas.gene_ids[order])
    assert tokens_of(permuted, family) == tokens_of(pancreas, family)


def test_the_order_and_company_of_cells_change_nothing(family, pancreas, rng):
    order = rng.permutation(len(pancreas))
    assert tokens_of(pancreas[order], family) == [tokens_of(pancreas, family)[cell] for cell in order]
    assert tokens_of(pancreas[7:8], family) == [tokens_of(pancreas, family)[7]]


def test_genes_outside_the_vocabulary_change_nothing(family, pancreas):
    counts = np.hstack([pancreas.counts.toarray(), np.full((len(pancreas), 2), 5000)])
    more = CountMatrix.from_matrix(counts, [*pancreas.gene_ids, "ERCC-00002", "a gene of the future"])
    assert tokens_of(more, family) == tokens_of(pancreas, family)
    with_more, without = family.tokenize(more), family.tokenize(pancreas)
    np.testing.assert_array_equal(with_more.n_detected, without.n_detected)
    own = pancreas.totals
    np.testing.assert_allclose(with_more.known_share, without.known_share * own / (own + 10_000), rtol=1e-6)


def test_the_total_changes_nothing(family, pancreas):
    """It divides all genes of a cell alike."""
    other = CountMatrix.from_matrix(pancreas.counts, pancreas.gene_ids, totals=pancreas.totals * 3 + 11)
    assert tokens_of(other, family) == tokens_of(pancreas, family)


@pytest.mark.parametrize("values", [1, 50, 1000, 262_144])
def test_the_size_of_chunks_changes_nothing(family, pancreas, monkeypatch, values):
    whole = tokens_of(pancreas, family)
    monkeypatch.setattr(rank, "_CHUNK_VALUES", values)
    assert tokens_of(pancreas, family) == whole


def test_symbols_and_versions_give_the_tokens_of_ensembl_ids(family, data_dir):
    cells = anndata.read_h5ad(data_dir / "pbmc3k_10x.h5ad")[:50]
    by_id = CountMatrix.from_matrix(cells.X, cells.var_names)
    by_version = CountMatrix.from_matrix(
        cells.X, [f"{name}.{number % 20}" for number, name in enumerate(cells.var_names)]
    )
    assert tokens_of(by_version, family) == tokens_of(by_id, family)

    resolver = GeneResolver.default()
    agree = [
        resolver.resolve(symbol)[0] == name and not resolver.resolve(symbol)[1]
        for name, symbol in cells.var["gene_symbol"].items()
    ]
    assert np.mean(agree) > 0.9
    unique = np.array(agree) & ~cells.var["gene_symbol"].duplicated(keep=False).to_numpy()
    by_symbol = CountMatrix.from_matrix(cells.X[:, unique], cells.var["gene_symbol"][unique])
    by_id = CountMatrix.from_matrix(cells.X[:, unique], cells.var_names[unique])
    assert tokens_of(by_symbol, family) == tokens_of(by_id, family)
    assert family.tokenize(by_id).coverage.n_by_symbol == 0
    assert family.tokenize(by_symbol).coverage.n_by_symbol > 13_000


# By hand


def test_a_cell_of_five_genes_by_hand():
    """count / median is 4/2 = 2, 9/3 = 3, 0, 1/0.5 = 2, 5/10 = 0.5: genes 1, then 0 before 3 (a tie), then 4."""
    cells = matrix([4, 9, 0, 1, 5])
    found = toy_family([2, 3, 1, 0.5, 10]).tokenize(cells)
    assert found.arrays["input_ids"].tolist() == [3, 2, 5, 6]
    assert found.arrays["input_ids"].dtype == np.int32
    assert (found.lengths.tolist(), found.n_detected.tolist()) == ([4], [4])
    assert found.known_share.tolist() == [1.0]


def test_columns_of_one_gene_are_added_up():
    """Alone, neither of the two columns of gene 1 (5 and 6 over a median of 2) beats gene 0 (8 over 2)."""
    family = toy_family([2.0, 2.0, 1.0], aliases={"OLD": (gene(1), False)})
    cells = matrix([8, 5, 6, 1], [gene(0), f"{gene(1)}.4", "OLD", gene(2)])
    found = family.tokenize(cells)
    assert found.arrays["input_ids"].tolist() == [3, 2, 4]
    assert found.n_detected.tolist() == [3]
    assert found.coverage.n_merged == 1
    assert found.known_share.tolist() == [1.0]


def test_ties_go_to_the_lower_token_whatever_the_columns():
    family = toy_family([1.5] * 6)
    for order in (range(6), range(5, -1, -1), [3, 0, 5, 1, 4, 2]):
        cells = matrix(np.full((1, 6), 3), [gene(number) for number in order])
        assert tokens_of(cells, family) == [[2, 3, 4, 5, 6, 7]]


def test_ties_between_small_and_large_counts():
    """Counts above the table tie with counts inside it: 64/64 = 1/1 = 32/32 = 33/33."""
    family = toy_family([64.0, 1.0, 33.0, 32.0, 0.5])
    assert tokens_of(matrix([64, 1, 33, 32, 1]), family) == [[6, 2, 3, 4, 5]]
    assert tokens_of(matrix([128, 2, 66, 64, 1]), family) == [[2, 3, 4, 5, 6]]


def test_truncation_keeps_the_best():
    family = toy_family(np.ones(10), max_length=3)
    found = family.tokenize(matrix([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 0, 5, 0, 0, 0, 0, 0, 0, 0]]))
    assert [cell["input_ids"].tolist() for cell in found] == [[11, 10, 9], [4]]
    assert found.lengths.tolist() == [3, 1]
    assert found.n_detected.tolist() == [10, 1]


def test_a_cell_longer_than_the_model(family):
    counts = np.random.default_rng(0).integers(1, 2000, size=(1, 3000))
    cells = matrix(counts, list(GENEFORMER.gene_ids[:3000]))
    found = tokens_of(cells, family)
    assert len(found[0]) == 2048
    assert found == plain_tokens(cells, family)


# The table of small counts, and what lies beyond it


@pytest.mark.parametrize("highest", [1, 32, 33, 40, 1000, MAX_COUNT])
def test_counts_of_any_size(family, highest):
    draw = np.random.default_rng(highest % 1000)
    counts = np.rint(highest ** draw.uniform(0, 1, size=(20, 400))).astype(np.int64)
    counts[:, draw.random(400) < 0.3] = 0
    counts[:, 0] = highest
    cells = matrix(counts, [GENEFORMER.gene_ids[row] for row in draw.choice(25_424, 400, replace=False)])
    assert cells.counts.max() == highest
    assert tokens_of(cells, family) == plain_tokens(cells, family)


def test_thousands_of_huge_counts_behind_one_entry_of_the_table(family, rng):
    """All above 32 / median of any gene: they share one place in the table, and one key."""
    cells = matrix(rng.integers(10**8, MAX_COUNT, size=(20, 400)), list(GENEFORMER.gene_ids[:400]))
    assert tokens_of(cells, family) == plain_tokens(cells, family)
    cut = build({"max_length": 37}, GENEFORMER)
    assert tokens_of(cells, cut) == plain_tokens(cells, cut)


@pytest.mark.parametrize("max_length", [2048, 500])
def test_the_size_of_blocks_changes_nothing(family, pancreas, monkeypatch, max_length):
    alone = build({"max_length": max_length}, GENEFORMER)
    expected = alone.tokenize(pancreas)
    monkeypatch.setattr(rank, "_CHUNK_VALUES", 10_000)
    assert len(row_blocks(pancreas.counts.indptr, 10_000)) > 6
    found = alone.tokenize(pancreas)
    assert [cell["input_ids"].tolist() for cell in found] == plain_tokens(pancreas, alone)
    for name in ("offsets", "known_share", "n_detected"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_the_first_bad_cell_is_named(monkeypatch):
    monkeypatch.setattr(rank, "_CHUNK_VALUES", 2)
    counts = np.ones((40, 3), int)
    counts[[17, 18, 39], :2] = 0
    with pytest.raises(EmptyCellError, match="The cell in row 117 expresses no gene"):
        toy_family([1.0, 2.0]).tokenize(matrix(counts, [gene(0), gene(1), "unknown"], first_row=100))


def test_a_matrix_with_a_table_of_its_own_gives_the_same_tokens(family, data_dir):
    """Large matrices look keys up by column, small ones by gene."""
    panel = read_cells(data_dir / "papalexi2021_eccite_thp1_panel.h5ad", 1000)
    assert panel.counts.nnz > 4 * 33 * panel.n_genes
    whole = tokens_of(panel, family)
    assert whole == plain_tokens(panel, family)
    assert whole[:100] == [tokens_of(panel[cell : cell + 1], family)[0] for cell in range(100)]


def test_merged_columns_may_add_up_beyond_32_bits():
    family = toy_family([2.0, 2.0, 1.0], aliases={"OLD": (gene(1), False)})
    cells = matrix([MAX_COUNT, MAX_COUNT, 1, 5], [gene(0), gene(1), "OLD", gene(2)])
    assert tokens_of(cells, family) == [[3, 2, 4]]


def test_large_counts_of_unknown_genes_are_ignored():
    cells = matrix([3, 1000, 2, 1000], [gene(0), "unknown", gene(1), "unheard of"])
    found = toy_family([1.0, 1.0]).tokenize(cells)
    assert found.arrays["input_ids"].tolist() == [2, 3]
    assert found.known_share[0] == pytest.approx(5 / 2005)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_cells_over_any_medians(data):
    """Medians and counts are powers of two times small numbers: exact ties everywhere, on both sides of the table."""
    n_genes = data.draw(st.integers(1, 8))
    median = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 32.0, 48.0])
    medians = data.draw(st.lists(median, min_size=n_genes, max_size=n_genes))
    count = st.sampled_from([0, 0, 1, 2, 3, 16, 31, 32, 33, 48, 64, 96, 1024, 2**20, 2**30])
    cell = st.lists(count, min_size=n_genes, max_size=n_genes).filter(any)
    counts = np.array(data.draw(st.lists(cell, min_size=1, max_size=4)))
    family = toy_family(medians, max_length=data.draw(st.integers(1, 10)))
    # A total of 1 keeps the reference's arithmetic exact, so that its ties are true ties.
    expected = [
        geneformer_tokens(row, 1, np.array(medians), family.vocabulary.tokens, family.max_length) for row in counts
    ]
    assert tokens_of(matrix(counts), family) == expected


def test_tokens_need_not_be_consecutive_with_genes():
    """Special tokens may sit anywhere: the token of a gene is looked up, not computed."""
    vocabulary = GeneVocabulary(
        (gene(0), gene(1), gene(2)), np.array([0, 2, 4], np.int32), np.ones(3), {"<pad>": 3, "<mask>": 1}, "a test"
    )
    family = build({}, vocabulary)
    assert tokens_of(matrix([1, 2, 3]), family) == [[4, 2, 0]]
    assert family.inputs[0].pad_value == 3


# Special tokens at the ends


def framed_vocabulary(n_genes: int = 5) -> GeneVocabulary:
    """Genes 0, 1, 2, ... have the tokens 4, 5, 6, ..., and the median 1."""
    special = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    genes = tuple(gene(number) for number in range(n_genes))
    return GeneVocabulary(genes, np.arange(4, n_genes + 4, dtype=np.int32), np.ones(n_genes), special, "a test")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"start": "<cls>", "end": "<eos>"}, [[2, 8, 7, 3], [2, 6, 3]]),
        ({"start": "<cls>"}, [[2, 8, 7, 6], [2, 6]]),
        ({"end": "<eos>"}, [[8, 7, 6, 3], [6, 3]]),
        ({}, [[8, 7, 6, 5], [6]]),
    ],
    ids=["both", "start", "end", "none"],
)
def test_special_tokens_at_the_ends_count_in_the_length(options, wanted):
    family = build({"max_length": 4, **options}, framed_vocabulary())
    cells = matrix([[1, 2, 3, 4, 5], [0, 0, 5, 0, 0]])
    tokens = family.tokenize(cells)
    assert [cell["input_ids"].tolist() for cell in tokens] == wanted
    assert tokens.n_detected.tolist() == [5, 1]
    assert family.bound(cells).tolist() == tokens.lengths.tolist()
    genes = [[token - 4 if token > 3 else -1 for token in cell] for cell in wanted]
    assert family.gene_rows(tokens).tolist() == [row for cell in genes for row in cell]


@pytest.mark.parametrize("max_length", [4096, 300])
def test_special_tokens_leave_the_genes_as_they_are(pancreas, monkeypatch, max_length):
    framed = build({**VERSION_2, "max_length": max_length}, GENEFORMER_2)
    plain = build({"max_length": max_length - 2}, GENEFORMER_2)
    monkeypatch.setattr(rank, "_CHUNK_VALUES", 10_000)
    assert [ids[1:-1] for ids in tokens_of(pancreas, framed)] == tokens_of(pancreas, plain)


def test_special_tokens_that_cannot_be():
    with pytest.raises(VocabularyMismatchError, match=r"start is '<cls>', but the .* are <pad>, <mask>\. Give the"):
        build({"start": "<cls>"}, GENEFORMER)
    with pytest.raises(VocabularyMismatchError, match=r"end is \['<eos>'\]"):
        build({"end": ["<eos>"]}, GENEFORMER_2)
    with pytest.raises(CorruptBundleError, match="max_length is 2, which leaves no room for a gene beside 2 special"):
        build({**VERSION_2, "max_length": 2}, GENEFORMER_2)


# What is refused


def test_no_known_gene(family):
    with pytest.raises(
        UnknownGenesError, match=r"None of the 2 genes .*unknown: Xist_mouse, Actb_mouse.*gene_key"
    ) as caught:
        family.tokenize(matrix([1, 2], ["Xist_mouse", "Actb_mouse"]))
    assert caught.value.field == "gene_ids"


@pytest.mark.parametrize("values", [1, 3, 262_144], ids=["chunk of a row", "chunk of rows", "one chunk"])
def test_a_cell_without_a_known_gene_is_named(monkeypatch, values):
    monkeypatch.setattr(rank, "_CHUNK_VALUES", values)
    counts = np.ones((9, 3), int)
    counts[6, :2] = 0
    cells = matrix(counts, [gene(0), gene(1), "unknown"], first_row=50)
    with pytest.raises(EmptyCellError, match="The cell in row 56 expresses no gene"):
        toy_family([1.0, 2.0]).tokenize(cells)
    with pytest.raises(EmptyCellError, match="row 56 "):
        toy_family([1.0, 2.0]).tokenize(cells[5:])


def test_options_that_do_not_exist():
    with pytest.raises(UnsupportedBundleError, match="no option 'colour'"):
        build({"colour": "red"}, GENEFORMER)


@pytest.mark.parametrize("length", [0, -1, 2.5, "long"])
def test_a_maximum_length_that_cannot_be(length):
    with pytest.raises(CorruptBundleError, match="max_length"):
        build({"max_length": length}, GENEFORMER)


def test_the_input_is_left_alone(family, pancreas):
    before = pancreas.counts.copy()
    family.tokenize(pancreas)
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(pancreas.counts, name), getattr(before, name))

"""Vocabulary, resolver, and the report of what became of the genes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope.cells.genes import GeneCoverage, GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import CorruptBundleError, MalformedMatrixError

CD3D, CD4, ACTB = "ENSG00000167286", "ENSG00000010610", "ENSG00000075624"


def vocabulary(genes=(CD3D, CD4, ACTB), tokens=(2, 3, 4), medians=(2.0, 1.5, 9.0), special=None, source="a test"):
    special = {"<pad>": 0, "<mask>": 1} if special is None else special
    return GeneVocabulary(tuple(genes), np.array(tokens, np.int32), np.array(medians), special, source)


# The published vocabulary


def test_geneformer_gc30m_is_the_published_one():
    published = GeneVocabulary.geneformer_gc30m()
    assert len(published) == 25_426
    assert len(published.gene_ids) == 25_424
    assert published.special_tokens == {"<pad>": 0, "<mask>": 1}
    assert (published.tokens == np.arange(2, 25_426)).all()
    assert published.medians.min() == pytest.approx(0.095, abs=5e-4)
    assert published.medians.max() == pytest.approx(634, abs=0.5)
    assert float(np.median(published.medians)) == pytest.approx(2.73, abs=5e-3)
    assert CD4 in published
    assert published.hash == GeneVocabulary.geneformer_gc30m().hash
    assert "Theodoris" in published.source or "Geneformer" in published.source


def test_geneformer_gc95m_is_the_published_one():
    published = GeneVocabulary.geneformer_gc95m()
    assert len(published) == 20_275
    assert len(published.gene_ids) == 20_271
    assert published.special_tokens == {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    assert (published.tokens == np.arange(4, 20_275)).all()
    assert list(published.gene_ids) == sorted(published.gene_ids)
    assert published.medians[published.row("ENSG00000121410")] == 1.7629378614450941
    assert len(published.retired) == 3_423
    assert published.gene_ids[published.row("ENSG00000117289")] == "ENSG00000265972"  # TXNIP
    assert GeneVocabulary.named("geneformer_gc95m") is published
    assert GeneVocabulary.named("geneformer_gc30m") is GeneVocabulary.geneformer_gc30m()
    assert GeneVocabulary.named("geneformer") is None


# Reading and writing


def test_retired_ids_find_their_successor_and_survive_as_text():
    old = "ENSG00000999999"
    original = replace(vocabulary(), retired={old: CD4})
    assert original.hash != vocabulary().hash
    read = GeneVocabulary.from_tsv(original.to_tsv())
    assert (read.hash, read.retired, read.row(old)) == (original.hash, {old: CD4}, 1)
    mapping = GeneResolver({}).map([old, CD4, f"{old}.3"], read)
    assert mapping.rows.tolist() == [1, 1, 1]
    assert (mapping.coverage.n_merged, mapping.coverage.n_by_symbol) == (2, 0)


def test_text_round_trip():
    original = vocabulary(medians=(1 / 3, 1.5, 9e-7))
    read = GeneVocabulary.from_tsv(original.to_tsv())
    assert read.gene_ids == original.gene_ids
    np.testing.assert_array_equal(read.tokens, original.tokens)
    np.testing.assert_array_equal(read.medians, original.medians)
    assert (read.special_tokens, read.source, read.hash) == (original.special_tokens, "a test", original.hash)


@given(st.lists(st.floats(min_value=1e-300, max_value=1e300), min_size=1, max_size=20))
def test_medians_survive_as_text_to_the_last_bit(medians):
    genes = [f"ENSG{number:011d}" for number in range(len(medians))]
    original = vocabulary(genes, range(2, len(medians) + 2), medians)
    assert GeneVocabulary.from_tsv(original.to_tsv()).medians.tolist() == original.medians.tolist()


@pytest.mark.parametrize("name", ["vocabulary.tsv", "vocabulary.tsv.gz"])
def test_files_plain_or_gzipped(tmp_path, name):
    text = vocabulary().to_tsv().encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert GeneVocabulary.read(tmp_path / name).hash == vocabulary().hash


def test_the_hash_names_content_not_source():
    assert vocabulary().hash == vocabulary(source="elsewhere").hash
    others = [
        vocabulary(medians=(2.0, 1.5, 9.000001)),
        vocabulary(genes=(CD4, CD3D, ACTB)),
        vocabulary(special={"<pad>": 1, "<mask>": 0}),
        vocabulary(genes=(CD3D, CD4), tokens=(2, 3), medians=(2.0, 1.5)),
    ]
    assert len({vocabulary().hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    "line",
    ["5\tENSG00000000003", "five\tENSG00000000003\t1.0", "5\tENSG00000000003\t1.0\tx", "5\tENSG00000000003\thigh"],
)
def test_a_line_that_does_not_parse_is_named(line):
    with pytest.raises(CorruptBundleError, match="Line 8 of the gene vocabulary is"):
        GeneVocabulary.from_tsv(vocabulary().to_tsv() + line + "\n")


NO_GENES = ["<cls>", "<eos>", " <pad>", "[CLS]", "[SEP]", "<|endoftext|>", "cls", "PAD", "mask_token", "<unk>", "", " "]
"""Names of special tokens in the vocabularies of cells and of language."""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": (2, 3)}, "differ in number"),
        ({"genes": (), "tokens": (), "medians": ()}, "has no genes"),
        ({"genes": (CD3D, CD4, CD3D)}, "stands in it twice"),
        ({"tokens": (2, 4, 3)}, "not ascending"),
        ({"tokens": (2, 3, 5)}, "without gaps"),
        ({"tokens": (1, 2, 3)}, "without gaps"),
        ({"medians": (2.0, 0.0, 9.0)}, f"median of {CD4} is 0.0"),
        ({"medians": (2.0, 1.5, np.nan)}, f"median of {ACTB} is nan"),
        ({"medians": (np.inf, 1.5, 1.0)}, f"median of {CD3D} is inf"),
        ({"special": {"<pad>": 0}}, "<mask> is missing"),
        ({"special": {}}, "<mask> is missing"),
        *(({"genes": (CD3D, name, ACTB)}, "is the name of a special token") for name in NO_GENES),
        ({"genes": (CD3D, "<mask>", ACTB)}, "'<mask>' stands among the genes"),
        ({"special": {"<pad>": 0, "<mask>": 1, CD4: 2}, "genes": (CD3D, ACTB)}, "differ in number"),
        ({"special": {"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}, "tokens": (3, 4, 5)}, "has no median"),
    ],
)
def test_a_table_that_is_no_vocabulary(change, says):
    with pytest.raises(CorruptBundleError, match=says):
        vocabulary(**change)


@pytest.mark.parametrize(
    ("retired", "says"),
    [
        ({"ENSG00000999999": "ENSG00000888888"}, "a retired id became ENSG00000888888, which is not in it"),
        ({CD3D: CD4}, f"{CD3D} is retired, and a gene of it"),
    ],
)
def test_retired_ids_that_cannot_be(retired, says):
    with pytest.raises(CorruptBundleError, match=says):
        replace(vocabulary(), retired=retired)
    with pytest.raises(CorruptBundleError, match="a retired id became the token 9, which"):
        GeneVocabulary.from_tsv(vocabulary().to_tsv() + "9\tENSG00000999999\tretired\n")


def test_rows_of_genes():
    assert [vocabulary().row(gene) for gene in (ACTB, CD3D, "ENSG00000000001")] == [2, 0, -1]
    assert ACTB in vocabulary()
    assert "ACTB" not in vocabulary()


# The resolver


@pytest.mark.parametrize(
    ("identifier", "gene"),
    [
        (CD4, CD4),
        (f"{CD4}.12", CD4),
        (f"{CD4}.12_PAR_Y", CD4),
        ("CD4", CD4),
        ("CD3D", CD3D),
        ("ACTB", ACTB),
        ("MLL2", "ENSG00000167548"),  # previous symbol of KMT2D
        ("ENSMUSG00000023274", "ENSMUSG00000023274"),
    ],
)
def test_identifiers_resolve(identifier, gene):
    assert GeneResolver.default().resolve(identifier)[0] == gene


@pytest.mark.parametrize("identifier", ["", "no such gene", "ENSG123", "ENST00000011653", f"x{CD4}", f"{CD4}.x"])
def test_identifiers_that_name_no_gene(identifier):
    assert GeneResolver.default().resolve(identifier) == (None, False)


# Mapping columns


ALIASES = {
    "CD3D": (CD3D, False),
    "T3D": (CD3D, False),
    "CD4": (CD4, False),
    "SHARED": (CD4, True),
    "ALSO": (ACTB, True),
    "OLD": ("ENSG00000000001", False),
}


def mapping(*gene_ids):
    return GeneResolver(ALIASES).map(gene_ids, vocabulary())


def test_versions_symbols_and_strangers():
    found = mapping(f"{ACTB}.3", "T3D", "nobody", CD4, "OLD")
    assert found.rows.tolist() == [2, 0, -1, 1, -1]
    assert found.coverage == GeneCoverage(n_genes=5, n_matched=3, n_by_symbol=1, unmatched=("nobody", "OLD"))
    assert found.coverage.share == 0.6


def test_columns_of_one_gene_are_kept_and_counted():
    found = mapping(CD3D, "CD3D", "T3D", CD4)
    assert found.rows.tolist() == [0, 0, 0, 1]
    assert (found.coverage.n_matched, found.coverage.n_by_symbol, found.coverage.n_merged) == (4, 2, 2)


def test_an_ambiguous_alias_is_reported():
    found = mapping("SHARED", "CD3D")
    assert found.rows.tolist() == [1, 0]
    assert found.coverage.n_ambiguous == 1
    assert found.coverage.ambiguous == (("SHARED", CD4),)


@pytest.mark.parametrize("plain", [CD4, f"{CD4}.7", "CD4"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_gene_that_is_spelt_out_beats_an_ambiguous_alias(plain, order):
    found = mapping(*("SHARED", plain, "ALSO")[::order])
    assert found.rows.tolist()[::order] == [-1, 1, 2]
    assert found.coverage.n_matched == 2
    assert found.coverage.n_merged == 0
    assert found.coverage.ambiguous == (("ALSO", ACTB),)
    assert found.coverage.unmatched == ("SHARED",)
    assert found.coverage.n_by_symbol == 1 + (plain == "CD4")


def test_long_lists_are_cut_but_counted():
    found = mapping(*(f"x{number}" for number in range(25)), "CD4")
    assert found.coverage.unmatched == tuple(f"x{number}" for number in range(10))
    assert (found.coverage.n_genes, found.coverage.n_matched) == (26, 1)


def test_a_matrix_without_columns():
    with pytest.raises(MalformedMatrixError, match="no columns"):
        mapping()


@given(st.permutations(["CD3D", "T3D", f"{CD4}.1", "SHARED", "ALSO", "nobody", ACTB]))
def test_the_order_of_columns_does_not_matter(gene_ids):
    found = mapping(*gene_ids)
    assert dict(zip(gene_ids, found.rows.tolist(), strict=True)) == {
        "CD3D": 0,
        "T3D": 0,
        f"{CD4}.1": 1,
        "SHARED": -1,
        "ALSO": -1,
        "nobody": -1,
        ACTB: 2,
    }


def test_coverage_survives_json():
    coverage = mapping("SHARED", "CD3D", "T3D", "nobody").coverage
    assert GeneCoverage.from_dict(json.loads(json.dumps(coverage.to_dict()))) == coverage


def test_coverage_of_nothing():
    assert GeneCoverage(n_genes=0, n_matched=0).share == 0.0

"""Names of genes as files have them: resolved where that is certain, called what they are where it is not."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.gene_names import explained, kind_of
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.readers import open_cells
from perturbscope.errors import DuplicateGenesError, EmptyCellError, UnknownGenesError
from perturbscope.inference.embedder import Embedder
from perturbscope.tasks.screen import opened
from tests.screens import make_screen

STAT1, HLA_DRA, C1ORF112 = "ENSG00000115415", "ENSG00000204287", "ENSG00000000460"
RESOLVER = GeneResolver.default()


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        ("ENSG00000115415.18", STAT1),
        ("ENSG00000115415.18_7", STAT1),
        ("ENSG00000115415_2", STAT1),
        ("ensg00000115415", STAT1),
        ("ENSG00000228572.7_PAR_Y", "ENSG00000228572"),
        ("ENSGR0000228572", "ENSG00000228572"),
        ("GRCh38_ENSG00000115415", STAT1),
        ("GRCh38_______STAT1", STAT1),
        ("GRCh38-STAT1", STAT1),
        ("hg19_STAT1", STAT1),
        ("hg19_ENSG00000115415.5_2", STAT1),
        ("STAT1_ENSG00000115415", STAT1),
        ("ENSG00000115415_STAT1", STAT1),
        ("ENSG00000115415.18|STAT1", STAT1),
        ("STAT1|ENSG00000115415", STAT1),
        ("STAT1 (ENSG00000115415)", STAT1),
        (" STAT1 ", STAT1),
        ("STAT1\u00a0", STAT1),
        ("HLA.DRA", HLA_DRA),
        ("NKX2.1", RESOLVER.resolve("NKX2-1")[0]),
        ("MT.CO1", RESOLVER.resolve("MT-CO1")[0]),
        ("C1ORF112", C1ORF112),
        ("2-Sep", RESOLVER.resolve("SEPTIN2")[0]),
        ("Sep-02", RESOLVER.resolve("SEPTIN2")[0]),
        ("15-Sep", RESOLVER.resolve("SELENOF")[0]),
        ("3-Mar", RESOLVER.resolve("MARCHF3")[0]),
        ("2023-03-05 00:00:00", RESOLVER.resolve("MARCHF5")[0]),
    ],
)
def test_certain_names_are_resolved(name: str, gene: str) -> None:
    assert gene is not None
    assert RESOLVER.resolve(name) == (gene, False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("1-Mar", "dates of a spreadsheet"),
        ("Mar-01", "dates of a spreadsheet"),
        ("2-Mar", "dates of a spreadsheet"),
        ("1-Dec", "dates of a spreadsheet"),
        ("43526", "numbers (Entrez ids, or dates of a spreadsheet)"),
        ("STAT1.1", None),
        ("STAT1-1", None),
        ("stat1", "symbols in lower case"),
        ("Stat1", "genes of mouse"),
        ("Actb", "genes of mouse"),
        ("mt-Nd1", "genes of mouse"),
        ("mm10___Stat1", "genes of mouse"),
        ("GRCm38_STAT1", "genes of mouse"),
        ("ENSMUSG00000026104", "genes of mouse"),
        ("ENSRNOG00000014079", "genes of rat"),
        ("ENSDARG00000006266", "genes of zebrafish"),
        ("ENSXXXG00000006266", "genes of another species"),
        ("ENST00000361099", "transcripts (ENST)"),
        ("200887_s_at", "probes of an array"),
        ("chr2:190964358-191020960", "regions of the genome"),
        ("ENSG00000115415_ENSG00000204287", None),
        ("no-such", "symbols in lower case"),
    ],
)
def test_uncertain_names_are_not_resolved_but_called_what_they_are(name: str, kind: str | None) -> None:
    assert RESOLVER.resolve(name)[0] in (None, name)
    assert kind_of(name) == kind


def test_other_names_explain_themselves_only_where_they_are_many() -> None:
    assert "mouse?" in explained(["Actb", "Gapdh", "Stat1", "X"])
    assert explained(["Actb", *["NOVEL"] * 30]) == ""
    assert explained([]) == ""


@pytest.mark.parametrize("style", ["symbols", "ids", "some known"])
def test_a_mouse_panel_is_told_before_its_cells_are_judged(style: str, fake_embedder: Embedder) -> None:
    vocabulary = fake_embedder.family.vocabulary.gene_ids
    names = [f"ENSMUSG{i:011d}" for i in range(40)] if style == "ids" else [f"Abc{'de'[i % 2]}{i}" for i in range(40)]
    if style == "some known":
        names[:6] = vocabulary[:6]
    counts = np.ones((5, 40), dtype=np.int32)
    counts[2, :6] = 0
    with pytest.raises(UnknownGenesError, match=r"mouse\?"):
        fake_embedder.embed(CountMatrix.from_matrix(counts, names))


def test_cells_without_a_known_gene_are_all_named(fake_embedder: Embedder) -> None:
    names = [*fake_embedder.family.vocabulary.gene_ids[:20], "NOVEL1"]
    counts = np.ones((30, 21), dtype=np.int32)
    counts[[3, *range(10, 25)], :20] = 0
    with pytest.raises(EmptyCellError, match=r"^16 cells \(rows 3, 10, 11, .* and 6 more\) express no gene"):
        fake_embedder.embed(CountMatrix.from_matrix(counts, names))


def test_symbols_of_several_columns_lead_to_the_column_of_ids(tmp_path: Path) -> None:
    screen = make_screen()
    screen.var_names = pd.Index(["LYZ", "LYZ", *screen.var_names[2:]])
    with warnings.catch_warnings(action="ignore"):
        screen.write_h5ad(tmp_path / "twice.h5ad")
    for source in (tmp_path / "twice.h5ad", screen):
        with pytest.raises(DuplicateGenesError) as caught, opened(source) as cells:
            cells.read()
        assert "'LYZ'" in caught.value.message
        assert "--gene-key ensembl" in caught.value.message
        assert "np.str_" not in caught.value.message
        assert "make_unique" not in caught.value.message
    with open_cells(tmp_path / "twice.h5ad", gene_key="ensembl") as cells:
        assert cells.read().n_genes == 40


@pytest.mark.parametrize(("n_ids", "n_matched"), [(1, 3), (5, 6)])
def test_symbols_among_ids_are_taken_as_they_are_spelled(n_ids: int, n_matched: int, fake_embedder: Embedder) -> None:
    vocabulary = fake_embedder.family.vocabulary
    names = [*vocabulary.gene_ids[:n_ids], "HLA.DRA", "GRCh38_ENSG00000115415"]
    assert RESOLVER.map(names, vocabulary).coverage.n_matched == n_matched

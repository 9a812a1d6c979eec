"""Values beside the cell embedding: by cell, by gene, and as classes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference import embeddings
from perturbscope.inference.embeddings import GeneSums, OutputValues, join_outputs
from tests.bundles import CLASSES

SPEC = OutputSpec(name="gene_embedding", per="token", width=2, meaning="embedding")
LOGITS = OutputSpec(name="cell_logits", per="cell", width=3, meaning="logits", names=CLASSES)


def vectors(cells: list[list[str]], names: tuple[str, ...], *, add: float = 0.0) -> OutputValues:
    """Vectors of the genes of cells; that of gene number n in cell c is [n, c + add]."""
    number = {"a": 0, "b": 1, "c": 2, "d": 3}
    rows = [(number[gene], cell + add) for cell, genes in enumerate(cells) for gene in genes]
    return OutputValues(
        SPEC,
        np.array(rows, dtype=np.float32).reshape(-1, 2),
        np.concatenate([[0], np.cumsum([len(genes) for genes in cells])]).astype(np.int64),
        np.array([names.index(gene) for genes in cells for gene in genes], dtype=np.int32),
        names,
    )


def test_means_of_genes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_SUMMED", 2)
    table = vectors([["c", "a"], ["a"], ["c", "a"]], ("a", "b", "c")).gene_means()
    assert table.columns.tolist() == ["n_cells", "0", "1"]
    assert table.index.name == "gene_id"
    assert table.loc["a"].tolist() == [3, 0, 1]
    assert table.loc["c"].tolist() == [2, 2, 1]
    assert table.index.tolist() == ["a", "c"]  # no cell has b
    assert table.dtypes.tolist() == [np.int64, np.float32, np.float32]


def test_chunks_with_other_lists_of_genes_add_up() -> None:
    """Each answer of a server may name only the genes of its own cells."""
    parts = [
        vectors([["c", "a"], ["a"]], ("a", "b", "c")),
        vectors([["d"], ["a", "c"]], ("d", "c", "a"), add=2),
        vectors([["b", "d"]], ("d", "b"), add=4),
    ]
    sums = GeneSums()
    for part in parts:
        sums.add(part)
    whole = join_outputs(parts)
    assert [whole.genes_of(cell).tolist() for cell in range(5)] == [["c", "a"], ["a"], ["d"], ["a", "c"], ["b", "d"]]
    assert whole.cells.tolist() == [0, 0, 1, 2, 3, 3, 4, 4]
    pd.testing.assert_frame_equal(sums.table().sort_index(), whole.gene_means().sort_index())
    assert sums.table().loc["d"].tolist() == [2, 3, 3]


def test_the_best_class_has_the_probability_of_the_softmax() -> None:
    logits = OutputValues(LOGITS, np.array([[1, 3, 2], [900, 0, -900], [0, 0, 0]], dtype=np.float32))
    names, probabilities = logits.classes()
    assert names.tolist() == [CLASSES[1], CLASSES[0], CLASSES[0]]
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, [np.exp(3) / np.exp([1, 2, 3]).sum(), 1, 1 / 3], rtol=1e-6)
    unnamed = OutputSpec(name="cell_logits", per="cell", width=3, meaning="logits")
    assert OutputValues(unnamed, logits.values).classes()[0].tolist() == ["1", "0", "0"]


def test_what_an_output_does_not_have() -> None:
    logits = OutputValues(LOGITS, np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(InvalidParameterError, match="'cell_logits' has one row a cell, and no genes"):
        logits.gene_means()
    with pytest.raises(InvalidParameterError, match="'gene_embedding' has no classes: it is embedding"):
        vectors([["a"]], ("a",)).classes()

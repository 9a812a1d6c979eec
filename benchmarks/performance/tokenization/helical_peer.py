"""Cells per second of helical's Geneformer tokenizer, run in an environment of its own.

    PYTHON benchmarks/performance/tokenization/helical_peer.py INPUT.npz OUTPUT.npz [REPEATS]

INPUT holds a CSR matrix (`data`, `indices`, `indptr`), `genes` (Ensembl ids of its columns) and a vocabulary
(`vocabulary`, `tokens`, `medians`). OUTPUT gets `seconds` of each turn, the tokens and their `offsets`. Nothing of
PerturbScope is imported.
"""

from __future__ import annotations

import importlib.metadata
import logging
import pickle
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from helical.models.geneformer.geneformer_tokenizer import TranscriptomeTokenizer
from scipy import sparse


def main(source: str, target: str, repeats: int) -> None:
    """Tokenize the cells `repeats` times after one turn that does not count."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    given = np.load(source)
    shape = (len(given["indptr"]) - 1, len(given["genes"]))
    matrix = sparse.csr_matrix((given["data"], given["indices"], given["indptr"]), shape=shape)
    genes = given["genes"].tolist()
    cells = anndata.AnnData(matrix, var=pd.DataFrame({"ensembl_id": genes}, index=[f"g{i}" for i in range(len(genes))]))
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in ("tokens", "medians"):
            files[name] = Path(folder) / name
            with files[name].open("wb") as file:
                pickle.dump(dict(zip(given["vocabulary"].tolist(), given[name].tolist(), strict=True)), file)
        tokenizer = TranscriptomeTokenizer(
            gene_median_file=files["medians"], token_dictionary_file=files["tokens"], gene_mapping_file=None
        )
    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        tokens, _metadata = tokenizer.tokenize_anndata(cells)
        seconds.append(time.process_time() - started)
    tokens = [cell[:2048] for cell in tokens]
    np.savez(
        target,
        seconds=seconds[1:],
        tokens=np.concatenate(tokens),
        offsets=np.cumsum([0, *map(len, tokens)]),
        version=importlib.metadata.version("helical"),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3)

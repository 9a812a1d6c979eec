"""Hooks of schemathesis: bodies that are not JSON are good ones, cut ones and random bytes."""

from __future__ import annotations

import io

import h5py
import numpy as np
import schemathesis
from hypothesis import strategies as st

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.scoring.results import ScoreOptions

_GENES = GeneVocabulary.geneformer_gc30m().gene_ids[:20]
_COUNTS = np.random.default_rng(0).poisson(2.0, size=(8, 20)) + 1
_LABELS = ("control",) * 4 + ("STAT1",) * 4


def _arrow() -> list[bytes]:
    cells = CountMatrix.from_matrix(_COUNTS, _GENES)
    options = ScoreOptions(min_cells=4, permutations=19)
    score = protocol.ScoreRequest(cells=cells, perturbations=_LABELS, control="control", options=options)
    compare = protocol.CompareRequest(cells=cells, perturbations=_LABELS, options=options)
    return [
        protocol.request_to_arrow(protocol.EmbedRequest(cells=cells)),
        protocol.request_to_arrow(score),
        protocol.request_to_arrow(compare),
    ]


def _h5ad() -> list[bytes]:
    """Write the smallest readable file: dense counts, names of cells and genes, one column of labels."""
    text = h5py.string_dtype()
    body = io.BytesIO()
    with h5py.File(body, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        file["X"] = _COUNTS.astype(np.float32)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for name, columns in (("obs", {"perturbation": list(_LABELS)}), ("var", {})):
            group = file.create_group(name)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            group.attrs["column-order"] = np.array(list(columns), dtype=text)
            index = _GENES if name == "var" else [f"cell{i}" for i in range(len(_LABELS))]
            for column, values in {"_index": index, **columns}.items():
                group.create_dataset(column, data=np.array(values, dtype=text), dtype=text)
                group[column].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    return [body.getvalue()]


def _bodies(good: list[bytes]) -> st.SearchStrategy[bytes]:
    whole = st.sampled_from(good)
    cut = st.builds(lambda body, share: body[: int(len(body) * share)], whole, st.floats(0, 1))
    return st.one_of(whole, cut, st.binary(max_size=200))


schemathesis.openapi.media_type(protocol.ARROW, _bodies(_arrow()))
schemathesis.openapi.media_type(protocol.HDF5, _bodies(_h5ad()))


@schemathesis.hook
def filter_case(_: object, case: schemathesis.Case) -> bool:
    """Send no Arrow stream where the answer begins before the body has ended.

    What is wrong with a later part of it is said in the answer, which then breaks off without its end, so that nobody
    takes it for whole. Schemathesis calls that a broken connection.
    """
    body = case.body if isinstance(case.body, bytes) else b""
    return case.operation.path != "/v1/embed/stream" or not body.startswith(b"\xff\xff\xff\xff")

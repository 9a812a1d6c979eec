"""Parity: the exported graph against the torch model, and each variant against the exported graph.

Shapes: B cells in the batch, L tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from transformers import BertForMaskedLM

from export import ParityError
from export.graph import INPUTS
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.outputs import CELL_EMBEDDING

LENGTHS = (1, 7, 64)
"""Lengths, besides the longest, that are compared."""
BATCHES = (1, 3)
"""Batch sizes that are compared."""

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids and attention mask, both [B, L], padded on the right."""
Advance = Callable[[], None]
"""Called after each case."""


class Runner(Protocol):
    """A function that embeds a batch; float32 [B, H]."""

    def __call__(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], /) -> NDArray[np.float32]:
        """Embed one batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """Comparison of one batch.

    Attributes
    ----------
    batch, length
        Padded shape of the batch; the first cell has `length` tokens, the others at most as many.
    max_abs_difference
        Largest absolute difference over all values.
    lowest_cosine
        Lowest cosine over all cells.
    """

    batch: int
    length: int
    max_abs_difference: float
    lowest_cosine: float


def graph_runner(graph: ModelProto) -> Runner:
    """Return a function that runs a graph in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], /) -> NDArray[np.float32]:
        (output,) = session.run([CELL_EMBEDDING], dict(zip(INPUTS, (input_ids, attention_mask), strict=True)))
        return np.asarray(output, dtype=np.float32)

    return run


def torch_runner(model: BertForMaskedLM) -> Runner:
    """Return a function that embeds by definition: the mean over tokens of ``hidden_states[-2]`` of the whole model.

    It shares no code with the exported module, so it also shows that leaving the last block out changes nothing.
    """

    @torch.inference_mode()
    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], /) -> NDArray[np.float32]:
        output = model.bert(
            input_ids=torch.tensor(input_ids),
            attention_mask=torch.tensor(attention_mask),
            output_hidden_states=True,
        )
        states_BLH = output.hidden_states[-2].numpy().astype(np.float64)
        pooled = [states[mask > 0].mean(axis=0) for states, mask in zip(states_BLH, attention_mask, strict=True)]
        return np.stack(pooled).astype(np.float32)

    return run


def random_cells(
    vocabulary: GeneVocabulary, lengths: Sequence[int], *, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Make cells of the given lengths, of genes in random order, each once unless there are too few genes."""
    genes = vocabulary.tokens.astype(np.int64)
    return [rng.choice(genes, size=length, replace=length > len(genes)) for length in lengths]


def pad_right(cells: Sequence[NDArray[np.int64]], pad_token: int) -> Batch:
    """Pad token sequences on the right to one batch."""
    lengths = np.array([len(cell) for cell in cells])
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(mask.shape, pad_token, dtype=np.int64)
    ids[mask > 0] = np.concatenate(cells)
    return ids, mask


def parity_batches(vocabulary: GeneVocabulary, max_length: int, *, seed: int = 0) -> Iterator[Batch]:
    """Yield batches of :data:`BATCHES` cells at :data:`LENGTHS` and `max_length`, the length of their first cell."""
    rng = np.random.default_rng(seed)
    pad_token = vocabulary.special_tokens["<pad>"]
    for longest in sorted({*(length for length in LENGTHS if length < max_length), max_length}):
        for batch in BATCHES:
            lengths = [longest, *rng.integers(1, longest, size=batch - 1, endpoint=True).tolist()]
            yield pad_right(random_cells(vocabulary, lengths, rng=rng), pad_token)


def check_parity(
    reference: Runner, exported: Runner, batches: Iterator[Batch], *, tolerance: float, advance: Advance | None = None
) -> dict[str, Any]:
    """Compare two ways to embed, batch by batch.

    Returns
    -------
    Facts for the manifest: tolerance, largest absolute difference, lowest cosine, and the cases.

    Raises
    ------
    ParityError
        A difference is above `tolerance`, or is not a number.
    """
    cases = []
    for ids, mask in batches:
        expected, values = reference(ids, mask), exported(ids, mask)
        case = ParityCase(
            batch=ids.shape[0],
            length=ids.shape[1],
            max_abs_difference=float(np.abs(expected - values).max()),
            lowest_cosine=float(cosines(expected, values).min()),
        )
        if not case.max_abs_difference <= tolerance:
            raise ParityError(
                f"A batch of {case.batch} x {case.length} tokens differs by {case.max_abs_difference:.3g} between "
                f"torch and ONNX Runtime; the tolerance is {tolerance:.3g}. Nothing was written."
            )
        cases.append(case)
        if advance:
            advance()
    return {
        "tolerance": tolerance,
        "max_abs_difference": max(case.max_abs_difference for case in cases),
        "lowest_cosine": min(case.lowest_cosine for case in cases),
        "cases": [asdict(case) for case in cases],
    }


def compare_variant(
    name: str,
    fp32: NDArray[np.float32],
    variant: NDArray[np.float32],
    *,
    min_cosine: float,
) -> dict[str, float]:
    """Compare the embeddings of a variant with those of the float32 graph, cell by cell.

    Cells resemble each other, so the cosine of two raw vectors is near 1 even if the differences between cells are
    lost; for `mean_centred_cosine` the mean float32 vector is subtracted from both.

    Raises
    ------
    ParityError
        A cosine is below `min_cosine`, or is not a number.
    """
    raw = cosines(fp32, variant)
    centre = fp32.mean(axis=0)
    measured = {
        "lowest_cosine": float(raw.min()),
        "mean_cosine": float(raw.mean()),
        "mean_centred_cosine": float(cosines(fp32 - centre, variant - centre).mean()),
        "max_abs_difference": float(np.abs(fp32 - variant).max()),
    }
    if not measured["lowest_cosine"] >= min_cosine:
        raise ParityError(
            f"A cell of the variant {name} has the cosine {measured['lowest_cosine']:.5f} to float32; "
            f"{min_cosine:g} is the least allowed. Export without this variant. Nothing was written."
        )
    return measured


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` with the same row of `right`, at most 1; float64 [n]."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    # Infinite values give NaN, which no tolerance accepts.
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        values: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.minimum(values, 1.0)

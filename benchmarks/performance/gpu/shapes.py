"""Few shapes: the cost of padding to a ladder of lengths, on cells of real data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.embedding.models import FILES, paper_weights, tokens
from benchmarks.performance.harness import Options, table
from perturbscope.inference.batching import BatchLimits, Buckets, form_batches
from perturbscope.inference.gpu import MAX_TOKENS
from training.measure.flops import ModelSize, cell_cost

LADDERS: dict[str, Buckets | None] = {
    "longest cell": None,
    "eight lengths an octave (used)": Buckets(),
    "four lengths an octave": Buckets((64, *(n + k * n // 4 for n in (64, 128, 256, 512, 1024) for k in range(1, 5)))),
    "multiples of 64": Buckets(tuple(range(64, 2049, 64))),
    "powers of two": Buckets((64, 128, 256, 512, 1024, 2048)),
    "one length": Buckets((2048,)),
}
WINDOW = 4096
"""Number of cells that are sorted together, as in the embedder."""


def buckets(options: Options) -> tuple[str, dict[str, Any]]:
    """Compute padding, work and shapes of each ladder, for the lengths of real cells at 2,048 tokens."""
    bundle = paper_weights().bundle
    rows, numbers = [], {}
    for source in ("mix", *FILES):
        drawn = tokens(bundle, source, 600).lengths
        lengths = np.random.default_rng(0).choice(drawn, size=WINDOW if options.quick else 4 * WINDOW)
        found = {name: _cost(lengths, ladder) for name, ladder in LADDERS.items()}
        numbers[source] = found
        middle = int(np.median(drawn))
        for name, cost in found.items():
            rows.append(
                (
                    f"{source} (median {middle:,} tokens)",
                    name,
                    f"{cost['padding']:.1%}",
                    f"{cost['work']:.1%}",
                    cost["shapes"],
                    cost["batches"],
                )
            )
    text = (
        f"Batches of up to {MAX_TOKENS:,} padded tokens, {WINDOW:,} cells sorted together; more work: FLOP of all "
        "padded slots, attention included, beyond those of the tokens alone.\n\n"
    )
    return text + table(("cells", "padded up to", "padding", "more work", "shapes", "batches"), rows), numbers


def _cost(lengths: NDArray[np.integer[Any]], ladder: Buckets | None) -> dict[str, float]:
    limits = BatchLimits(max_tokens=MAX_TOKENS, max_attention=MAX_TOKENS * 2048, max_cells=512, buckets=ladder)
    size = ModelSize()
    shapes: list[tuple[int, int]] = []
    for start in range(0, len(lengths), WINDOW):
        window = lengths[start : start + WINDOW]
        shapes += [limits.shape(len(batch), int(window[batch].max())) for batch in form_batches(window, limits)]
    slots = sum(n * length for n, length in shapes)
    work = sum(n * cell_cost(size, length, layers=5).forward for n, length in shapes)
    alone = len(lengths) * cell_cost(size, lengths, layers=5).forward
    return {
        "padding": 1.0 - float(lengths.sum()) / slots,
        "work": work / alone - 1.0,
        "shapes": len(set(shapes)),
        "batches": len(shapes),
    }

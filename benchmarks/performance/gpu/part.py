"""Embedding on a GPU: what can be shown without one, and, if there is one, the race against transformers."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.performance.gpu.forms import forms, projection
from benchmarks.performance.gpu.measure import cuda_here, kernels, last_line, measure, waiting
from benchmarks.performance.gpu.overlap import overlap
from benchmarks.performance.gpu.shapes import buckets
from benchmarks.performance.harness import Options, Section

Part = Callable[[Options], tuple[str, dict[str, Any]]]
MEASURED: dict[str, tuple[str, Part]] = {
    "measured": ("Against transformers", measure),
    "waiting": ("Waiting for the tokenizer", waiting),
    "kernels": ("Attention kernels", kernels),
}
OFFLINE: dict[str, tuple[str, Part]] = {
    "projection": ("What an H100 should do", lambda options: projection()),
    "forms": ("Forms of the graph", forms),
    "buckets": ("Few shapes", buckets),
    "overlap": ("Would a GPU wait?", overlap),
}


def run(options: Options) -> Section:
    """Run the whole part; a piece that fails does not stop the others."""
    reason = cuda_here()
    text, numbers = [], {}
    if reason:
        text.append(
            f"**Nothing here was measured on a GPU: {reason}.** On a machine with one, this same command measures "
            "(`notes/gpu.md` says how to set it up). What follows was computed, or measured on a processor.\n"
        )
    for name, (title, part) in {**({} if reason else MEASURED), **OFFLINE}.items():
        try:
            markdown, numbers[name] = part(options)
        except Exception as error:  # noqa: BLE001  the other pieces are worth having
            traceback.print_exc()
            markdown = f"Failed: {last_line(str(error)) or type(error).__name__}\n"
            numbers[name] = {"failed": str(error)}
        text += [f"### {title}\n", markdown]
    return Section("\n".join(text), numbers)

"""The benchmark of a GPU, as far as it is arithmetic and graphs."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.performance.gpu import part
from benchmarks.performance.gpu.forms import LENGTHS, form_makers, packed, projected, steps
from benchmarks.performance.gpu.shapes import LADDERS, _cost
from benchmarks.performance.harness import Options
from export.forms import standard_attention
from tests.models import small_graph
from training.measure.flops import ModelSize, cell_cost


@pytest.mark.parametrize("form", ["fp16", "fp16-flash"])
@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_have_the_operations_of_the_model(form: str, length: int) -> None:
    size = ModelSize()
    flops = sum(step.flops for step in steps(form, size, length)) * length * (size.layers - 1)
    assert flops == pytest.approx(cell_cost(size, length, layers=size.layers - 1).forward)
    assert 0 < projected(form, length) < 1.5 * projected(form, length // 2)


def test_what_ladders_cost() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, size=4096, endpoint=True)
    found = {name: _cost(lengths, ladder) for name, ladder in LADDERS.items()}
    own = found["longest cell"]
    assert all(0 <= own["padding"] <= cost["padding"] and own["work"] <= cost["work"] for cost in found.values())
    assert found["one length"]["shapes"] == 1
    assert found["eight lengths an octave (used)"]["shapes"] < own["shapes"]


def test_every_form_can_be_made() -> None:
    fused, plain = small_graph(), small_graph(fuse=False)
    operators = {name: {node.op_type for node in make(fused, plain).graph.node} for name, make in form_makers().items()}
    assert {"RemovePadding", "RestorePadding", "PackedAttention"} <= operators["fp16-packed"]
    assert "Softmax" in operators["fp16-plain"]
    assert "Softmax" not in operators["fp16"] | operators["fp16-flash"]
    with pytest.raises(ValueError, match="not packed"):
        packed(plain)
    assert standard_attention(fused).opset_import[0].version == 24


def test_a_piece_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Options) -> tuple[str, dict[str, object]]:
        raise OSError("no such thing")

    monkeypatch.setattr(part, "OFFLINE", {"a": ("A", broken), "b": ("B", lambda options: ("| b |\n", {"b": 1}))})
    monkeypatch.setattr(part, "cuda_here", lambda: "torch sees no GPU")
    section = part.run(Options(quick=True))
    assert "Nothing here was measured on a GPU: torch sees no GPU" in section.markdown
    assert "Failed: no such thing" in section.markdown
    assert section.numbers["b"] == {"b": 1}

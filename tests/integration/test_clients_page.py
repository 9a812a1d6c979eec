"""The examples of docs/clients.md run, and its rule of ranks gives the vector that the server itself makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perturbscope.cells.counts import CountMatrix
from perturbscope.client import Client
from tests.integration.in_process import MODEL, running

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), flags=re.DOTALL)
COUNTS = {"ENSG00000111640": 12, "ENSG00000075624": 7, "ENSG00000166710": 30}


def test_the_examples_run(tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    with running(tmp_path, keyless=True) as server:
        said = []
        for block in BLOCKS:
            code = block.replace("localhost:3000", server.http).replace("default", MODEL)
            if "vectors =" in code:
                code += "\nimport json\nprint(json.dumps(vectors.tolist()))"
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        assert said[0].split() == ["2048"]
        assert said[1].split() == ["2", "2"]
        with Client(f"http://{server.http}") as client:
            expected = client.embed_cells(CountMatrix.from_matrix([[*COUNTS.values()]], [*COUNTS]))
    np.testing.assert_allclose(np.array(json.loads(said[2])), expected.values, atol=1e-6)


@pytest.mark.parametrize("number", ["1.29 to 1.50", "1.16 to 1.32"])
def test_its_numbers_are_those_of_the_benchmark(number: str) -> None:
    """The gains of int8 of both shapes, over all rows of the table."""
    assert number in (ROOT / "docs" / "clients.md").read_text()
    shape = "default, 4 x 128" if number.startswith("1.29") else "paper, 6 x 256"
    table = (ROOT / "benchmarks" / "performance.md").read_text()
    rows = re.findall(rf"^\| {shape}.*?\| ([\d.]+) x \| ([\d.]+), ([\d.]+) \|", table, flags=re.MULTILINE)
    gains = [float(gain) for gain, *_ in rows]
    assert f"{min(gains):.2f} to {max(gains):.2f}" == number
    if number.startswith("1.29"):
        assert 0.9992 <= min(float(least) for *_, least in rows) < 0.9993

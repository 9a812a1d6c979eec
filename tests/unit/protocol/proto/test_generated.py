from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
GENERATED = {
    "perturbscope/protocol/proto": [
        f"{module}_pb2{suffix}"
        for module in ("perturbscope_v1", "open_inference")
        for suffix in (".py", ".pyi", "_grpc.py", "_grpc.pyi")
    ],
    "perturbscope/inference": ["onnx_graph_pb2.py", "onnx_graph_pb2.pyi"],
}


def test_the_committed_modules_are_those_of_the_proto(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "generate_proto.sh", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder, names in GENERATED.items():
        assert sorted(path.name for path in (tmp_path / folder).iterdir() if path.is_file()) == sorted(names)
        for name in names:
            committed = (ROOT / folder / name).read_text()
            assert (tmp_path / folder / name).read_text() == committed, (
                f"{name} is stale: run scripts/generate_proto.sh"
            )

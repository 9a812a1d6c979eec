"""`bentoml build`: works without a network and takes along what the service needs, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_bento_holds_the_service_the_library_and_the_bundle(tmp_path: Path, tiny_bundle: Path) -> None:
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("serving", "perturbscope", "requirements", "training", "tests/unit/serving"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignore)
    shutil.copytree(tiny_bundle, checkout / "bundles" / "default")
    shutil.copy(ROOT / "bentofile.yaml", checkout)
    home = tmp_path / "bentoml"
    environ = {
        **os.environ,
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        # Any request would go to a port where nobody listens.
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"),
    }
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    result = subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr

    (manifest,) = home.glob("bentos/perturbscope/*/bento.yaml")
    source = manifest.parent / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {name.partition("/")[0] for name in files} == {
        *("bentofile.yaml", "bundles", "perturbscope", "requirements", "serving")
    }
    assert {
        "serving/service.py",
        "perturbscope/cells/data/geneformer_gc30m.tsv.gz",
        "bundles/default/model.onnx",
    } <= files
    pins = yaml.safe_load(manifest.read_text())["image"]["python_requirements"]
    assert "bentoml==" in pins
    assert "torch==" not in pins
    assert "index-url" not in pins, "the Bento would name the package index of the machine that built it"

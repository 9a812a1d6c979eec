"""Who may import whom: read from every import statement, and from what an import really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import perturbscope

ROOT = Path(__file__).resolve().parents[2]
OURS = {"perturbscope", "training", "export", "serving", "evaluation"}
LEARNING = {"torch", "transformers", "deepspeed", "accelerate", "safetensors", "jax", "tensorflow", "scvi", "lightning"}
SERVER = {"bentoml", "fastapi", "starlette", "uvicorn", "pydantic"}
NOT_SHIPPED = {"tests", "benchmarks", "scripts"}

# Folder -> what none of its modules may import, at the top, in a function or for type checking alike.
FORBIDDEN = {
    "perturbscope": (OURS - {"perturbscope"}) | LEARNING | SERVER | {"onnx", "onnxscript", "sklearn", "matplotlib"},
    "serving": (OURS - {"perturbscope", "serving"}) | LEARNING | {"onnx", "onnxscript", "sklearn", "matplotlib"},
    "evaluation": (OURS - {"perturbscope", "evaluation"}) | LEARNING | SERVER,
    "training": {"export", "serving", "evaluation"} | (SERVER - {"pydantic"}),
    "export": {"serving", "evaluation"} | SERVER,
}
# The baseline that is itself a neural network.
ALLOWED = {"evaluation/scvi.py": {"scvi", "torch"}}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each absolute import, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module"}:
            name = node.args[0] if node.args else None
            yield node.lineno, str(name.value).partition(".")[0] if isinstance(name, ast.Constant) else ""


def test_the_reader_of_imports_sees_hidden_ones() -> None:
    source = "def f():\n    import torch.nn as nn\nif TYPE_CHECKING:\n    from serving.engine.engine import Engine\n"
    source += "importlib.import_module('jax.numpy')\nfrom . import torch\n"
    assert sorted(imported(source)) == [(2, "torch"), (4, "serving"), (5, "jax")]


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_no_module_imports_what_its_folder_may_not(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules, f"{folder}/ holds no module"
    wrong = [
        f"{module.relative_to(ROOT)}:{line} imports {package}"
        for module in modules
        for line, package in imported(module.read_text())
        if package in (FORBIDDEN[folder] | NOT_SHIPPED) - ALLOWED.get(module.relative_to(ROOT).as_posix(), set())
    ]
    assert wrong == []


def test_the_exporter_knows_no_family() -> None:
    """It takes all families through :class:`training.families.TrainingFamily`."""
    families = {path.stem for path in (ROOT / "training" / "families").iterdir() if path.is_dir()} - {"__pycache__"}
    assert "rank" in families
    wrong = [
        f"{module.relative_to(ROOT)} names training.families.{family}"
        for module in (ROOT / "export").rglob("*.py")
        for family in families
        if f"training.families.{family}" in module.read_text()
    ]
    assert wrong == []


def test_the_evaluation_loads_scvi_only_when_a_model_is_trained() -> None:
    assert loaded_by("import evaluation.scvi, evaluation.__main__") & LEARNING == set()


@pytest.mark.parametrize(
    "module", ["perturbscope", "perturbscope.client", "perturbscope.scoring.control", "perturbscope.cli"]
)
def test_importing_the_library_loads_no_learning_and_no_server(module: str) -> None:
    assert loaded_by(f"import {module}") & (LEARNING | SERVER) == set()


def test_importing_the_service_loads_no_learning() -> None:
    assert loaded_by("import serving.service") & LEARNING == set()


def test_pot_brings_no_learning() -> None:
    """POT imports every array library that it finds, unless it is told not to."""
    code = """
import numpy as np
from perturbscope.scoring.optimal_transport import wasserstein
rng = np.random.default_rng(0)
wasserstein(rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32))
"""
    loaded = loaded_by(code)
    assert "ot" in loaded
    assert loaded & LEARNING == set()


def test_importing_the_package_alone_is_light() -> None:
    """`import perturbscope` reads no numpy: names are imported when they are first used."""
    assert loaded_by("import perturbscope") & {"numpy", "scipy", "pandas", "anndata", "onnxruntime", "grpc"} == set()


def test_public_names_are_sorted_and_complete() -> None:
    assert perturbscope.__all__ == sorted(perturbscope.__all__)
    for name in perturbscope.__all__:
        assert getattr(perturbscope, name).__name__ == name
    stub = ast.parse(Path(perturbscope.__file__).with_suffix(".pyi").read_text())
    declared = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = next(ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert listed == perturbscope.__all__
    assert declared == set(perturbscope.__all__)


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter in which torch could be imported."""
    script = f"""
import importlib.util, sys
assert importlib.util.find_spec("torch"), "without torch installed this shows nothing"
{code}
print("loaded:", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("loaded: ")[2].split())

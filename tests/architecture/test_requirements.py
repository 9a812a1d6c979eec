"""The pins: complete, consistent, free of this or that machine, and what the checks run with."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SETS = ("serving", "serving-gpu", "training", "evaluation", "census", "dev", "fuzz", "peers")
INSTALLED = ("serving", "training", "evaluation", "census", "dev")  # what `make setup` puts into one environment
PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[0-9][A-Za-z0-9.]*)\s+# via .+")


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, Version]:
    found = [PIN.fullmatch(line) for line in lines(f"{name}.txt")]
    return {match["name"]: Version(match["version"]) for match in found if match}


def wanted(name: str) -> list[Requirement]:
    """What a set asks for itself; the serving sets hold what the library needs as well."""
    texts = [line for line in lines(f"{name}.in") if not line.startswith("-")]
    if name == "serving":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        texts += project["dependencies"] + project["optional-dependencies"]["report"]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", SETS)
def test_every_line_is_one_exact_public_version(name: str) -> None:
    wrong = [line for line in lines(f"{name}.txt") if not PIN.fullmatch(line)]
    assert wrong == [], "a URL, an option, a range or a local version"


@pytest.mark.parametrize("name", SETS)
def test_pins_fit_what_is_asked_for(name: str) -> None:
    pinned = pins(name)
    for requirement in wanted(name):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in {name}.txt"
        assert version in requirement.specifier, f"{name}.txt has {requirement.name} {version}, not {requirement}"


def test_sets_agree_on_every_version() -> None:
    seen: dict[str, set[Version]] = {}
    for name in INSTALLED:
        for package, version in pins(name).items():
            seen.setdefault(package, set()).add(version)
    assert {package: versions for package, versions in seen.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("name", INSTALLED)
def test_pins_hold_everything_that_the_set_needs(name: str) -> None:
    pinned = set().union(*(pins(earlier) for earlier in INSTALLED[: INSTALLED.index(name) + 1]))
    todo = [(canonicalize_name(requirement.name), frozenset(requirement.extras)) for requirement in wanted(name)]
    seen = set(todo)
    while todo:
        package, extras = todo.pop()
        assert package in pinned, f"{package} is needed and not pinned"
        for text in metadata.requires(package) or []:
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in {*extras, ""}):
                continue
            needed = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            # A build of torch for CUDA pins its own libraries exactly; a build for CPU has none.
            if package != "torch" and needed not in seen:
                seen.add(needed)
                todo.append(needed)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_environment_is_the_pinned_one(name: str) -> None:
    installed = {package: Version(Version(metadata.version(package)).public) for package in pins(name)}
    assert installed == pins(name)


@pytest.mark.parametrize("name", ["serving", "serving-gpu"])
def test_serving_sets_hold_no_learning(name: str) -> None:
    """scikit-learn is there for umap-learn alone; that nothing of ours imports it is checked elsewhere."""
    assert pins(name).keys() & {"torch", "transformers", "deepspeed", "accelerate", "onnx"} == set()


def test_the_gpu_set_is_the_serving_set_with_another_runtime() -> None:
    cpu, gpu = pins("serving"), pins("serving-gpu")
    assert gpu.pop("onnxruntime-gpu") == cpu.pop("onnxruntime")
    extra = gpu.keys() - cpu.keys()
    assert {package: gpu[package] for package in gpu.keys() - extra} == cpu
    assert all(package.startswith("nvidia-") for package in extra)
    assert "nvidia-cudnn-cu13" in extra

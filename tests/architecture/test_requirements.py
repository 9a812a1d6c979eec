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
SETS = ("serving", "serving-gpu", "training", "evaluation", "census", "dev", "build", "fuzz", "peers")
INSTALLED = ("serving", "training", "evaluation", "census", "dev", "build")  # what `make setup` installs together
PIN = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[0-9][A-Za-z0-9.]*)"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n    # via .+"
)
TORCH = re.compile(r"torch==(?P<version>[0-9.]+)")


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def entries(name: str) -> list[str]:
    """The pins of a set, each with the lines of its hashes."""
    return re.split(r"\n(?=\S)", "\n".join(lines(f"{name}.txt")))


def pins(name: str) -> dict[str, Version]:
    """The pins of a set; torch, which has a file of its own, is in those that it was solved with."""
    found = [PIN.fullmatch(entry) for entry in entries(name)]
    found += [TORCH.fullmatch(line) for line in lines("torch.txt")] if name in ("training", "evaluation") else []
    return {match.groupdict().get("name", "torch"): Version(match["version"]) for match in found if match}


def wanted(name: str) -> list[Requirement]:
    """What a set asks for itself; the serving sets hold what the library needs as well."""
    texts = [line for line in lines(f"{name}.in") if not line.startswith("-")]
    if name == "serving":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        texts += project["dependencies"] + project["optional-dependencies"]["report"]
        texts += project["optional-dependencies"]["signatures"]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", SETS)
def test_every_line_is_one_exact_public_version_with_hashes(name: str) -> None:
    wrong = [entry for entry in entries(name) if not PIN.fullmatch(entry)]
    assert wrong == [], "a URL, an option, a range, a local version or no hash"


def test_torch_alone_has_no_hash() -> None:
    (line,) = lines("torch.txt")
    assert TORCH.fullmatch(line)
    assert not [name for name in SETS if any(entry.startswith("torch==") for entry in entries(name))]
    assert Requirement(line) in wanted("training")


def test_the_wheel_is_built_with_what_is_pinned() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert [Requirement(text) for text in build] == [Requirement(f"hatchling=={pins('build')['hatchling']}")]


def test_every_install_asks_for_hashes() -> None:
    for file, command in (("Makefile", r"\$\(PIP\) .*"), ("Dockerfile", r"pip (?:install|wheel) [^;&\n]*")):
        calls = re.findall(command, (ROOT / file).read_text())
        assert len(calls) >= 4
        for call in calls:
            of_files = "-r " in call and "torch.txt" not in call
            # The others take what lies here, and download nothing to build it with.
            assert ("--require-hashes" in call) == of_files, call
            assert of_files or "torch.txt" in call or "--no-build-isolation" in call or "--no-index" in call, call
            assert file == "Makefile" or not of_files or "--only-binary :all:" in call, call


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
    """Nor what compiles itself in every process."""
    learning = {"torch", "transformers", "deepspeed", "accelerate", "onnx", "scikit-learn"}
    assert pins(name).keys() & (learning | {"numba", "umap-learn"}) == set()


def test_the_gpu_set_is_the_serving_set_with_another_runtime() -> None:
    cpu, gpu = pins("serving"), pins("serving-gpu")
    assert gpu.pop("onnxruntime-gpu") == cpu.pop("onnxruntime")
    extra = gpu.keys() - cpu.keys()
    assert {package: gpu[package] for package in gpu.keys() - extra} == cpu
    assert all(package.startswith("nvidia-") for package in extra)
    assert "nvidia-cudnn-cu13" in extra

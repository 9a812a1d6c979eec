"""The bill of materials: valid, the same each time, with hashes, licences, and what wheels carry inside."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import jsonschema_rs
import pytest

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = ROOT / "bundles" / "default"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the image gives: pip's report, dpkg's list, a bundle."""
    folder = tmp_path_factory.mktemp("sbom")
    wheel = "numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.whl"
    archive = {"archive_info": {"hashes": {"sha256": "ab" * 32}}, "url": f"https://index.example.com/simple/{wheel}"}
    entry = {"metadata": {"name": "NumPy", "version": "2.4.6"}, "download_info": archive}
    (folder / "report.json").write_text(json.dumps({"version": "1", "install": [entry]}))
    (folder / "status").write_text(
        "Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:1.2.13.dfsg-1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    return [f"--report={folder / 'report.json'}", f"--dpkg-status={folder / 'status'}", f"--bundle={BUNDLE}"]


def made(inputs: list[str], **environ: str) -> str:
    command = [sys.executable, ROOT / "scripts" / "sbom.py", *inputs]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def bill(inputs: list[str]) -> dict:
    return json.loads(made(inputs))


def part(bill: dict, name: str) -> dict:
    (found,) = [entry for entry in bill["components"] if entry["name"] == name]
    return found


def test_it_is_valid_cyclonedx(bill):
    schemas = {
        name: json.loads((resources.files("cyclonedx.schema") / "_res" / f"{name}.SNAPSHOT.schema.json").read_text())
        for name in ("bom-1.6", "spdx", "jsf-0.82")
    }
    here = schemas["bom-1.6"]["$id"].rpartition("/")[0]
    registry = jsonschema_rs.Registry([(f"{here}/{name}.SNAPSHOT.schema.json", body) for name, body in schemas.items()])
    validator = jsonschema_rs.validator_for(schemas["bom-1.6"], registry=registry)
    assert [error.message for error in validator.iter_errors(bill)] == []
    # The schema is really applied, down to the names of licences.
    assert not validator.is_valid({**bill, "components": [{"type": "library"}]})
    references = [entry["bom-ref"] for entry in bill["components"]]
    references += [inner["bom-ref"] for entry in bill["components"] for inner in entry.get("components", [])]
    assert len(references) == len(set(references))
    assert {need for entry in bill["dependencies"] for need in entry["dependsOn"]} <= set(references)


def test_the_same_environment_gives_the_same_bytes(inputs, bill):
    assert json.loads(made(inputs, SOURCE_DATE_EPOCH="1764547200"))["metadata"]["timestamp"] == "2025-12-01T00:00:00Z"
    again = json.loads(made(inputs, PYTHONHASHSEED="7"))
    assert again == bill
    assert "timestamp" not in bill["metadata"]


def test_it_lists_what_is_installed(bill):
    assert bill["metadata"]["component"]["name"] == "perturbscope"
    assert {entry["version"] for entry in bill["components"] if entry["name"] == "numpy"} == {metadata.version("numpy")}
    assert part(bill, "zlib1g")["purl"] == "pkg:deb/debian/zlib1g@1%3A1.2.13.dfsg-1?arch=amd64"
    assert not [entry for entry in bill["components"] if entry["name"] == "gone"]
    model = part(bill, "default")
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    assert model["type"] == "machine-learning-model"
    assert model["version"] == manifest["version"]
    hashes = {file["name"]: file["hashes"][0]["content"] for file in model["components"]}
    assert hashes.pop("manifest.json")
    assert hashes == manifest["files"]
    needs = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert part(bill, "numpy")["bom-ref"] in needs[bill["metadata"]["component"]["bom-ref"]]


def test_hashes_are_those_of_the_wheels_and_no_index_is_named(inputs, bill):
    numpy = part(bill, "numpy")
    assert numpy["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert numpy["properties"][0]["value"].endswith(".whl")
    assert "index.example.com" not in json.dumps(bill)


def test_licences_are_expressions_where_the_package_states_one(bill):
    assert part(bill, "numpy")["licenses"][0]["expression"].startswith("BSD-3-Clause")
    assert part(bill, "jinja2")["licenses"] == [{"license": {"name": "BSD License"}}], (
        "one of several, it does not say which"
    )
    assert "licenses" not in part(bill, "resvg-py"), "it states none"


def test_what_wheels_carry_is_listed_below_them(bill):
    crates = {inner["name"] for inner in part(bill, "resvg-py")["components"]}
    assert {"resvg", "usvg", "tiny-skia"} <= crates
    carried = part(bill, "scikit-learn").get("components", [])
    if sys.platform == "linux":
        (openmp,) = [inner for inner in carried if inner["name"].startswith("libgomp-")]
        assert openmp["licenses"] == [{"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"}]
        assert len(openmp["hashes"][0]["content"]) == 64

"""Writes the bill of materials of an image (CycloneDX 1.6, JSON) from what is installed in it.

usage: python sbom.py [--report PIP_REPORT] [--dpkg-status FILE] [--bundle FOLDER]... [--output FILE]

The packages are those of the interpreter that runs this. Below each are the libraries and crates that its wheel
carries. pip's report of the installation (pip install --report) gives the hash of the wheel that each came from, dpkg's
list the Debian packages. Same environment, same bytes: there is no date in it, unless SOURCE_DATE_EPOCH is set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from distributions import LIBRARIES, embedded, libraries, licence, normalised, sha256, stated
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement

Component = dict[str, Any]
ROOT = "perturbscope"


def licences(text: str | None) -> list[dict[str, Any]]:
    """Return a licence as CycloneDX wants it: an expression where it is one of SPDX, a name where it is not."""
    if text is None:
        return []
    try:
        return [{"expression": str(canonicalize_license_expression(text))}]
    except InvalidLicenseExpression:
        return [{"license": {"name": text}}]


def component(kind: str, name: str, version: str, purl: str | None, **more: Any) -> Component:
    """Return a component without the fields that are empty."""
    fields = {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl, **more}
    return {key: value for key, value in fields.items() if value}


def python_packages(wheels: dict[str, Component]) -> list[Component]:
    """Return the installed packages, each with what its wheel carries."""
    found = []
    for distribution in metadata.distributions():
        name, version = normalised(distribution.name), distribution.version
        purl = f"pkg:pypi/{name}@{quote(version)}"
        inner = [
            component(
                "file",
                library.file,
                "",
                None,
                **{"bom-ref": f"{purl}#{library.file}"},
                description=LIBRARIES.get(library.stem, ("", ""))[0],
                licenses=licences(LIBRARIES.get(library.stem, ("", None))[1]),
                hashes=[{"alg": "SHA-256", "content": library.sha256}],
            )
            for library in libraries(distribution)
        ]
        for part in embedded(distribution):
            inner_name, inner_version = part["name"], part.get("version", "")
            inner.append(
                component(
                    "library",
                    inner_name,
                    inner_version,
                    # Without what says where it was built or downloaded.
                    part.get("purl", "").partition("?")[0].partition("#")[0],
                    **{"bom-ref": f"{purl}#{inner_name}@{inner_version}"},
                    licenses=licences(stated(part)),
                )
            )
        found.append(
            component(
                "library",
                name,
                version,
                purl,
                licenses=licences(licence(distribution)),
                components=inner,
                **wheels.get(name, {}),
            )
        )
    return found


def wheels(report: Path | None) -> dict[str, Component]:
    """Return hash and file name of the wheel of each package, from pip's report; not the address that it came from."""
    if report is None:
        return {}
    found = {}
    for entry in json.loads(report.read_text())["install"]:
        source = entry["download_info"]
        found[normalised(entry["metadata"]["name"])] = {
            "hashes": [{"alg": "SHA-256", "content": source["archive_info"]["hashes"]["sha256"]}],
            "properties": [{"name": "perturbscope:wheel", "value": unquote(source["url"].rpartition("/")[2])}],
        }
    return found


def debian_packages(status: Path | None) -> list[Component]:
    """Return the installed packages of Debian; their licences are in /usr/share/doc of the image."""
    found = []
    for paragraph in (status.read_text(errors="replace") if status else "").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version|Architecture): (.+)$", paragraph, flags=re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version, machine = fields["Package"], fields["Version"], fields["Architecture"]
            found.append(
                component("library", name, version, f"pkg:deb/debian/{name}@{quote(version)}?arch={quote(machine)}")
            )
    return found


def models(bundles: list[Path]) -> list[Component]:
    """Return the models, each with a hash of its manifest, which holds one of every other file."""
    found = []
    for bundle in bundles:
        manifest = json.loads((bundle / "manifest.json").read_text())
        name, version = manifest["name"], manifest["version"]
        found.append(
            component(
                "machine-learning-model",
                name,
                version,
                None,
                **{"bom-ref": f"bundle:{name}@{version}"},
                licenses=licences(manifest.get("licence")),
                components=[
                    component(
                        "file",
                        file,
                        "",
                        None,
                        **{"bom-ref": f"bundle:{name}@{version}#{file}"},
                        hashes=[{"alg": "SHA-256", "content": digest}],
                    )
                    for file, digest in sorted(
                        {**manifest["files"], "manifest.json": sha256(bundle / "manifest.json")}.items()
                    )
                ],
            )
        )
    return found


def dependencies(packages: list[Component]) -> list[dict[str, Any]]:
    """Return which package needs which, as far as both are installed."""
    references = {package["name"]: package["bom-ref"] for package in packages}
    found = []
    for name, reference in references.items():
        needed = set()
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(references.get(normalised(requirement.name)))
        found.append({"ref": reference, "dependsOn": sorted(filter(None, needed))})
    return sorted(found, key=lambda entry: str(entry["ref"]))


def bill(report: Path | None = None, status: Path | None = None, bundles: list[Path] | None = None) -> dict[str, Any]:
    """Return the bill of materials."""
    packages = sorted(python_packages(wheels(report)), key=lambda entry: str(entry["name"]))
    (root,) = [package for package in packages if package["name"] == ROOT]
    graph = dependencies(packages)
    python = platform.python_version()
    others = [
        component("platform", "cpython", python, f"pkg:generic/cpython@{python}", licenses=licences("PSF-2.0")),
        *models(bundles or []),
        *sorted(debian_packages(status), key=lambda entry: str(entry["bom-ref"])),
    ]
    about: dict[str, Any] = {"lifecycles": [{"phase": "build"}], "component": {**root, "type": "application"}}
    if "SOURCE_DATE_EPOCH" in os.environ:
        moment = datetime.fromtimestamp(int(os.environ["SOURCE_DATE_EPOCH"]), tz=UTC)
        about["timestamp"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": about,
        "components": [package for package in packages if package is not root] + others,
        "dependencies": graph,
    }
    # A number that follows from the content, so that the same image has the same.
    content = json.dumps(document, sort_keys=True)
    return {**document, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bill of materials of this environment (CycloneDX, JSON).")
    parser.add_argument("--report", type=Path, help="what pip install --report wrote")
    parser.add_argument("--dpkg-status", type=Path, help="dpkg's list of packages, /var/lib/dpkg/status")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="folder of a bundle; may be repeated")
    parser.add_argument("--output", type=Path, help="file to write; default: standard output")
    options = parser.parse_args()
    text = json.dumps(bill(options.report, options.dpkg_status, options.bundle), indent=1, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()

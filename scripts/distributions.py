"""What installed packages say about themselves: licence, licence texts, and the foreign libraries inside their wheels.

Read by scripts/sbom.py and scripts/notice.py. The standard library and packaging only: the first runs inside the image.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Free texts that mean one licence. "BSD" is not among them: it may be one of several.
SPDX = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit": "MIT",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "psf-2.0": "PSF-2.0",
}

# Libraries of others that wheels carry beside the package, in a folder that ends in .libs, by the start of their names:
# what they are, and the licence that their projects state.
LIBRARIES = {
    "libaec": ("libaec", "BSD-2-Clause"),
    "libcrc32c": ("crc32c", "BSD-3-Clause"),
    "libgfortran": ("Fortran run-time library of GCC", "GPL-3.0-or-later WITH GCC-exception-3.1"),
    "libgomp": ("OpenMP run-time library of GCC", "GPL-3.0-or-later WITH GCC-exception-3.1"),
    "libhdf5": ("HDF5", "BSD-3-Clause"),
    "libhdf5_hl": ("HDF5", "BSD-3-Clause"),
    "libquadmath": ("quad-precision run-time library of GCC", "LGPL-2.1-or-later"),
    "libscipy_openblas": ("OpenBLAS, with LAPACK", "BSD-3-Clause AND BSD-3-Clause-Open-MPI"),
    "libscipy_openblas64_": ("OpenBLAS, with LAPACK", "BSD-3-Clause AND BSD-3-Clause-Open-MPI"),
    "libsodium": ("libsodium", "ISC"),
    "libsz": ("libaec", "BSD-2-Clause"),
    "libzmq": ("ZeroMQ", "MPL-2.0"),
}

TEXT_NAME = re.compile(r"(licen[cs]e|copying|notice|thirdparty|third-party)", re.IGNORECASE)
NO_TEXT = {".py", ".pyc", ".pyi", ".h", ".html", ".json", ".so"}


@dataclass(frozen=True, kw_only=True)
class Library:
    """A shared library of another project inside a wheel.

    Attributes
    ----------
    stem
        Name without the hash and the version that the repair of the wheel added, such as "libgfortran".
    file
        Name of the file.
    sha256
        SHA-256 of the file.
    """

    stem: str
    file: str
    sha256: str


def licence(distribution: metadata.Distribution) -> str | None:
    """Return the licence that the metadata state, as an SPDX expression where they say it plainly; None if nowhere."""
    fields = distribution.metadata
    expression = fields.get("License-Expression")
    if expression:
        return str(expression)
    free = str(fields.get("License") or "").strip().splitlines()
    classifiers = [
        entry.rpartition(" :: ")[2] for entry in fields.get_all("Classifier") or [] if entry.startswith("License ::")
    ]
    # The whole text of a licence stands in the field at times: its first line is the name, or a copyright.
    for text in (free[0] if len(free) == 1 else "", *classifiers, free[0] if free else ""):
        if text.lower() in SPDX:
            return SPDX[text.lower()]
    named = [
        text
        for text in (*free[:1], *classifiers)
        if text[:1].isalpha() and not text.lower().startswith(("copyright", "osi"))
    ]
    return named[0] if named else None


def texts(distribution: metadata.Distribution) -> list[tuple[str, str]]:
    """Return the licence texts and notices of a package as (path inside the environment, text), by path."""
    found = {}
    for entry in distribution.files or []:
        path = Path(str(entry))
        inside = "licenses" in path.parts and ".dist-info" in path.parts[0]
        if path.suffix in NO_TEXT or not (TEXT_NAME.search(path.name) or inside) or path.parts[0] == "..":
            continue
        where = Path(str(entry.locate()))
        if where.is_file():
            found[path.as_posix()] = where.read_text(encoding="utf-8", errors="replace")
    return sorted(found.items())


def libraries(distribution: metadata.Distribution) -> list[Library]:
    """Return the shared libraries of other projects that the wheel carries, by name of the file."""
    found = []
    for entry in distribution.files or []:
        path = Path(str(entry))
        if not any(part.endswith(".libs") or part == ".dylibs" for part in path.parts[:-1]):
            continue
        where = Path(str(entry.locate()))
        if where.is_file():
            stem = re.split(r"-[0-9a-f]{8}(?:[-.]|$)|\.so|\.\d", path.name)[0]
            found.append(Library(stem=stem, file=path.name, sha256=sha256(where)))
    return sorted(found, key=lambda library: library.file)


def embedded(distribution: metadata.Distribution) -> list[dict[str, Any]]:
    """Return the components that the wheel lists in its own bills of materials (PEP 770), without the package."""
    own = normalised(distribution.name)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in distribution.files or []:
        path = Path(str(entry))
        if path.parent.name != "sboms" or path.suffix != ".json":
            continue
        bill = json.loads(Path(str(entry.locate())).read_text(encoding="utf-8"))
        for component in bill.get("components", []) if bill.get("bomFormat") == "CycloneDX" else []:
            if normalised(component["name"]) != own:
                found[component["name"], component.get("version", "")] = component
    return [component for _, component in sorted(found.items())]


def stated(component: dict[str, Any]) -> str | None:
    """Return the licence that a component of a CycloneDX bill states."""
    names = []
    for entry in component.get("licenses", []):
        inner = entry.get("license", {})
        names.append(entry.get("expression") or inner.get("id") or inner.get("name"))
    return " AND ".join(filter(None, names)) or None


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pins(path: Path) -> dict[str, str]:
    """Return the packages of a file of pins with their versions, as they are written there."""
    found = re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", path.read_text(), flags=re.MULTILINE)
    return dict(found)


def pinned(path: Path) -> Iterator[metadata.Distribution]:
    """Yield the installed packages that a file of pins names.

    Raises
    ------
    SystemExit
        If one is missing or has another version: what is said of it would be said of something else.
    """
    for name, version in pins(path).items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{name} of {path} is not installed; make setup installs it") from None
        if distribution.version.partition("+")[0] != version:
            raise SystemExit(f"{path} pins {name} {version} and {distribution.version} is installed; run make setup")
        yield distribution

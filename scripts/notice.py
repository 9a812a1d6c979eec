"""Writes NOTICE: whose software is in the image, under which licences, with the text of each licence once.

usage: python scripts/notice.py [--check]

It reads the installed packages that requirements/serving.txt pins, so it runs in the environment of `make setup`, on
Linux on x86-64: wheels for other machines carry other libraries. --check writes nothing and fails if NOTICE is not what
would be written.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import textwrap
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from distributions import LIBRARIES, embedded, libraries, licence, normalised, pinned, pins, stated, texts

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "requirements" / "serving.txt"
GPU_PINS = ROOT / "requirements" / "serving-gpu.txt"
# Longer texts stay where the package has them, which is in the image as well.
LONGEST = 100_000
# Texts of this length or less differ by their copyright lines alone at times: those are listed apart.
SHORT = 13_000

HEAD = """\
PerturbScope
Licensed under the Apache License, Version 2.0; see LICENSE.

perturbscope/cells/data holds data of others: tokens and medians of Geneformer (Theodoris et al. 2023, Apache-2.0), and
names of genes from GENCODE v44 (by way of celltypist, MIT), the HGNC complete set of 2020 (CC0) and org.Hs.eg.db 3.16
(Artistic-2.0). The model in bundles/default comes with a card, MODEL_CARD.md, and data/README.md names the licences of
the data that it learned from.

The images hold the software below, and packages of Debian, whose licences are in /usr/share/doc of the image. The list
was written by scripts/notice.py (make notice) from the packages that requirements/serving.txt pins, as their wheels for
Linux on x86-64 have them; change nothing here by hand. A licence is what the metadata of the package state.
"""

MISSING = """\
These packages come with no text: {packages}.
Where they name a licence that other packages have too, its text is below.
"""

NO_LICENCE = """\
These packages state no licence in their metadata: {packages}.
What their files say is below.
"""

GPU = """\
The GPU image has onnxruntime-gpu (MIT) in place of onnxruntime, and libraries of NVIDIA, which are not free software:
their metadata say LicenseRef-NVIDIA-Proprietary. Whoever passes the image on has to keep to the terms of NVIDIA. The
texts of these packages are not here, as they are not installed where scripts/notice.py runs:
"""

COPYRIGHT = re.compile(
    r"^[\s#*/%.-]*(?:(?:Copyright|COPYRIGHT)\b(?! (?:notice|holder|owner|license|statement))"
    r"|\([cC]\) (?:Copyright|\d{4})|©|[aA]ll [rR]ights [rR]eserved\.?\s*$)"
)
TITLE = re.compile(
    r"^[\s#*=-]*(the )?(mit|bsd|isc|apache|new bsd|modified bsd)?[\w\s(),.\"'-]{0,40}licen[cs]e\b.{0,40}$",
    re.IGNORECASE,
)


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 118, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def parted(text: str) -> tuple[str, str]:
    """Return the copyright lines of a short licence text, and the rest of it."""
    rights, rest = [], []
    for line in text.splitlines():
        (rights if COPYRIGHT.match(line) else rest).append(line)
    names = [line.strip(" #*/%\t") for line in rights]
    # The appendix of Apache-2.0 shows how to write one.
    names = [name for name in names if not re.match(r"all rights|.*[\[{]y+[\]}]", name, re.IGNORECASE)]
    return "\n".join(names), "\n".join(rest)


def same(body: str) -> str:
    """Return the words that two equal texts share: neither title, nor addresses, nor the wheel's own files."""
    lines = [line for line in body.splitlines() if line.strip() and not line.startswith("Files: ")]
    while len(lines) > 1 and TITLE.match(lines[0]):
        lines.pop(0)
    return re.sub(r"(?:https?://\S+|\W)+", " ", " ".join(lines)).strip().lower()


def sections(path: str, text: str) -> list[tuple[str, str]]:
    """Return a text as the sections that numpy's and scipy's have, one for each library that they carry."""
    first, *others = re.split(r"(?m)^(?=Name: )", text)
    return [(path, first), *((f"{path}, {section.splitlines()[0]}", section) for section in others)]


class Texts:
    """Licence texts by number, each once, with those who come under it."""

    def __init__(self) -> None:
        self.bodies: list[str] = []
        self.owners: list[list[str]] = []
        self._numbers: dict[str, int] = {}

    def add(self, package: str, path: str, text: str) -> int:
        """Return the number of a text, which begins at 1."""
        rights, body = parted(text) if len(text) <= SHORT else ("", text)
        if not body.strip():
            body = text
        key = same(body)
        if key not in self._numbers:
            self.bodies.append(textwrap.dedent(body).strip("\n"))
            self.owners.append([])
            self._numbers[key] = len(self.bodies)
        number = self._numbers[key]
        name = path.partition(".dist-info/")[2].removeprefix("licenses/") or path
        self.owners[number - 1].append(f"{package} ({name})" + "".join(f"\n    {line}" for line in rights.splitlines()))
        return number


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows as columns that are as wide as they must be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def section(title: str, *parts: str) -> str:
    return "\n".join(
        [title, "=" * len(title), "", *("\n\n".join(part.rstrip("\n") for part in parts if part).split("\n"))]
    )


def crates(distribution: metadata.Distribution) -> str:
    """Return what a wheel says is compiled into it, by licence."""
    by_licence: dict[str, list[str]] = defaultdict(list)
    for component in embedded(distribution):
        if not component.get("purl", "").startswith(
            "pkg:rpm/"
        ):  # a library beside the package, which is listed as such
            by_licence[stated(component) or "not stated"].append(
                f"{component['name']} {component.get('version', '')}".strip()
            )
    if not by_licence:
        return ""
    lines = [f"{normalised(distribution.name)}:"]
    lines += [wrapped(f"{terms}: {', '.join(sorted(names))}", "    ") for terms, names in sorted(by_licence.items())]
    return "\n".join(lines)


def notice() -> str:
    """Return the text of NOTICE.

    Raises
    ------
    SystemExit
        If a package is not installed as pinned, or a wheel carries a library that nobody has looked at.
    """
    known = Texts()
    rows = [("package", "version", "licence", "texts below")]
    carried = [("library", "in", "what it is", "licence")]
    compiled, elsewhere, silent, unstated = [], [], [], []
    for distribution in sorted(pinned(PINS), key=lambda found: normalised(found.name)):
        name, numbers = normalised(distribution.name), []
        for path, text in texts(distribution):
            if len(text) > LONGEST:
                digest = hashlib.sha256(text.encode()).hexdigest()
                elsewhere.append(f"{name}: {path} ({len(text) // 1000} kB, SHA-256 {digest})")
                numbers.append("*")
            elif text.strip():
                numbers += [str(known.add(name, *part)) for part in sections(path, text)]
        terms = licence(distribution)
        unstated += [name] if terms is None else []
        silent += [name] if not numbers else []
        rows.append((name, distribution.version, terms or "not stated", ", ".join(dict.fromkeys(numbers)) or "-"))
        for library in libraries(distribution):
            if library.stem not in LIBRARIES:
                raise SystemExit(f"{name} carries {library.file}: name it and its licence in scripts/distributions.py")
            carried.append((library.file, name, *LIBRARIES[library.stem]))
        compiled.append(crates(distribution))
    only_gpu = pins(GPU_PINS).keys() - pins(PINS).keys()
    gpu_versions = [f"{name} {pins(GPU_PINS)[name]}" for name in sorted(only_gpu)]
    parts = [
        HEAD.rstrip("\n"),
        section(
            "Python packages",
            table(rows),
            wrapped(NO_LICENCE.format(packages=", ".join(unstated)).replace("\n", " ")) if unstated else "",
            wrapped(MISSING.format(packages=", ".join(silent)).replace("\n", " ")) if silent else "",
            "* Texts that are not repeated here lie in the package, below site-packages of the image:\n"
            + "\n".join(elsewhere),
        ),
        section(
            "Libraries that the packages carry",
            table(carried),
            wrapped(
                "The texts for the libraries of GCC are those that numpy and scipy bring, below; the exception lets "
                "programs under any licence be linked with them. The sources are those of GCC, at gcc.gnu.org."
            ),
        ),
        section("Compiled into the packages, as their own bills of materials say", *compiled),
        section("The GPU image", GPU, wrapped(", ".join(gpu_versions), "    ")),
    ]
    for number, (owners, body) in enumerate(zip(known.owners, known.bodies, strict=True), start=1):
        parts.append(section(f"Text {number}", "\n".join(owners), body))
    return "\n".join(line.rstrip() for line in "\n\n\n".join(parts).split("\n")) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write NOTICE from the installed packages.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if NOTICE is out of date")
    options = parser.parse_args()
    path, text = ROOT / "NOTICE", notice()
    if not options.check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        sys.exit("NOTICE is not what the pinned packages say; run make notice")


if __name__ == "__main__":
    main()

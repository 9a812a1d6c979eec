"""Gene sets in the GMT format: one set a line, its name, a description and its genes separated by tabs."""

from __future__ import annotations

import gzip
from pathlib import Path

from perturbscope.errors import UnreadableFileError

_GZIP = b"\x1f\x8b"


def read_gmt(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read the gene sets of a ``.gmt`` file, plain or gzipped, as MSigDB and Enrichr provide them.

    Returns
    -------
    Name of each set -> its genes, in order and each once. Empty lines, and empty fields at a line's end, are ignored.

    Raises
    ------
    UnreadableFileError
        The file does not exist, is not text or holds no set, or a line is not a name, a description and at least one
        gene; the message names the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise UnreadableFileError(f"The gene sets {path} cannot be read: {error}.", field="gene_sets") from error
    return parse_gmt(text, name=str(path))


def parse_gmt(text: str, *, name: str = "the gene sets") -> dict[str, tuple[str, ...]]:
    """Read the gene sets of a text in the GMT format, as :func:`read_gmt`; `name` stands for it in messages.

    Raises
    ------
    UnreadableFileError
        The text holds no set, or a line is not a name, a description and at least one gene.
    """
    where = name
    sets: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("\t"))
        genes = tuple(dict.fromkeys(gene for gene in rest[1:] if gene))
        if not name or not genes:
            raise UnreadableFileError(
                f"{where}, line {number}: a set needs its name, a description (which may be empty) and at least one "
                f"gene, separated by tabs; found {len(rest) + 1} field(s), {name[:40]!r} first.",
                field="gene_sets",
            )
        if name in sets:
            raise UnreadableFileError(
                f"{where}, line {number}: the set {name!r} stands in line {lines[name]} too; give each its own name.",
                field="gene_sets",
            )
        sets[name], lines[name] = genes, number
    if not sets:
        raise UnreadableFileError(f"There is no gene set in {where}.", field="gene_sets")
    return sets

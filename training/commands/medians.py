"""``python -m training medians CONFIG OUT.tsv``: a vocabulary with the gene medians of a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from perturbscope.cells.files import atomic
from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training import console
from training.config import strict
from training.config.stages import CorpusConfig
from training.data.medians import corpus_medians


def _read_genes(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.", field="genes") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = console.parser("Compute a vocabulary with the non-zero gene medians of a corpus.")
    parser.add_argument("output", metavar="OUT.tsv", type=Path, help="the vocabulary to write")
    parser.add_argument("--min-cells", type=int, default=10, help="leave out genes that fewer cells express")
    parser.add_argument("--genes", type=Path, help="file with the Ensembl ids to choose from, one a line")
    options = parser.parse_args(arguments)

    def compute() -> None:
        if options.output.exists() and not options.overwrite:
            raise InvalidParameterError(f"{options.output} exists already; allow --overwrite.", field="output")
        config = strict.section(CorpusConfig, options.config, "corpus", options.set)
        wanted = _read_genes(options.genes) if options.genes else None
        with console.cell_progress() as progress:
            vocabulary = corpus_medians(config, min_cells=options.min_cells, genes=wanted, progress=progress)
        with atomic(options.output) as staging:
            staging.write_text(vocabulary.to_tsv(), encoding="utf-8")
        console.stderr().print(f"{options.output}: {len(vocabulary.gene_ids):,} genes, hash {vocabulary.hash[:12]}")

    return console.run(compute)

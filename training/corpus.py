"""Build a corpus: raw counts in ``.h5ad`` files -> rank tokens in memory-mapped shards.

``python -m training.corpus CONFIG``, where CONFIG is the configuration of a training stage. Cells are read, filtered
and tokenized chunk by chunk, so memory does not grow with the corpus; the directory appears under its name only when it
is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope import __version__
from perturbscope.bundle import sha256
from perturbscope.counts import CountMatrix
from perturbscope.errors import EmptyCellError, InvalidInputError, InvalidParameterError, UnreadableFileError
from perturbscope.families import Family, TokenizedCells, load_family
from perturbscope.genes import GeneMapping, GeneResolver, GeneVocabulary
from perturbscope.readers import CellSource, open_cells
from training import commands, strict
from training.config import ContrastiveConfig, CorpusConfig, SourceConfig
from training.shards import FORMAT_VERSION, MANIFEST, VOCABULARY, Corpus, ShardsWriter
from training.strict import plain

Progress = Callable[[str, int, int], None]
"""Called with the file, the cells read so far, and all its cells."""


def build_corpus(
    config: CorpusConfig,
    *,
    vocabulary: GeneVocabulary | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Build the corpus that `config` describes, or open it if it is there already.

    Parameters
    ----------
    config
        What to read, filter and keep.
    vocabulary
        Genes, tokens and medians; those that `config` names by default.
    overwrite
        Replace a corpus that was built from another configuration.
    progress
        Called after every chunk.

    Raises
    ------
    InvalidParameterError
        `config.path` holds something else, or a corpus of another configuration, and `overwrite` is false; or no cell
        passes the filters.
    InvalidInputError
        A file is unreadable, or holds no raw counts, or none of the model's genes; the message names it.
    """
    path = Path(config.path)
    vocabulary = vocabulary or read_vocabulary(config.vocabulary)
    names = [name_of(source) for source in config.sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidParameterError(f"Two sources have the name {twice!r}. Give one of them a name.", field="sources")
    wanted = _fingerprint(config, vocabulary)
    if path.exists():
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise InvalidParameterError(
                f"{path} exists and is not a corpus, so it is not replaced. Give another path.", field="corpus.path"
            )
        if not overwrite:
            corpus = Corpus(path)
            if corpus.manifest["fingerprint"] != wanted:
                raise InvalidParameterError(
                    f"The corpus {path} was built from another configuration or other files. Build it again with "
                    "python -m training.corpus CONFIG --overwrite, or give another path.",
                    field="corpus.path",
                )
            return corpus
    family = load_family(config.family, {"max_length": config.max_length}, vocabulary)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        manifest_values = _write(staging, config, family, vocabulary, progress)
        manifest_values["fingerprint"] = wanted
        (staging / VOCABULARY).write_text(vocabulary.to_tsv(), encoding="utf-8")
        (staging / MANIFEST).write_text(json.dumps(manifest_values, indent=2) + "\n", encoding="utf-8")
        staging.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Corpus(path)


def read_vocabulary(name: str) -> GeneVocabulary:
    """The vocabulary that a configuration names.

    Raises
    ------
    UnreadableFileError
        There is no such file.
    """
    if name == "geneformer_gc30m":
        return GeneVocabulary.geneformer_gc30m()
    try:
        return GeneVocabulary.read(Path(name))
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(
            f"The vocabulary {name} cannot be read: {error}. Give a TSV file, or geneformer_gc30m.", field="vocabulary"
        ) from error


def name_of(source: SourceConfig) -> str:
    """Name of a data set."""
    return source.name or Path(source.path).stem


def open_source(source: SourceConfig, *, chunk_cells: int = 4096) -> CellSource:
    """The cells of one file. Raises as :func:`perturbscope.readers.open_cells`."""
    return open_cells(
        source.path,
        layer=source.layer,
        gene_key=source.gene_key,
        total_counts_key=source.total_counts_key,
        chunk_cells=chunk_cells,
    )


def chunks(cells: CellSource, keep: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """The cells to keep, chunk by chunk: their rows and their counts. Cells without any count are left out.

    Chunks without a cell to keep are not read.
    """
    for start in range(0, cells.n_cells, cells.chunk_cells):
        stop = min(start + cells.chunk_cells, cells.n_cells)
        if not keep[start:stop].any():
            continue
        for rows, counts in _rows(cells, start, stop):
            chosen = np.flatnonzero(keep[rows])
            if len(chosen):
                yield rows[chosen], counts[chosen]


def _rows(cells: CellSource, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], CountMatrix]]:
    """Rows `start` to `stop`; where a row has no counts it is searched for by halving, and left out."""
    try:
        counts = cells.rows(start, stop)
    except EmptyCellError:
        if stop - start == 1:
            return
        middle = (start + stop) // 2
        yield from _rows(cells, start, middle)
        yield from _rows(cells, middle, stop)
    else:
        yield np.arange(start, stop), counts


def _write(
    staging: Path, config: CorpusConfig, family: Family, vocabulary: GeneVocabulary, progress: Progress | None
) -> dict[str, Any]:
    """Write all shards; the manifest's values."""
    narrow = "uint16" if len(vocabulary) <= 2**16 else "int32"
    inputs = {spec.name: (narrow if spec.name == "input_ids" else spec.dtype, spec.trailing) for spec in family.inputs}
    labels: dict[str, dict[str, int]] = {name: {} for name in config.labels}
    sources: list[dict[str, Any]] = []
    lengths: Counter[int] = Counter()
    with ShardsWriter(staging, inputs, config.labels, max_tokens=config.shard_tokens) as shards:
        for number, source in enumerate(config.sources):
            dropped: Counter[str] = Counter()
            kept: Counter[str] = Counter()
            try:
                with open_source(source, chunk_cells=config.chunk_cells) as cells:
                    n_cells = cells.n_cells
                    codes = _label_codes(cells, labels)
                    mapping = GeneResolver.default().map(cells.gene_ids, vocabulary)
                    for rows, tokens in _tokenize(cells, number, config, family, mapping, dropped, progress):
                        per_cell = {f"label-{name}": values[rows] for name, values in codes.items()}
                        of_file = np.full(len(rows), number, dtype=np.int32)
                        shards.append(tokens, {"source": of_file, "row": rows, **per_cell})
                        lengths.update(tokens.lengths.tolist())
                        kept.update(cells=len(rows), tokens=int(tokens.offsets[-1]))
            except InvalidInputError as error:
                raise type(error)(f"{source.path}: {error.message}", field=error.field) from error
            sources.append(
                {
                    "name": name_of(source),
                    "path": source.path,
                    "sha256": _identity(Path(source.path)),
                    "cells": n_cells,
                    "kept": kept["cells"],
                    "tokens": kept["tokens"],
                    "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
                    "coverage": mapping.coverage.to_dict(),
                }
            )
    if not lengths:
        raise InvalidParameterError(
            f"No cell passes the filters (min_genes {config.min_genes}). Lower min_genes; for a gene panel set it "
            "under the source.",
            field="min_genes",
        )
    every = np.repeat(list(lengths), list(lengths.values()))
    quantiles = np.quantile(every, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {
        "format_version": FORMAT_VERSION,
        "perturbscope_version": __version__,
        "family": config.family,
        "family_config": {"max_length": config.max_length},
        "vocabulary_hash": vocabulary.hash,
        "vocabulary_source": vocabulary.source,
        "config": plain(config),
        "cells": len(every),
        "tokens": int(every.sum()),
        "length_quantiles": dict(zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)),
        "sources": sources,
        "shards": shards.written,
        "labels": {name: list(values) for name, values in labels.items()},
    }


def _tokenize(
    cells: CellSource,
    number: int,
    config: CorpusConfig,
    family: Family,
    mapping: GeneMapping,
    dropped: Counter[str],
    progress: Progress | None,
) -> Iterator[tuple[NDArray[np.int64], TokenizedCells]]:
    """Rows and tokens of the cells of one file that pass all filters; the others are counted in `dropped`."""
    source = config.sources[number]
    min_genes = config.min_genes if source.min_genes is None else source.min_genes
    keep = keep_cells(cells, config, number, dropped)
    n_read = 0
    for rows, counts in chunks(cells, keep):
        n_read += len(rows)
        good = np.diff(counts.counts.indptr) >= min_genes
        known = counts.counts[:, mapping.rows >= 0].getnnz(axis=1) > 0
        dropped.update(below_min_genes=int((~good).sum()), no_known_gene=int((good & ~known).sum()))
        chosen = np.flatnonzero(good & known)
        if len(chosen):
            yield rows[chosen], family.tokenize(counts[chosen])
        if progress:
            progress(name_of(source), int(rows[-1]) + 1, cells.n_cells)
    dropped["empty"] += int(keep.sum()) - n_read
    if progress:
        progress(name_of(source), cells.n_cells, cells.n_cells)


def keep_cells(
    cells: CellSource, config: CorpusConfig, number: int, dropped: Counter[str] | None = None
) -> NDArray[np.bool_]:
    """Which cells of source `number` pass the filters that need no counts; the others are counted in `dropped`."""
    source = config.sources[number]
    dropped = Counter() if dropped is None else dropped
    keep = np.ones(cells.n_cells, dtype=bool)

    def drop(bad: NDArray[np.bool_], reason: str) -> None:
        dropped[reason] += int((keep & bad).sum())
        keep[bad] = False

    for column, wanted in source.select.items():
        drop(~np.isin(cells.labels(column, field="select").astype(str), wanted), f"{column}_not_selected")
    if config.primary_key in cells.columns:
        primary = cells.labels(config.primary_key).astype(str)
        drop(np.isin(np.char.lower(primary.astype(np.str_)), ("false", "0")), "not_primary")
    if config.exclude_cancer and config.disease_key in cells.columns:
        diseases = cells.labels(config.disease_key).astype(str)
        names, codes = np.unique(diseases.astype(np.str_), return_inverse=True)
        terms = [term.casefold() for term in config.cancer_terms]
        cancer = np.array([any(term in name.casefold() for term in terms) for name in names.tolist()])
        drop(cancer[codes], "cancer")
    left = np.flatnonzero(keep)
    if source.max_cells is not None and len(left) > source.max_cells:
        chosen = np.zeros(cells.n_cells, dtype=bool)
        rng = np.random.default_rng([config.seed, number])
        chosen[rng.choice(left, source.max_cells, replace=False)] = True
        drop(~chosen, "over_max_cells")
    return keep


def _label_codes(cells: CellSource, known: Mapping[str, dict[str, int]]) -> dict[str, NDArray[np.int32]]:
    """Each label of each cell as a code; new names get the next code in `known`."""
    codes: dict[str, NDArray[np.int32]] = {}
    for column, names in known.items():
        if column not in cells.columns:
            codes[column] = np.full(cells.n_cells, -1, dtype=np.int32)
            continue
        values = cells.labels(column)
        for name in sorted({value for value in values if value is not None}):
            names.setdefault(name, len(names))
        codes[column] = np.array([-1 if value is None else names[value] for value in values], dtype=np.int32)
    return codes


def _fingerprint(config: CorpusConfig, vocabulary: GeneVocabulary) -> str:
    """Equal for configurations that give the same corpus; where it is written and how it is cut do not count."""
    values = plain(config)
    for name in ("path", "vocabulary", "chunk_cells", "shard_tokens"):
        del values[name]
    files = [_identity(Path(source.path)) for source in config.sources]
    text = json.dumps([values, vocabulary.hash, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(path: Path) -> str:
    """SHA-256 of a file."""
    try:
        return sha256(path)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.", field="sources") from error


def _of_stage(path: str, overrides: Sequence[str]) -> tuple[CorpusConfig, GeneVocabulary | None]:
    """The corpus of a stage's configuration; fine-tuning takes the vocabulary of the checkpoint that it starts from."""
    if strict.has_key(path, "checkpoint", overrides):
        from training.contrastive import corpus_config  # imports torch

        return corpus_config(strict.read(ContrastiveConfig, path, overrides))
    return strict.section(CorpusConfig, path, "corpus", overrides), None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = commands.parser("Build the corpus of a training configuration: raw counts -> token shards.")
    options = parser.parse_args(arguments)

    def build() -> None:
        config, vocabulary = _of_stage(options.config, options.set)
        with commands.cell_progress() as progress:
            corpus = build_corpus(config, vocabulary=vocabulary, overwrite=options.overwrite, progress=progress)
        commands.show_corpus(corpus)

    return commands.run(build)


if __name__ == "__main__":
    raise SystemExit(main())

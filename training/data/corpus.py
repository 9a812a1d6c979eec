"""Build a corpus: from raw counts in ``.h5ad`` files or a SOMA store to tokens in memory-mapped shards.

Cells are read, filtered and tokenized chunk by chunk, so memory does not grow with the counts (labels and filters take
some tens of bytes a cell). The directory appears under its name only when it is complete. A run that was interrupted
goes on after its last finished shard, and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope import __version__
from perturbscope.cells.genes import GeneMapping, GeneResolver
from perturbscope.cells.readers import CellSource
from perturbscope.cells.vocabulary import SHIPPED, GeneVocabulary
from perturbscope.errors import BundleError, InvalidInputError, InvalidParameterError, UnreadableFileError
from perturbscope.families import Family, load_family
from perturbscope.families.tokens import TokenizedCells
from perturbscope.threads import ahead
from training.config.stages import CorpusConfig
from training.config.strict import plain
from training.data.shards import FORMAT_VERSION, MANIFEST, VOCABULARY, Corpus, ShardsWriter
from training.data.sources import (
    Progress,
    chunks,
    keep_cells,
    label_codes,
    name_of,
    not_raw,
    open_source,
    source_digests,
    stamp,
)
from training.data.staging import Staging


def build_corpus(
    config: CorpusConfig,
    *,
    vocabulary: GeneVocabulary | None = None,
    overwrite: bool = False,
    anew: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Build the corpus that `config` describes, or open it if it exists.

    Parameters
    ----------
    config
        Sources, filters and labels.
    vocabulary
        Genes, tokens and medians; by default, those that `config` names.
    overwrite
        Replace a corpus that is damaged, or was built from another configuration.
    anew
        Replace one of the same configuration too: a store is known by its address, behind which cells may change.
    progress
        Called after every chunk.

    Raises
    ------
    InvalidParameterError
        `config.path` holds something else, or a corpus of another configuration and `overwrite` is false; or no cell
        passes the filters.
    InvalidInputError
        A file is unreadable, holds no raw counts, or holds none of the model's genes; the message names it.
    """
    path = Path(config.path)
    vocabulary = vocabulary or read_vocabulary(config.vocabulary)
    names = [name_of(source) for source in config.sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidParameterError(f"Two sources have the name {twice!r}. Give one of them a name.", field="sources")
    digests = source_digests(config.sources, _known(path))
    wanted = _fingerprint(config, vocabulary, digests)
    if path.exists():
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise InvalidParameterError(
                f"{path} exists and is not a corpus, so it is not replaced. Give another path.", field="corpus.path"
            )
        corpus = None if anew else _opened(path, damaged=overwrite)
        if corpus is not None and corpus.manifest["fingerprint"] == wanted:
            return corpus
        if not (overwrite or anew):
            raise InvalidParameterError(
                f"The corpus {path} was built from another configuration or other files. Build it again with "
                "python -m training corpus CONFIG --overwrite, or give another path.",
                field="corpus.path",
            )
    family = load_family(config.family, config.family_config, vocabulary)
    staging = Staging(path, fingerprint=wanted)
    with staging.open() as state:
        manifest_values = _write(staging, state, config, family, vocabulary, digests, progress)
        manifest_values["fingerprint"] = wanted
        (staging.path / VOCABULARY).write_text(vocabulary.to_tsv(), encoding="utf-8")
        (staging.path / MANIFEST).write_text(json.dumps(manifest_values, indent=2) + "\n", encoding="utf-8")
    return Corpus(path)


def _known(path: Path) -> list[dict[str, Any]]:
    """Return the sources that the corpus at `path` has read; none if it is not there or cannot be read."""
    try:
        sources: list[dict[str, Any]] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return sources


def _opened(path: Path, *, damaged: bool) -> Corpus | None:
    """Open a corpus; None for one that cannot be read, if it may be `damaged`."""
    try:
        return Corpus(path)
    except BundleError:
        if not damaged:
            raise
    return None


def read_vocabulary(name: str) -> GeneVocabulary:
    """Return the vocabulary that a configuration names.

    Raises
    ------
    UnreadableFileError
        There is no such file.
    """
    try:
        return GeneVocabulary.named(name) or GeneVocabulary.read(Path(name))
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(
            f"The vocabulary {name} cannot be read: {error}. Give a TSV file, or {' or '.join(SHIPPED)}.",
            field="vocabulary",
        ) from error


@dataclass
class _Position:
    """Progress of the work, as :meth:`Staging.save` keeps it."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    """Finished shards."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the finished sources in the manifest."""
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Values of each label, in the order of their codes."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Number of cells of each length."""
    row: int = 0
    """Rows of the current source that are done."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Dropped cells of the current source, by reason."""
    kept: dict[str, int] = field(default_factory=dict)
    """Cells and tokens kept of the current source."""


def _write(
    staging: Staging,
    saved: dict[str, Any] | None,
    config: CorpusConfig,
    family: Family,
    vocabulary: GeneVocabulary,
    digests: Sequence[str],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write all shards, or those that `saved` lacks. Returns the values of the manifest."""
    at = _Position(**saved or {})
    labels = {name: {value: code for code, value in enumerate(at.labels.get(name, ()))} for name in config.labels}
    lengths: Counter[int] = Counter({int(length): count for length, count in at.lengths.items()})
    with ShardsWriter(staging.path, family, config.labels, max_tokens=config.shard_tokens, written=at.shards) as shards:
        for number in range(len(at.sources), len(config.sources)):
            source = config.sources[number]
            dropped, kept = Counter(at.dropped), Counter(at.kept)
            try:
                with open_source(source, chunk_cells=config.chunk_cells) as cells:
                    n_cells = cells.n_cells
                    codes = label_codes(cells, labels)
                    mapping = GeneResolver.default().map(cells.gene_ids, vocabulary)
                    tokenized = _tokenize(cells, number, config, family, mapping, dropped, progress, first=at.row)
                    for end, rows, tokens in tokenized:
                        per_cell = {f"label-{name}": values[rows] for name, values in codes.items()}
                        of_file = np.full(len(rows), number, dtype=np.int32)
                        shards.append(tokens, {"source": of_file, "row": rows, **per_cell})
                        lengths.update(tokens.lengths.tolist())
                        kept.update(cells=len(rows), tokens=int(tokens.offsets[-1]))
                        if shards.is_full:
                            shards.close()
                            listed = {name: list(values) for name, values in labels.items()}
                            now = _Position(shards.written, at.sources, listed, lengths, end, dropped, kept)
                            staging.save(vars(now))
            except InvalidInputError as error:
                raise type(error)(f"{source.path}: {error.message}", field=error.field) from error
            at.row, at.dropped, at.kept = 0, {}, {}
            at.sources.append(
                {
                    "name": name_of(source),
                    "path": source.path,
                    "sha256": digests[number],
                    "file": stamp(source),
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
        "family_config": config.family_config,
        "vocabulary_hash": vocabulary.hash,
        "vocabulary_source": vocabulary.source,
        "config": plain(config),
        "cells": len(every),
        "tokens": int(every.sum()),
        "length_quantiles": dict(zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)),
        "sources": at.sources,
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
    *,
    first: int = 0,
) -> Iterator[tuple[int, NDArray[np.int64], TokenizedCells]]:
    """Tokenize the cells of one source that pass all filters, from row `first` on; count the others in `dropped`.

    Yields the row up to which all cells are kept or counted, the rows of the kept cells, and their tokens.
    """
    source = config.sources[number]
    min_genes = config.min_genes if source.min_genes is None else source.min_genes
    keep = keep_cells(cells, config, number, Counter() if first else dropped)
    keep[:first] = False
    done = first

    def advance(end: int, n_read: int) -> None:
        nonlocal done
        n_not_raw = not_raw(cells, done, end)
        dropped.update(not_raw_counts=n_not_raw, empty=int(keep[done:end].sum()) - n_read - n_not_raw)
        done = end

    for rows, counts in ahead(chunks(cells, keep)):
        advance(int(rows[-1]) + 1, len(rows))
        good = np.diff(counts.counts.indptr) >= min_genes
        known = counts.counts[:, mapping.rows >= 0].getnnz(axis=1) > 0
        dropped.update(below_min_genes=int((~good).sum()), no_known_gene=int((good & ~known).sum()))
        passing = np.flatnonzero(good & known)
        if len(passing):
            yield done, rows[passing], family.tokenize(counts[passing])
        if progress:
            progress(name_of(source), done, cells.n_cells)
    advance(cells.n_cells, 0)
    if progress:
        progress(name_of(source), cells.n_cells, cells.n_cells)


def _fingerprint(config: CorpusConfig, vocabulary: GeneVocabulary, digests: Sequence[str]) -> str:
    """Return a digest that is equal for configurations of the same corpus; place and shard size do not count."""
    values = plain(config)
    for name in ("path", "vocabulary", "chunk_cells", "shard_tokens"):
        del values[name]
    for source in values["sources"]:
        if source["soma"] is None:  # a file: the fingerprint is that of corpora from before there were stores
            del source["soma"]
        for name in ("context_key", "control_fractions", "unlabelled"):  # what fine-tuning makes of the cells
            del source[name]
    text = json.dumps([values, vocabulary.hash, list(digests)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

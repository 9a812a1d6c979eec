"""``python -m training corpus CONFIG``: build token shards from raw counts.

``python -m training corpus verify DIRECTORY`` compares a corpus with the digests of its manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError
from training import console, families
from training.config import strict
from training.config.stages import ContrastiveConfig, CorpusConfig
from training.data.corpus import build_corpus
from training.data.shards import Corpus
from training.data.sources import name_of

if TYPE_CHECKING:
    from training.checkpoint import Checkpoint


def build(
    config: CorpusConfig, *, vocabulary: GeneVocabulary | None = None, overwrite: bool = False, anew: bool = False
) -> None:
    """Build a corpus with a progress bar, and print what it holds, what was dropped and why.

    Parameters and errors are those of :func:`training.data.corpus.build_corpus`.
    """
    with console.cell_progress() as progress:
        corpus = build_corpus(config, vocabulary=vocabulary, overwrite=overwrite, anew=anew, progress=progress)
    console.stderr().print(_contents(corpus))


def corpus_of_checkpoint(config: ContrastiveConfig, checkpoint: Checkpoint) -> CorpusConfig:
    """Return the corpus of a fine-tuning, with every label that it needs; tokens are made as for `checkpoint`.

    Raises
    ------
    InvalidParameterError
        Family, its options or the length do not suit the checkpoint.
    """
    cells = config.corpus
    if cells.family != checkpoint.family:
        raise InvalidParameterError(
            f"The checkpoint is of the family {checkpoint.family}, the corpus of {cells.family}.", field="corpus.family"
        )
    options = {name: value for name, value in checkpoint.family_config.items() if name != "max_length"}
    for name, value in cells.family_options.items():
        if options.get(name) != value:
            raise InvalidParameterError(
                f"corpus.family_options has {name} {value!r}, the checkpoint {options.get(name)!r}. Remove it: the "
                "options of the checkpoint are used.",
                field=f"corpus.family_options.{name}",
            )
    longest = families.load(checkpoint.family).parse_config(checkpoint.model_config).max_length
    if cells.max_length > longest:
        raise InvalidParameterError(
            f"corpus.max_length is {cells.max_length}, but the checkpoint's model takes {longest} tokens. Lower it.",
            field="corpus.max_length",
        )
    contexts = (source.context_key for source in cells.sources if source.context_key is not None)
    labels = dict.fromkeys((*cells.labels, *(source.perturbation_key for source in cells.sources), *contexts))
    named = tuple(replace(source, name=name_of(source)) for source in cells.sources)
    return replace(cells, labels=tuple(labels), sources=named, family_options=options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["verify"]:
        return _verify(words[1:])
    parser = console.parser("Build the corpus of a training configuration: token shards from raw counts.")
    options = parser.parse_args(words)

    def body() -> None:
        if not strict.has_key(options.config, "checkpoint", options.set):
            build(strict.section(CorpusConfig, options.config, "corpus", options.set), anew=options.overwrite)
            return
        from training.checkpoint import load_checkpoint  # imports torch, which pre-training's corpus does not need

        config = strict.read(ContrastiveConfig, options.config, options.set)
        checkpoint = load_checkpoint(config.checkpoint)
        cells = corpus_of_checkpoint(config, checkpoint)
        build(cells, vocabulary=checkpoint.vocabulary, anew=options.overwrite)

    return console.run(body)


def _verify(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training corpus verify",
        description="Compare the files of a corpus with the digests in its manifest, and values with their bounds.",
    )
    parser.add_argument("corpus", metavar="DIRECTORY")
    options = parser.parse_args(words)

    def body() -> None:
        corpus = Corpus(options.corpus)
        with console.cell_progress("files") as progress:
            n_files = corpus.verify(progress)
        told = f"all {n_files} files are as they were written" if n_files else "it has no digests; bounds are kept"
        console.stderr().print(f"{corpus.path}: {len(corpus):,} cells, {told}")

    return console.run(body, resumes=False)


def _contents(corpus: Corpus) -> Table:
    table = Table("source", "cells", "kept", "dropped", "tokens", title=str(corpus.path))
    for source in corpus.manifest["sources"]:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in source["dropped"].items())
        table.add_row(
            source["name"], f"{source['cells']:,}", f"{source['kept']:,}", dropped or "none", f"{source['tokens']:,}"
        )
    return table

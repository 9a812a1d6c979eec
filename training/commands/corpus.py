"""``python -m training corpus CONFIG``: raw counts to token shards."""

from __future__ import annotations

from collections.abc import Sequence

from perturbscope.cells.genes import GeneVocabulary
from training import console
from training.config import strict
from training.config.stages import ContrastiveConfig, CorpusConfig
from training.data.corpus import build_corpus


def _of_stage(path: str, overrides: Sequence[str]) -> tuple[CorpusConfig, GeneVocabulary | None]:
    """The corpus of a stage's configuration; fine-tuning takes the vocabulary of the checkpoint that it starts from."""
    if strict.has_key(path, "checkpoint", overrides):
        from training.commands.finetune import corpus_config  # imports torch

        return corpus_config(strict.read(ContrastiveConfig, path, overrides))
    return strict.section(CorpusConfig, path, "corpus", overrides), None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = console.parser("Build the corpus of a training configuration: raw counts -> token shards.")
    options = parser.parse_args(arguments)

    def build() -> None:
        config, vocabulary = _of_stage(options.config, options.set)
        with console.cell_progress() as progress:
            corpus = build_corpus(config, vocabulary=vocabulary, overwrite=options.overwrite, progress=progress)
        console.show_corpus(corpus)

    return console.run(build)

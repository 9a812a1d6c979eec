"""``python -m training pretrain CONFIG``: pre-train a model on a corpus of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import console
from training.commands.corpus import build
from training.config import strict
from training.config.stages import PretrainConfig
from training.data.shards import Corpus
from training.loop.process import Process
from training.loop.stage import run_stage
from training.objectives.masked import MaskedTask


def pretrain(config: PretrainConfig, *, overwrite: bool = False) -> Path | None:
    """Run the stage; the checkpoint's path (None in other processes than the first).

    Raises
    ------
    PerturbScopeError
        As :func:`training.data.corpus.build_corpus`, :func:`training.loop.loop.train` and
        :func:`training.checkpoint.save_checkpoint`.
    """

    def prepare() -> None:
        build(config.corpus, overwrite=overwrite)

    def make(process: Process) -> tuple[MaskedTask, Corpus, dict[str, Any]]:
        corpus = Corpus(config.corpus.path)
        task = MaskedTask(config, corpus, process)
        facts = {"train_cells": len(task.train_cells), "validation_cells": len(task.validation_cells)}
        return task, corpus, facts

    return run_stage("masked language model", config, prepare=prepare, make=make, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = console.parser("Pre-train a model on a corpus of cells.").parse_args(arguments)

    def train() -> None:
        pretrain(strict.read(PretrainConfig, options.config, options.set), overwrite=options.overwrite)

    return console.run(train)

"""``python -m training pretrain CONFIG``: pre-train a model on a corpus of cells.

``torchrun --nproc-per-node 4 -m training pretrain CONFIG`` or ``deepspeed --num_gpus 4 --module training pretrain
CONFIG`` run it on several processes, with ``loop.deepspeed`` set.
"""

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
from training.loop.stage import START, Again, run_stage
from training.objectives.masked import MaskedTask


def pretrain(config: PretrainConfig, *, again: Again = START) -> Path | None:
    """Run the stage. Returns the path of the checkpoint; None in other processes than the first.

    Raises
    ------
    PerturbScopeError
        :func:`training.data.corpus.build_corpus`, :func:`training.loop.loop.train` or
        :func:`training.checkpoint.save_checkpoint` fails.
    """

    def prepare() -> None:
        build(config.corpus, overwrite=again.overwrite)

    def make(process: Process) -> tuple[MaskedTask, Corpus, dict[str, Any]]:
        corpus = Corpus(config.corpus.path)
        task = MaskedTask(config, corpus, process)
        facts = {"train_cells": len(task.train_cells), "validation_cells": len(task.validation_cells)}
        return task, corpus, facts

    return run_stage("masked language model", config, prepare=prepare, make=make, again=again)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = console.parser("Pre-train a model on a corpus of cells.")
    console.add_extend(parser)
    options = parser.parse_args(arguments)

    def train() -> None:
        again = Again(overwrite=options.overwrite, extend=options.extend)
        pretrain(strict.read(PretrainConfig, options.config, options.set), again=again)

    return console.run(train)

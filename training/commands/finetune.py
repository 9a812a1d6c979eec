"""``python -m training finetune CONFIG``: fine-tune a pre-trained model on perturbation data sets.

``torchrun --nproc-per-node 4 -m training finetune CONFIG`` or ``deepspeed --num_gpus 4 --module training finetune
CONFIG`` run it on several processes, with ``loop.deepspeed`` set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training import console, families
from training.checkpoint import Checkpoint, load_checkpoint
from training.commands.corpus import build, corpus_of_checkpoint
from training.config import strict
from training.config.stages import ContrastiveConfig
from training.config.strict import plain
from training.data.heldout import has_heldout, write_heldout
from training.data.shards import Corpus
from training.data.sources import name_of
from training.data.splits import DataSplit, load_splits, make_splits, save_splits
from training.loop.process import Process
from training.loop.stage import SPLITS, START, Again, StageTask, run_stage
from training.objectives.contrastive import ContrastiveTask
from training.objectives.mixed import MixedTask

NEW_SPLITS = ".splits.new.json"
HELDOUT = "heldout.h5ad"


def finetune(config: ContrastiveConfig, *, again: Again = START) -> Path | None:
    """Run the stage. Returns the path of the checkpoint; None in other processes than the first.

    Beside the checkpoint it writes ``splits.json``, ``metrics.json`` and, for each data set, the held-out cells:
    ``heldout.h5ad``, or ``heldout-<name>.h5ad`` if there are several data sets.

    Raises
    ------
    PerturbScopeError
        :func:`training.data.corpus.build_corpus`, :func:`training.data.splits.make_splits`,
        :func:`training.loop.loop.train` or :func:`training.checkpoint.save_checkpoint` fails.
    """
    output = Path(config.output)
    checkpoint = load_checkpoint(config.checkpoint)
    cells = corpus_of_checkpoint(config, checkpoint)

    def prepare() -> None:
        build(cells, vocabulary=checkpoint.vocabulary, overwrite=again.overwrite)
        corpus = Corpus(cells.path)
        if saved(corpus) is None:
            with console.cell_progress() as progress:
                splits = make_splits(
                    corpus, cells.sources, config.degs, config.split, progress=progress, say=console.stderr().print
                )
            # Those of an earlier run are replaced when this one is complete.
            name = NEW_SPLITS if (output / SPLITS).exists() else SPLITS
            save_splits(output / name, splits, fingerprint=_split_fingerprint(config, corpus))

    def saved(corpus: Corpus) -> list[DataSplit] | None:
        fingerprint = _split_fingerprint(config, corpus)
        found = (load_splits(output / name, fingerprint=fingerprint) for name in (SPLITS, NEW_SPLITS))
        return next((splits for splits in found if splits is not None), None)

    def make(process: Process) -> tuple[StageTask, Corpus, dict[str, Any]]:
        corpus = Corpus(cells.path)
        splits = saved(corpus) or []
        for split in splits:
            listed = (f"{part}: {', '.join(split.targets[part]) or 'none'}" for part in ("train", "validation", "test"))
            console.stderr().print(f"{split.name}: {'; '.join(listed)}")
        objective = ContrastiveTask if config.mixed is None else MixedTask
        task: StageTask = objective(replace(config, corpus=cells), corpus, splits, checkpoint, process)
        return task, corpus, _facts(splits, checkpoint)

    labelled = [source for source in cells.sources if not source.unlabelled]
    heldout = {
        name_of(source): output / (HELDOUT if len(labelled) == 1 else f"heldout-{name_of(source)}.h5ad")
        for source in labelled
    }

    def write() -> None:
        corpus = Corpus(cells.path)
        splits = saved(corpus) or []
        if (output / NEW_SPLITS).exists():
            (output / NEW_SPLITS).replace(output / SPLITS)
        for number, (source, split) in enumerate(zip(cells.sources, splits, strict=True)):
            if source.unlabelled:
                continue
            target = heldout[split.name]
            counts = write_heldout(
                target, corpus, number, source, split, score_ineligible=config.split.score_ineligible
            )
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            told = f"{target}: {kinds} cells" if any(counts.values()) else f"{split.name}: no cell was held out"
            console.stderr().print(told)

    def is_finished() -> bool:
        splits = saved(Corpus(cells.path)) or [] if Path(cells.path).exists() else []
        wanted = [split.name for split in splits if has_heldout(split, score_ineligible=config.split.score_ineligible)]
        return all(heldout[name].exists() for name in wanted if name in heldout)

    return run_stage(
        "margin contrastive loss on pairs of cells" if config.mixed is None else "mixed batches",
        config,
        prepare=prepare,
        make=make,
        again=again,
        select_best=config.select == "best",
        further=write,
        is_finished=is_finished,
    )


def _split_fingerprint(config: ContrastiveConfig, corpus: Corpus) -> str:
    values = [plain(config.degs), plain(config.split), corpus.manifest["fingerprint"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _facts(splits: Sequence[DataSplit], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return facts for the provenance beyond data and hyper-parameters."""
    half = families.load(checkpoint.family)
    return {
        "split": {
            split.name: {
                "targets": split.targets,
                "controls": {part: len(rows) for part, rows in split.controls.items()},
                "degs": split.degs,
            }
            for split in splits
        },
        "untrained": half.embedding(half.parse_config(checkpoint.model_config)).untrained,
        "parent": {"path": str(checkpoint.path), **checkpoint.provenance},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = console.parser("Fine-tune a pre-trained model on perturbation data sets.")
    console.add_extend(parser)
    options = parser.parse_args(arguments)

    def train() -> None:
        again = Again(overwrite=options.overwrite, extend=options.extend)
        finetune(strict.read(ContrastiveConfig, options.config, options.set), again=again)

    return console.run(train)

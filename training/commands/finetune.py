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
from training.data.heldout import write_heldout
from training.data.shards import Corpus
from training.data.splits import DataSplit, load_splits, make_splits, save_splits
from training.loop.process import Process
from training.loop.stage import StageTask, run_stage
from training.objectives.contrastive import ContrastiveTask
from training.objectives.mixed import MixedTask

SPLITS = "splits.json"
HELDOUT = "heldout.h5ad"


def finetune(config: ContrastiveConfig, *, overwrite: bool = False) -> Path | None:
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
        build(cells, vocabulary=checkpoint.vocabulary, overwrite=overwrite)
        corpus = Corpus(cells.path)
        output.mkdir(parents=True, exist_ok=True)
        fingerprint = _split_fingerprint(config, corpus)
        if load_splits(output / SPLITS, fingerprint=fingerprint) is None:
            with console.cell_progress() as progress:
                splits = make_splits(corpus, cells.sources, config.degs, config.split, progress=progress)
            save_splits(output / SPLITS, splits, fingerprint=fingerprint)

    def make(process: Process) -> tuple[StageTask, Corpus, dict[str, Any]]:
        corpus = Corpus(cells.path)
        splits = load_splits(output / SPLITS, fingerprint=_split_fingerprint(config, corpus)) or []
        for split in splits:
            listed = (f"{part}: {', '.join(split.targets[part]) or 'none'}" for part in ("train", "validation", "test"))
            console.stderr().print(f"{split.name}: {'; '.join(listed)}")
        objective = ContrastiveTask if config.mixed is None else MixedTask
        task: StageTask = objective(replace(config, corpus=cells), corpus, splits, checkpoint, process)
        return task, corpus, _facts(splits, checkpoint)

    path = run_stage(
        "margin contrastive loss on pairs of cells" if config.mixed is None else "mixed batches",
        config,
        prepare=prepare,
        make=make,
        overwrite=overwrite,
        select_best=config.select == "best",
    )
    if path is not None:
        corpus = Corpus(cells.path)
        splits = load_splits(output / SPLITS, fingerprint=_split_fingerprint(config, corpus)) or []
        alone = sum(not source.unlabelled for source in cells.sources) == 1
        for number, (source, split) in enumerate(zip(cells.sources, splits, strict=True)):
            if source.unlabelled:
                continue
            target = output / (HELDOUT if alone else f"heldout-{split.name}.h5ad")
            counts = write_heldout(
                target, corpus, number, source, split, score_ineligible=config.split.score_ineligible
            )
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
            console.stderr().print(f"{target}: {kinds} cells")
    return path


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
    options = console.parser("Fine-tune a pre-trained model on perturbation data sets.").parse_args(arguments)

    def train() -> None:
        finetune(strict.read(ContrastiveConfig, options.config, options.set), overwrite=options.overwrite)

    return console.run(train)

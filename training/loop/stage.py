"""A stage around the loop: join the processes, prepare the data, train, write the checkpoint with its provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from perturbscope.cells.files import write_json
from perturbscope.errors import BundleError
from training import console
from training.checkpoint import save_checkpoint
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.config.strict import plain
from training.data.shards import Corpus
from training.loop import provenance
from training.loop.loop import Outcome, Task, start_anew, train
from training.loop.process import Process, join, leave

CHECKPOINT = "checkpoint"
METRICS = "metrics.json"


class StageTask(Task, Protocol):
    """A task whose model can be saved."""

    @property
    def model_config(self) -> Any:
        """Model configuration of the family."""
        ...

    @property
    def family_config(self) -> dict[str, Any]:
        """Options of the tokenizer of the family."""
        ...


def run_stage(
    objective: str,
    config: PretrainConfig | ContrastiveConfig,
    *,
    prepare: Callable[[], None],
    make: Callable[[Process], tuple[StageTask, Corpus, dict[str, Any]]],
    overwrite: bool,
    select_best: bool = False,
) -> Path | None:
    """Train one stage and write its checkpoint and metrics.

    Parameters
    ----------
    objective
        Name of the objective, for the provenance.
    config
        Configuration of the stage.
    prepare
        Builds missing data; the first process runs it while the others wait.
    make
        Returns the task, its corpus, and further facts for the provenance.
    overwrite
        Whether to start anew and replace earlier results.
    select_best
        Whether to save the weights of the lowest validation loss.

    Returns
    -------
    Path of the checkpoint; None in other processes than the first.

    Raises
    ------
    BundleError
        The run is complete already, and `overwrite` is false.
    """
    output = Path(config.output)
    process = join(config.loop)
    try:
        if (output / CHECKPOINT).exists() and not overwrite:
            raise BundleError(
                f"{output / CHECKPOINT} exists already: the run is complete. Start anew with --overwrite, or give "
                "another output.",
                field="output",
            )

        def begin() -> None:
            if overwrite:
                start_anew(output)
            prepare()

        process.first(begin)
        task, corpus, facts = make(process)
        outcome = train(
            task,
            config.loop,
            config.optimizer,
            process,
            output=output,
            fingerprint=_fingerprint(config, corpus, facts),
            select_best=select_best,
        )
        if not process.is_first:
            return None
        return _finish(objective, config, task, corpus, facts, outcome, process)
    finally:
        leave()


def _finish(
    objective: str,
    config: PretrainConfig | ContrastiveConfig,
    task: StageTask,
    corpus: Corpus,
    facts: dict[str, Any],
    outcome: Outcome,
    process: Process,
) -> Path:
    output = Path(config.output)
    result = outcome.to_dict()
    record = {
        "objective": objective,
        "result": result,
        "hyper_parameters": plain(config),
        "data": provenance.data(corpus),
        "code": provenance.code(),
        "hardware": provenance.hardware(process.device, process.world_size),
        **facts,
    }
    path = save_checkpoint(
        output / CHECKPOINT,
        model=outcome.weights,
        family=corpus.manifest["family"],
        family_config=task.family_config,
        model_config=task.model_config,
        vocabulary=corpus.vocabulary,
        provenance=record,
        overwrite=True,
    )
    write_json(output / METRICS, {**result, **{key: facts[key] for key in facts if key != "parent"}})
    speed = outcome.tokens / max(outcome.seconds, 1e-9)
    console.stderr().print(
        f"{path}: {outcome.steps:,} steps, loss {outcome.final_loss:.4f}, {outcome.seconds:.0f} s, "
        f"{speed:,.0f} tokens/s"
    )
    return path


def _fingerprint(config: PretrainConfig | ContrastiveConfig, corpus: Corpus, facts: dict[str, Any]) -> str:
    """Return a digest of all that decides the losses, so not of paths, intervals of writing, or shards."""
    values = plain(config)
    for name in ("output", "corpus"):
        del values[name]
    for name in ("checkpoint_every", "keep_states", "threads", "device"):
        del values["loop"][name]
    text = json.dumps([values, corpus.manifest["fingerprint"], facts, torch.__version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

"""A stage around the loop: join the processes, prepare the data, train, write the checkpoint with its provenance."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perturbscope.cells.files import write_json
from perturbscope.errors import BundleError, InvalidParameterError
from training import console
from training.checkpoint import save_checkpoint
from training.config.stages import ContrastiveConfig, PretrainConfig
from training.config.strict import plain
from training.data.shards import Corpus
from training.loop import provenance
from training.loop.engine import deepspeed_config
from training.loop.loop import LEFT_BY_THE_LOOP, Outcome, Task, check_plan, train
from training.loop.process import Process, join, leave

CHECKPOINT = "checkpoint"
METRICS = "metrics.json"
SPLITS = "splits.json"
PREVIOUS = ".previous"
"""Folder of the output in which the results of an earlier run wait until those of the new one stand."""
RESULTS = (CHECKPOINT, METRICS, SPLITS, *LEFT_BY_THE_LOOP)
_LOCK = ".lock"
_LENGTHS = frozenset({"loop.epochs", "loop.max_steps"})


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


@dataclass(frozen=True, kw_only=True)
class Again:
    """What a command does with the results of an earlier run."""

    overwrite: bool = False
    """Start anew; the earlier results are kept aside until the new checkpoint stands."""
    extend: bool = False
    """Go on from the last state of a run that had fewer epochs or max_steps."""


START = Again()
"""Start, or go on from the last state of the same run."""


def run_stage(
    objective: str,
    config: PretrainConfig | ContrastiveConfig,
    *,
    prepare: Callable[[], None],
    make: Callable[[Process], tuple[StageTask, Corpus, dict[str, Any]]],
    again: Again,
    select_best: bool = False,
    further: Callable[[], None] | None = None,
    is_finished: Callable[[], bool] | None = None,
) -> Path | None:
    """Train one stage and write its checkpoint and metrics.

    Everything is made and checked before an earlier run is touched. If a run was interrupted after its last step, only
    what is missing is written.

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
    again
        What to do with the results of an earlier run.
    select_best
        Whether to save the weights of the lowest validation loss.
    further
        Writes further results beside the checkpoint, in the first process.
    is_finished
        Returns whether these results are there.

    Returns
    -------
    Path of the checkpoint; None in other processes than the first.

    Raises
    ------
    BundleError
        The run is complete already, and is neither to be replaced nor to be extended.
    InvalidParameterError
        Another process trains into the same output.
    """
    output = Path(config.output)
    process = join(config.loop)
    try:
        with _only_run(output, process):
            complete = all((output / name).exists() for name in (CHECKPOINT, METRICS))
            if complete and (is_finished is None or is_finished()) and not (again.overwrite or again.extend):
                raise BundleError(
                    f"{output / CHECKPOINT} exists already: the run is complete. Start anew with --overwrite, train "
                    "longer with --extend, or give another output.",
                    field="output",
                )
            engine = config.loop.deepspeed or "plain torch"
            console.stderr().print(
                f"{process.world_size} process{'es' * (process.world_size > 1)}, {process.device}, {engine}"
            )
            process.first(prepare)
            task, corpus, facts = make(process)
            check_plan(task, config.loop, config.optimizer)
            if again.overwrite:
                process.first(lambda: _set_aside(output))
            outcome = train(
                task,
                config.loop,
                config.optimizer,
                process,
                output=output,
                identity=_identity(config, corpus, facts),
                select_best=select_best,
                may_differ=_LENGTHS if again.extend else frozenset(),
            )
            if not process.is_first:
                return None
            path = _finish(objective, config, task, corpus, facts, outcome, process)
            if further is not None:
                further()
            shutil.rmtree(output / PREVIOUS, ignore_errors=True)
            return path
    finally:
        leave()


@contextmanager
def _only_run(output: Path, process: Process) -> Iterator[None]:
    """Hold the output for the processes of this run."""
    if not process.is_first:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with (output / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InvalidParameterError(
                f"Another run ({file.read().strip() or 'unknown'}) is training into {output}. Wait for it, end it, or "
                "give another output.",
                field="output",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _set_aside(output: Path) -> None:
    """Move the results of an earlier run away; what an unfinished run left is removed if a complete one is kept."""
    found = [output / name for name in RESULTS if (output / name).exists()] + sorted(output.glob("heldout*.h5ad"))
    if not found:
        return
    aside = output / PREVIOUS
    kept = (aside / CHECKPOINT).exists()
    if not kept:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    for path in found:
        if not kept:
            path.rename(aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    console.stderr().print(f"The earlier run is kept in {aside} until the new checkpoint stands.")


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


def _identity(config: PretrainConfig | ContrastiveConfig, corpus: Corpus, facts: dict[str, Any]) -> dict[str, Any]:
    """Return all that decides the losses, so not paths, shards, measures, or when something is written."""
    values = plain(config)
    for name in ("output", "corpus", "checkpoint", "init_from", "validation_z"):
        values.pop(name, None)
    loop = values["loop"]
    for name in ("checkpoint_every", "keep_states", "threads", "device"):
        del loop[name]
    if values.get("select") != "best":
        del loop["validate_every"]
    if config.loop.deepspeed is not None:
        loop["deepspeed"] = deepspeed_config(config.loop, config.optimizer)
    origin = dict(facts.get("parent", {}))
    origin.pop("path", None)
    known = {name: value for name, value in facts.items() if name != "parent"} | ({"parent": origin} if origin else {})
    digests = {name: value if isinstance(value, int) else _digest(value) for name, value in known.items()}
    return {**values, **digests, "corpus": corpus.manifest["fingerprint"]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

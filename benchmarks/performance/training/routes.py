"""One model, trained by this project's loop and by transformers' Trainer, each in a process of its own.

A route's process stops at the end of each turn and waits until it is told to go on, so routes take turns although each
is one uninterrupted run. Both routes see the same cells, start from the same weights, use the same rate, and are
measured on the same held-out batch before and after.
"""

from __future__ import annotations

import functools
import os
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import Child
from training.config.stages import LoopConfig, OptimizerConfig, PretrainConfig, SamplerConfig

RATE = 3e-4
"""Learning rate of all routes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work of every route of a race.

    Attributes
    ----------
    corpus
        Directory of the corpus.
    cells
        Cells of a turn, in the Trainer's batches; int64 [n_steps * batch].
    held_out
        Cells of the batch whose losses are compared.
    batch
        Number of cells of a step.
    turns
        Number of passes over the cells.
    model
        Options of the network.
    threads
        Number of torch's threads.
    """

    corpus: Path
    cells: NDArray[np.int64]
    held_out: NDArray[np.int64]
    batch: int
    turns: int
    model: Mapping[str, Any]
    threads: int

    @property
    def steps(self) -> int:
        """Number of optimiser steps of a turn."""
        return len(self.cells) // self.batch

    def config(self, **loop: Any) -> PretrainConfig:
        """Return the project's configuration of the run; `loop` adds to the section of that name."""
        from training.config.stages import CorpusConfig, SourceConfig

        return PretrainConfig(
            output="unused",
            corpus=CorpusConfig(path=str(self.corpus), sources=(SourceConfig(path="unused"),)),
            model=self.model,
            validation_share=0.0,
            sampler=SamplerConfig(),
            optimizer=OptimizerConfig(base_lr=RATE, schedule="constant"),
            loop=LoopConfig(
                epochs=self.turns,
                micro_batch=self.batch,
                device="cpu",
                threads=self.threads,
                checkpoint_every=10**9,
                validate_every=10**9,
                **loop,
            ),
        )


def choose(lengths: NDArray[np.integer[Any]], *, batch: int, steps: int, seed: int = 0) -> NDArray[np.int64]:
    """Choose cells of `steps` batches of an epoch of the Trainer's own length-grouped sampler over the corpus.

    The batches have evenly spaced ranks of their mean length, so that a few have the length mix of the epoch.
    """
    order = trainer_order(lengths, batch=batch, seed=seed)
    full = order[: len(order) // batch * batch].reshape(-1, batch)
    ranked = full[np.argsort(lengths[full].mean(axis=1), kind="stable")]
    places = ((np.arange(steps) + 0.5) / steps * len(ranked)).astype(int)
    return cast("NDArray[np.int64]", ranked[places].ravel())


def trainer_order(lengths: NDArray[np.integer[Any]], *, batch: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the order of cells in an epoch of transformers' LengthGroupedSampler."""
    import torch
    from transformers.trainer_pt_utils import LengthGroupedSampler

    generator = torch.Generator().manual_seed(seed)
    return np.array(list(LengthGroupedSampler(batch, lengths=lengths.tolist(), generator=generator)), dtype=np.int64)


class Subset:
    """A corpus of some cells of another."""

    def __init__(self, corpus: Any, numbers: NDArray[np.int64]) -> None:
        self._corpus, self._numbers = corpus, numbers
        self.manifest, self.family, self.vocabulary = corpus.manifest, corpus.family, corpus.vocabulary
        self.lengths = corpus.lengths[numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def cells(self, numbers: NDArray[np.integer[Any]]) -> Any:
        """Return the tokens of some of the cells."""
        return self._corpus.cells(self._numbers[numbers])


class Route:
    """A training run in its own process, one turn at a time.

    Parameters
    ----------
    work
        Function of this module, called as ``work(pace, job, folder, **options)``.
    """

    def __init__(self, work: Any, job: Job, **options: Any) -> None:
        self._child = Child(_paced, work, job, options)

    @functools.cached_property
    def first_loss(self) -> float:
        """Held-out loss before the first turn; reading it waits until the process is ready."""
        return float(self._child.receive())

    def turn(self) -> float:
        """Run one turn and return its seconds."""
        self._child.send("go")
        return float(self._child.receive())

    def end(self) -> tuple[float, float]:
        """End the run; return the held-out loss and the process's peak resident memory in MiB."""
        self._child.send("go")
        last, peak = self._child.receive()
        self._child.close()
        return last, peak


class Pace:
    """The route's end of the pipe, which stops after every turn."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self._pipe, self._steps, self._done = pipe, steps, 0

    def start(self, loss: float) -> None:
        """Say that everything is ready, and wait for the first turn."""
        self._pipe.send(loss)
        self._wait()

    def step(self) -> None:
        """Count a step; at the end of a turn, wait for the next."""
        self._done += 1
        if self._done % self._steps == 0:
            self._pipe.send(time.perf_counter() - self._started)
            self._wait()

    def end(self, loss: float) -> None:
        """Say that the run is over."""
        self._pipe.send((loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))

    def _wait(self) -> None:
        self._pipe.recv()
        self._started = time.perf_counter()


def _paced(pipe: Any, work: Any, job: Job, options: dict[str, Any]) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # progress bars of several processes at once
    os.dup2(quiet, 2)
    with tempfile.TemporaryDirectory() as folder:
        work(Pace(pipe, job.steps), job, Path(folder), **options)


def ours(pace: Pace, job: Job, folder: Path, *, warm: int = 1, **loop: Any) -> None:
    """Train with :func:`training.loop.loop.train` and a task that keeps the pace."""
    from training.data.shards import Corpus
    from training.loop import loop as training_loop
    from training.loop.process import join, leave

    config = job.config(**loop)
    process = join(config.loop)
    task = _paced_task(pace, config, Corpus(job.corpus), job, process)
    for number in range(warm):
        task.module(**task.batch(0, number % job.steps, 0)).backward()
        task.module.zero_grad()
    outcome = training_loop.train(task, config.loop, config.optimizer, process, output=folder, identity={})
    pace.end(outcome.validation[-1]["validation_loss"])
    leave()


def _paced_task(pace: Pace, config: PretrainConfig, corpus: Any, job: Job, process: Any) -> Any:
    from training.objectives.masked import MaskedTask

    fixed = held_out_batch(corpus, job.held_out)

    class Paced(MaskedTask):
        def kind(self, epoch: int, index: int) -> str:
            pace.step()
            return ""

        def begin(self, evaluate: Any) -> dict[str, float]:
            pace.start(float(evaluate(fixed)))
            return {}

        def validate(self, evaluate: Any) -> dict[str, float]:
            return {"validation_loss": float(evaluate(fixed))}

    return Paced(config, Subset(corpus, job.cells), process)  # type: ignore[arg-type]


def held_out_batch(corpus: Any, numbers: NDArray[np.int64]) -> dict[str, Any]:
    """Return masked cells, always the same."""
    import torch

    from training import families
    from training.data.batches import padded

    batch = padded(corpus, numbers)
    half = families.load(corpus.manifest["family"])
    return half.mask(batch, family=corpus.family, generator=torch.Generator().manual_seed(1))


def trainer(pace: Pace, job: Job, folder: Path, *, precision: str = "fp32") -> None:
    """Train BertForMaskedLM (SDPA) with transformers.Trainer; batches are those of its own length-grouped sampler."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from training import families
    from training.data.shards import Corpus
    from training.loop.process import join
    from training.objectives.masked import MaskedTask

    corpus = Corpus(job.corpus)
    family = families.load(corpus.manifest["family"])
    config = job.config()
    model: Any = MaskedTask(config, Subset(corpus, job.cells), join(config.loop)).model  # type: ignore[arg-type]
    fixed = held_out_batch(corpus, job.held_out)

    def loss() -> float:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            found = float(model(**fixed).loss)
        model.train()
        return found

    generator = torch.Generator().manual_seed(0)
    pad = corpus.vocabulary.special_tokens["<pad>"]

    def collate(cells: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(cell["input_ids"].astype(np.int64)) for cell in cells],
            batch_first=True,
            padding_value=pad,
        )
        batch = {"input_ids": ids, "attention_mask": (ids != pad).long()}
        return family.mask(batch, family=corpus.family, generator=generator)

    class Steps(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace.start(loss())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.step()

    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=precision == "bf16",
        per_device_train_batch_size=job.batch,
        num_train_epochs=job.turns,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.001,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    warm = collate([dict(corpus.cells(job.cells[at : at + 1])[0]) for at in range(job.batch)])
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        model(**warm).loss.backward()
    model.zero_grad()
    Trainer(
        model=model,
        args=arguments,
        train_dataset=_Cells(corpus, job.cells),
        data_collator=collate,
        callbacks=[Steps()],
    ).train()
    pace.end(loss())


class _Cells:
    """Cells one by one, as Trainer reads them."""

    def __init__(self, corpus: Any, numbers: NDArray[np.int64]) -> None:
        self._corpus, self._numbers = corpus, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return dict(self._corpus.cells(self._numbers[at : at + 1])[0])

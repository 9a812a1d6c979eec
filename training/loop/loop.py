"""The training loop of all objectives, over DeepSpeed or plain torch.

Order of the cells, masks and dropout of micro-batch k in process r are functions of (seed, r, k). So a run that was
killed goes on with the losses that it would have had, and both engines give the same losses.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbscope.cells.files import atomic
from perturbscope.errors import InvalidParameterError
from training import console
from training.config.stages import LoopConfig, OptimizerConfig
from training.errors import NonFiniteLossError, StoppedError
from training.loop.engine import Engine, deepspeed_config, make_engine
from training.loop.journal import Journal, draw_curve, open_journal, read_log, valid
from training.loop.optimizer import check_warmup, learning_rate, peak_learning_rate
from training.loop.process import Process
from training.loop.resume import Position, States
from training.loop.stopping import stop_requests

LOG = "log.jsonl"
_BEST = "best.safetensors"
LEFT_BY_THE_LOOP = ("states", LOG, _BEST, "loss.png")
"""Files and directories that a run leaves in its output."""
_DROPOUT, _MASKS = 1, 2

Evaluate = Callable[[Mapping[str, Tensor]], Any]
"""Runs the module on a batch, without gradients and dropout."""


class Task(Protocol):
    """An objective with its data."""

    @property
    def name(self) -> str:
        """Title of the progress bar."""
        ...

    @property
    def model(self) -> nn.Module:
        """The network whose weights become the checkpoint."""
        ...

    @property
    def module(self) -> nn.Module:
        """Module that is trained, from a batch to a scalar loss; shares its weights with `model`."""
        ...

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one process in an epoch."""
        ...

    def batch(self, epoch: int, index: int, seed: int) -> dict[str, Tensor]:
        """Return micro-batch `index` of an epoch for this process; it depends on the arguments alone.

        It holds ``attention_mask``, by which tokens are counted.
        """
        ...

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of items of which the loss of a micro-batch is the mean, such as labelled tokens.

        Each of them counts once in a step, however the step is cut into micro-batches and processes.
        """
        ...

    def kind(self, epoch: int, index: int) -> str:
        """Return the kind of a micro-batch; losses of each kind are logged apart. "" if there is one kind."""
        ...

    def begin(self, evaluate: Evaluate) -> dict[str, float]:
        """Return measures to log before the first step, equal on every process; empty if there are none."""
        ...

    def validate(self, evaluate: Evaluate) -> dict[str, float]:
        """Return measures on held-out data, with ``validation_loss``, equal on every process; empty without data."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a run."""

    steps: int
    peak_lr: float
    seconds: float
    tokens: int
    final_loss: float
    initial: dict[str, float]
    validation: list[dict[str, float]]
    selected_step: int
    weights: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the weights, as JSON can hold them."""
        names = ("steps", "selected_step", "peak_lr", "seconds", "tokens", "final_loss", "initial", "validation")
        plain: dict[str, Any] = valid({name: getattr(self, name) for name in names})
        return plain


def derive_seed(*parts: int) -> int:
    """Derive a seed of 63 bits from several numbers; different numbers give independent streams."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def plan_steps(batches_per_epoch: int, config: LoopConfig) -> int:
    """Return the optimiser steps of a run; micro-batches that do not fill a last step are left out.

    Raises
    ------
    InvalidParameterError
        The data do not fill one step.
    """
    steps = batches_per_epoch * config.epochs // config.accumulation
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    if steps == 0:
        raise InvalidParameterError(
            f"{batches_per_epoch} micro-batches an epoch, {config.epochs} epochs and {config.accumulation} accumulated "
            "make no optimiser step. Lower accumulation or micro_batch, or give more cells.",
            field="loop.accumulation",
        )
    return steps


def check_plan(task: Task, loop: LoopConfig, optimizer: OptimizerConfig) -> int:
    """Refuse a run that could not begin. Returns its number of optimiser steps.

    Raises
    ------
    InvalidParameterError
        The data make no step, the warm-up does not end, or the DeepSpeed file contradicts the configuration.
    UnreadableFileError
        The DeepSpeed file cannot be read.
    """
    total = plan_steps(task.batches_per_epoch, loop)
    check_warmup(optimizer, total)
    if loop.deepspeed is not None:
        deepspeed_config(loop, optimizer)
    return total


def train(
    task: Task,
    loop: LoopConfig,
    optimizer: OptimizerConfig,
    process: Process,
    *,
    output: Path,
    identity: Mapping[str, Any],
    select_best: bool = False,
    may_differ: frozenset[str] = frozenset(),
) -> Outcome:
    """Train to the end, from the newest state in `output` if there is one.

    Parameters
    ----------
    task
        Objective with its data.
    loop, optimizer
        Length of the run, engine and learning rate.
    process
        This process.
    output
        Directory of the run: ``log.jsonl``, ``loss.png``, ``states/``.
    identity
        All that decides the losses, as plain values; the state of another run is refused.
    select_best
        Whether to return the weights of the lowest validation loss instead of the last.
    may_differ
        Fields of `identity` in which the state may differ, since the run is extended on purpose.

    Raises
    ------
    NonFiniteLossError
        The loss, the gradient or a weight became NaN or infinite.
    NotWrittenError
        A state could not be written.
    StoppedError
        SIGTERM or SIGUSR1 was received; the state of the last step is saved.
    InvalidParameterError
        The run has no step, or its warm-up does not end, or a state belongs to another run.
    UnreadableFileError
        All states are damaged.
    """
    total = check_plan(task, loop, optimizer)
    output.mkdir(parents=True, exist_ok=True)
    engine = make_engine(task.module, loop, optimizer, process)
    states = States(output / "states", identity=identity, process=process, keep=loop.keep_states, may_differ=may_differ)
    position = states.resume(engine, console.stderr().print)
    if position.step > total:
        raise InvalidParameterError(
            f"The run has done {position.step} steps, and this configuration has {total}. Give it more epochs or "
            "max_steps.",
            field="loop.epochs",
        )
    run = _Run(task, loop, optimizer, process, engine, output, total, select_best)
    with open_journal(
        output / LOG, name=task.name, done=position.step, total=total, writes=process.is_first
    ) as journal:
        if position.step:
            journal.say(f"resumed at step {position.step:,}")
        else:
            position.initial = task.begin(engine.evaluate)
            if position.initial:
                journal.validation({"step": 0, **position.initial})
        with stop_requests() as requested:
            loss = run.run(position, states, journal, requested)
    if process.is_first:
        draw_curve(output / LOG, output / "loss.png")
        states.prune(1)
    weights = engine.weights(task.model)
    if select_best and position.best is not None:
        weights = load_file(output / _BEST)
    return Outcome(
        steps=position.step,
        peak_lr=peak_learning_rate(optimizer, process.world_size),
        seconds=position.seconds,
        tokens=position.tokens,
        final_loss=loss,
        initial=position.initial,
        validation=position.validation,
        selected_step=position.best_step if select_best and position.best is not None else position.step,
        weights=weights,
    )


@dataclass(frozen=True)
class _Run:
    """The constant parts of a run."""

    task: Task
    loop: LoopConfig
    optimizer: OptimizerConfig
    process: Process
    engine: Engine
    output: Path
    total: int
    select_best: bool

    def run(self, position: Position, states: States, journal: Journal, requested: Callable[[], int]) -> float:
        """Run all steps that are left; `requested` tells whether a signal asks for an end. Returns the last loss."""
        loss = math.nan
        per_epoch = max(1, self.task.batches_per_epoch // self.loop.accumulation)
        validate_every = self.loop.validate_every or per_epoch
        batches = self._batches(position.step * self.loop.accumulation)
        started = time.perf_counter()
        while position.step < self.total:
            before = time.perf_counter()
            values = self._step(position, batches, states)
            loss = values["loss"]
            now = time.perf_counter()
            values["seconds"] = now - before
            position.seconds += now - started
            started = now
            journal.step(values)
            is_last = position.step == self.total
            if is_last or position.step % validate_every == 0:
                self._validate(position, journal)
            signal = self.process.any(requested())
            if is_last or signal or position.step % self.loop.checkpoint_every == 0:
                states.save(self.engine, position)
            if signal and not is_last:
                raise StoppedError(
                    f"{Signals(signal).name}: the run stopped after step {position.step:,} of {self.total:,}, whose "
                    "state is saved. Run the same command again to go on.",
                    number=signal,
                )
        return loss if not math.isnan(loss) else _last_loss(self.output / LOG)

    def _step(
        self, position: Position, batches: Iterator[tuple[int, dict[str, Tensor]]], states: States
    ) -> dict[str, Any]:
        """Run one optimiser step. Returns its line in the log."""
        rate = learning_rate(
            position.step, config=self.optimizer, total_steps=self.total, world_size=self.process.world_size
        )
        # All micro-batches of the step are made first: the share of each depends on the labels of all of them.
        step = [next(batches) for _ in range(self.loop.accumulation)]
        scales = self._scales([self.task.weight(batch) for _, batch in step])
        losses: list[float] = []
        kinds: list[str] = []
        tokens = cells = 0
        epoch = 0
        for micro, ((number, batch), scale) in enumerate(zip(step, scales, strict=True)):
            epoch, index = divmod(number, self.task.batches_per_epoch)
            torch.manual_seed(derive_seed(self.loop.seed, _DROPOUT, self.process.rank, number))
            last = micro == self.loop.accumulation - 1
            losses.append(scale * self.engine.micro_step(batch, lr=rate, scale=scale, last=last))
            kinds.append(self.task.kind(epoch, index))
            mask = batch["attention_mask"]
            tokens += int(mask.sum())
            cells += len(mask)
        *losses, mean_tokens, mean_cells = self.process.mean([*losses, *scales, float(tokens), float(cells)])
        losses, scales = losses[: len(scales)], losses[len(scales) :]
        position.step += 1
        position.tokens += round(mean_tokens * self.process.world_size)
        loss = sum(losses) / len(losses)
        if not math.isfinite(loss) or self.engine.has_diverged:
            what = f"gradient of step {position.step} has the norm {self.engine.grad_norm}"
            if not math.isfinite(loss):
                what = f"loss of step {position.step} is {loss}"
            raise NonFiniteLossError(
                f"The {what} (learning rate {rate:.3g}, epoch {epoch}). The run stopped; {states.newest()}. Lower "
                "optimizer.base_lr, lengthen warmup_steps, or use fp32 or bf16, and start anew."
            )
        values: dict[str, Any] = {"step": position.step, "epoch": epoch, "loss": loss, "lr": rate}
        for kind in sorted({kind for kind in kinds if kind}):
            at = [place for place, name in enumerate(kinds) if name == kind]
            values[f"loss_{kind}"] = sum(losses[place] for place in at) / sum(scales[place] for place in at)
        values["grad_norm"] = self.engine.grad_norm
        values["tokens"] = round(mean_tokens * self.process.world_size)
        values["cells"] = round(mean_cells * self.process.world_size)
        return values

    def _scales(self, weights: list[int]) -> list[float]:
        """Return the factor of each micro-batch's mean loss: its weight over the mean weight of all of the step.

        The engines average losses over micro-batches and processes; with these factors the result is the sum over
        items of the whole step over their number. Equal weights give exactly 1.
        """
        (mean,) = self.process.mean([float(sum(weights))])
        if not mean:
            return [1.0] * len(weights)
        return [weight * len(weights) / mean for weight in weights]

    def _batches(self, start: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield micro-batches from number `start` on; the next one is prepared while the current one is computed."""

        def make(number: int) -> tuple[int, dict[str, Tensor]]:
            epoch, index = divmod(number, self.task.batches_per_epoch)
            seed = derive_seed(self.loop.seed, _MASKS, self.process.rank, number)
            return number, self.task.batch(epoch, index, seed)

        with ThreadPoolExecutor(1) as worker:
            ahead = worker.submit(make, start)
            for number in range(start, self.total * self.loop.accumulation):
                ready = ahead.result()
                if number + 1 < self.total * self.loop.accumulation:
                    ahead = worker.submit(make, number + 1)
                yield ready

    def _validate(self, position: Position, journal: Journal) -> None:
        values = self.task.validate(self.engine.evaluate)
        if not values:
            return
        position.validation.append({"step": position.step, **values})
        journal.validation(position.validation[-1])
        loss = values["validation_loss"]
        if math.isfinite(loss) and (position.best is None or loss < position.best):
            position.best, position.best_step = values["validation_loss"], position.step
            if self.select_best:
                self._keep_best()

    def _keep_best(self) -> None:
        weights = self.engine.weights(self.task.model)
        if self.process.is_first:
            once = {tensor.data_ptr(): name for name, tensor in reversed(weights.items())}  # tied weights once
            with atomic(self.output / _BEST) as staging:
                save_file({name: weights[name].detach().cpu().clone() for name in once.values()}, staging)
        self.process.barrier()


def _last_loss(log: Path) -> float:
    """Return the last loss of a run that had ended before its checkpoint was written."""
    losses = [line["loss"] for line in read_log(log) if "loss" in line]
    return float(losses[-1]) if losses else math.nan

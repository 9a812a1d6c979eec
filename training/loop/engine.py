"""Engines that turn a batch into a step: plain torch on one process, DeepSpeed on one or many.

Both take the same AdamW, and the learning rate from the loop, so they give the same losses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from perturbscope.errors import InvalidParameterError, UnreadableFileError
from training.config.stages import LoopConfig, OptimizerConfig
from training.loop.optimizer import make_optimizer
from training.loop.process import Process

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STATE = "state.pt"


class Engine(Protocol):
    """A model with its optimiser."""

    def micro_step(self, batch: Mapping[str, Tensor], *, lr: float, last: bool, scale: float = 1.0) -> float:
        """Run forward and backward and, after the `last` micro-batch of a step, the optimiser.

        The gradient of a step is the mean over micro-batches and processes of `scale` times the loss of each.

        Returns
        -------
        The loss of the micro-batch, not scaled.
        """
        ...

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of the last step, before clipping; not finite if the weights were left alone for it."""
        ...

    @property
    def has_diverged(self) -> bool:
        """Whether the gradient of the last step was not finite, and no smaller scale of the loss can mend that."""
        ...

    def is_finite(self) -> bool:
        """Return whether all weights of this process are finite."""
        ...

    def evaluate(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the module without gradients and dropout."""
        ...

    def save(self, directory: Path) -> None:
        """Write weights and optimiser; every process must call it."""
        ...

    def load(self, directory: Path) -> None:
        """Read what :meth:`save` wrote."""
        ...

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of `model` in full precision; every process must call it."""
        ...


def make_engine(module: nn.Module, loop: LoopConfig, optimizer: OptimizerConfig, process: Process) -> Engine:
    """Make the engine that `loop` asks for."""
    if loop.deepspeed is None:
        return PlainEngine(module, loop, optimizer, process.device)
    return DeepSpeedEngine(module, loop, optimizer, process)


class PlainEngine:
    """Engine of one process, with torch alone."""

    def __init__(self, module: nn.Module, loop: LoopConfig, optimizer: OptimizerConfig, device: torch.device) -> None:
        self._module = module.to(device).train()
        self._device = device
        self._accumulation = loop.accumulation
        self._clip = optimizer.clip
        self._dtype = DTYPES[loop.precision]
        self._optimizer = make_optimizer(module, optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=loop.precision == "fp16")
        self._grad_norm = 0.0

    def micro_step(self, batch: Mapping[str, Tensor], *, lr: float, last: bool, scale: float = 1.0) -> float:
        """See :class:`Engine`."""
        loss = self._forward(batch)
        self._scaler.scale(loss * scale / self._accumulation).backward()
        if last:
            self._step(lr)
        return float(loss.detach())

    @property
    def grad_norm(self) -> float:
        """See :class:`Engine`."""
        return self._grad_norm

    @property
    def has_diverged(self) -> bool:
        """See :class:`Engine`. Without fp16 the scale is 1; with it, 1 is as small as it may become."""
        return not math.isfinite(self._grad_norm) and self._scaler.get_scale() <= 1

    def is_finite(self) -> bool:
        """See :class:`Engine`."""
        return all(bool(torch.isfinite(item).all()) for item in self._module.parameters())

    def evaluate(self, batch: Mapping[str, Tensor]) -> Any:
        """See :class:`Engine`."""
        self._module.eval()
        with torch.no_grad():
            result = self._forward(batch)
        self._module.train()
        return result

    def save(self, directory: Path) -> None:
        """See :class:`Engine`."""
        state = {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        torch.save(state, directory / _STATE)

    def load(self, directory: Path) -> None:
        """See :class:`Engine`."""
        state = torch.load(directory / _STATE, map_location=self._device, weights_only=True)
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        return model.state_dict()

    def _forward(self, batch: Mapping[str, Tensor]) -> Any:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self._module(**moved)

    def _step(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        parameters = [item for group in self._optimizer.param_groups for item in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip or float("inf"))
        self._grad_norm = float(norm)
        if not self.has_diverged:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """Engine of DeepSpeed, around the same optimiser."""

    def __init__(self, module: nn.Module, loop: LoopConfig, optimizer: OptimizerConfig, process: Process) -> None:
        if process.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for name, value in (("RANK", process.rank), ("WORLD_SIZE", process.world_size), ("LOCAL_RANK", 0)):
            os.environ.setdefault(name, str(value))
        import deepspeed

        if process.device.type == "cpu":
            # Otherwise, where there is a compiler, it compiles a shared-memory all-reduce for more than a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._device = process.device
        self._own_norm = 0.0
        module = module.to(process.device)
        client = make_optimizer(module, optimizer)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=client, config=deepspeed_config(loop, optimizer)
        )

    def micro_step(self, batch: Mapping[str, Tensor], *, lr: float, last: bool, scale: float = 1.0) -> float:
        """See :class:`Engine`."""
        loss = self._engine(**self._move(batch))
        self._engine.backward(loss * scale)
        assert self._engine.is_gradient_accumulation_boundary() == last, "lost count of micro-batches"  # noqa: S101
        if last:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            if not self._engine.zero_optimization():
                # Without ZeRO and clipping DeepSpeed computes no norm.
                gradients = [item.grad for item in self._engine.module.parameters() if item.grad is not None]
                self._own_norm = float(nn.utils.get_total_norm(gradients))
        self._engine.step()
        return float(loss.detach())

    @property
    def grad_norm(self) -> float:
        """See :class:`Engine`."""
        norm = self._engine.get_global_grad_norm()
        return self._own_norm if norm is None else float(norm)

    @property
    def has_diverged(self) -> bool:
        """See :class:`Engine`. Under fp16 DeepSpeed leaves such a step out, and ends when its scale cannot fall."""
        return not math.isfinite(self.grad_norm) and not self._engine.fp16_enabled()

    def is_finite(self) -> bool:
        """See :class:`Engine`. Of weights that are divided between processes, the part of this one is looked at."""
        parts = (getattr(item, "ds_tensor", item) for item in self._engine.module.parameters())
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def evaluate(self, batch: Mapping[str, Tensor]) -> Any:
        """See :class:`Engine`."""
        self._engine.eval()
        with torch.no_grad():
            result = self._engine.module(**self._move(batch))
        self._engine.train()
        return result

    def save(self, directory: Path) -> None:
        """See :class:`Engine`."""
        self._engine.save_checkpoint(str(directory), tag="deepspeed")

    def load(self, directory: Path) -> None:
        """See :class:`Engine`."""
        self._engine.load_checkpoint(str(directory), tag="deepspeed")

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """See :class:`Engine`. Under bf16 and fp16 these are the optimiser's float32 weights."""
        from deepspeed.utils import safe_get_full_fp32_param

        full: dict[int, Tensor] = {}
        for parameter in model.parameters():
            master = safe_get_full_fp32_param(parameter)
            full[id(parameter)] = parameter.detach() if master is None else master
        state = model.state_dict(keep_vars=True)
        return {name: full.get(id(tensor), tensor.detach()) for name, tensor in state.items()}

    def _move(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}


def deepspeed_config(loop: LoopConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """Read the DeepSpeed JSON file that `loop` names, and replace ``"auto"`` by the values of the YAML file.

    Raises
    ------
    UnreadableFileError
        The file is missing or is not JSON.
    InvalidParameterError
        It contradicts the YAML file, or sets an optimiser or scheduler, which the YAML file does.
    """
    path = Path(str(loop.deepspeed))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.", field="loop.deepspeed") from error
    for name in ("optimizer", "scheduler"):
        if name in values:
            raise InvalidParameterError(
                f"{path} sets {name!r}; the YAML file's section 'optimizer' does that for both engines. Remove it.",
                field="loop.deepspeed",
            )
    settled = {
        "train_micro_batch_size_per_gpu": loop.micro_batch,
        "gradient_accumulation_steps": loop.accumulation,
        "gradient_clipping": optimizer.clip,
        "bf16": {"enabled": loop.precision == "bf16"},
        "fp16": {"enabled": loop.precision == "fp16"},
    }
    return {**values, **{name: _settle(path, name, values.get(name, "auto"), value) for name, value in settled.items()}}


def _settle(path: Path, name: str, given: Any, value: Any) -> Any:
    """Return a value of the JSON file; "auto" becomes `value`, and anything else must equal it."""
    if isinstance(value, dict):
        inside = given if isinstance(given, dict) else {}
        return {**inside, "enabled": _settle(path, f"{name}.enabled", inside.get("enabled", "auto"), value["enabled"])}
    if given not in ("auto", value):
        raise InvalidParameterError(
            f'{path} has {name} {given!r}, the YAML file says {value!r}. Write "auto" in {path.name}.',
            field="loop.deepspeed",
        )
    return value

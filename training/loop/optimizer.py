"""AdamW with decay on matrices only, and the learning rate of each step."""

from __future__ import annotations

import torch
from torch import nn

from perturbscope.errors import InvalidParameterError
from training.config.stages import OptimizerConfig


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Make AdamW over the parameters of `module`; biases and layer normalisation are not decayed (Devlin et al. 2019).

    One-dimensional parameters are exactly these two kinds. ``fused`` makes a step one pass over the weights.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [item for item in parameters if item.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [item for item in parameters if item.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def peak_learning_rate(config: OptimizerConfig, world_size: int) -> float:
    """Return the largest learning rate of the run."""
    return config.base_lr * (world_size if config.lr_scale_by_world_size else 1)


def learning_rate(step: int, *, config: OptimizerConfig, total_steps: int, world_size: int) -> float:
    """Return the learning rate of optimiser step `step`, counted from 0.

    It rises linearly to the peak over the warm-up. Then it stays there, or falls linearly so that the step after the
    last would have the rate 0.
    """
    peak = peak_learning_rate(config, world_size)
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    return peak * (total_steps - step) / (total_steps - config.warmup_steps)


def check_warmup(config: OptimizerConfig, total_steps: int) -> None:
    """Refuse a warm-up that lasts as long as the run.

    Raises
    ------
    InvalidParameterError
        The warm-up is as long as the run.
    """
    if config.warmup_steps >= total_steps:
        raise InvalidParameterError(
            f"warmup_steps is {config.warmup_steps}, but the run has {total_steps} optimiser steps, so the peak would "
            "never be reached. Shorten the warm-up or lengthen the run.",
            field="optimizer.warmup_steps",
        )

"""How many steps a run has, and the learning rate of each: pure functions of the configuration."""

from __future__ import annotations

import math

from isthmus.edge.config.training_config import TuningConfig


def steps_per_epoch(config: TuningConfig, n_examples: int) -> int:
    """Optimizer steps in one pass over `n_examples`."""
    return math.ceil(math.ceil(n_examples / config.batch) / config.accumulate)


def total_steps(config: TuningConfig, n_examples: int) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or (config.epochs or 1) * steps_per_epoch(config, n_examples)


def learning_rate(config: TuningConfig, step: int, total: int) -> float:
    """The learning rate of the step after `step` applied ones.

    It rises linearly over `warmup_steps`, reaches its peak at the last of them, and then stays, falls linearly to reach
    0 after the last step, or falls along half a cosine (Loshchilov & Hutter 2017, without restarts).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    part = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - part)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * part)) / 2

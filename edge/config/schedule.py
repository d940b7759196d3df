"""How many steps a run has, and the learning rate of each: pure functions of the configuration."""

from __future__ import annotations

import math

from isthmus.edge.config.training_config import TuningConfig
from isthmus.training.rate_schedule import scheduled_rate


def steps_per_epoch(config: TuningConfig, n_examples: int) -> int:
    """Optimizer steps in one pass over `n_examples`."""
    return math.ceil(math.ceil(n_examples / config.batch) / config.accumulate)


def total_steps(config: TuningConfig, n_examples: int) -> int:
    """Optimizer steps of the whole run."""
    return config.steps or (config.epochs or 1) * steps_per_epoch(config, n_examples)


def evaluations(config: TuningConfig, total: int) -> int:
    """Passes over held-out examples in a run of `total` steps: before it, after it, and every `eval_every` steps."""
    return 2 + (0 if config.eval_every is None else (total - 1) // config.eval_every)


def learning_rate(config: TuningConfig, step: int, total: int) -> float:
    """The learning rate of the step after `step` applied ones; see `scheduled_rate`."""
    return scheduled_rate(config.learning_rate, config.schedule, step, total, config.warmup_steps)

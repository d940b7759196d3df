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


def sampling_rate(config: TuningConfig, n_examples: int) -> float:
    """The chance of an example to be in a step, where batches are drawn by chance: as many are in one in the mean."""
    return min(1.0, config.batch * config.accumulate / n_examples)


def epochs_left(config: TuningConfig, n_examples: int, done: int = 0) -> int:
    """Epochs in which the steps after `done` applied ones lie; one that is gone on with counts."""
    total, per_epoch = total_steps(config, n_examples), steps_per_epoch(config, n_examples)
    return 0 if done >= total else (total - 1) // per_epoch - done // per_epoch + 1


def evaluations_left(config: TuningConfig, n_examples: int, done: int = 0) -> int:
    """Passes over held-out examples after `done` applied steps: before the run, after it, and every `eval_every` steps.

    The one before the run counts as long as no step is applied, even if it has been made.
    """
    total, every = total_steps(config, n_examples), config.eval_every
    between = 0 if every is None else max(0, (total - 1) // every - done // every)
    return (1 if done == 0 else 0) + between + 1


def learning_rate(config: TuningConfig, step: int, total: int) -> float:
    """The learning rate of the step after `step` applied ones; see `scheduled_rate`."""
    return scheduled_rate(config.learning_rate, config.schedule, step, total, config.warmup_steps)

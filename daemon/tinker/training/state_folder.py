"""The state of a model in training on the disk: whole at any time, whatever the process meets.

    checkpoint-<version>/    as `isthmus.training.run_checkpoint` writes it: what is trained, the optimizer's moments,
                             and the number of the newest step or load with what it answered

A version is one more than that before, whether a step or a load has changed the model. An older one is removed once the
newer one is on the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.common.files import disk_errors, remove_folder
from isthmus.training.run_checkpoint import (
    RandomState,
    RunCheckpoint,
    check_settings,
    damaged_entry,
    latest,
    load,
    save,
)

_LOG = "log.jsonl"
_START_ANEW = "create another model"


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a model in training is after a step or a load.

    Attributes:
        version: Counts steps and loads.
        number: Of the newest step or load, as they are asked for; 0 before the first.
        metrics: What it answered.
        parameters: What is trained, by name.
        optimizer: Moments and step counts; see `isthmus.training.gradient_step.GradientStep.state`.
    """

    version: int
    number: int
    metrics: Mapping[str, float]
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


class StateFolder:
    """Where a model's newest state is.

    Args:
        path: The folder, made with the first state.
        settings: What a state that is read must have been written with, by its name in messages.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, settings

    def read(self) -> ModelState | None:
        """The newest state; None where there is none.

        Raises:
            CheckpointError: It is damaged, or of another model.
        """
        folder = latest(self._path)
        if folder is None:
            return None
        found = load(folder)
        check_settings(folder, found.settings, self._settings, _START_ANEW)
        try:
            number = int(found.entries["number"])
            metrics = {str(name): float(value) for name, value in found.entries["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged_entry(folder, error) from error
        return ModelState(found.step, number, metrics, found.parameters, found.optimizer)

    def write(self, state: ModelState) -> None:
        """Put a newer state in the place of the one that is there.

        Raises:
            DiskError: The disk is full or cannot be written; the older one is still there.
        """
        checkpoint = RunCheckpoint(
            step=state.version,
            settings=self._settings,
            parameters=state.parameters,
            optimizer=state.optimizer,
            log=(),
            random=RandomState.take(torch.device("cpu")),  # a part of the format; nothing here draws numbers
            entries={"number": state.number, "metrics": dict(state.metrics)},
        )
        with disk_errors(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
        newest = latest(self._path)
        if newest is not None and newest.name == f"checkpoint-{state.version}":
            remove_folder(newest)  # of a change that failed after it was written, and was undone in memory
        save(self._path, checkpoint, _LOG, keep=1)

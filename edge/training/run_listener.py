"""Who hears how a run goes on, such as a daemon's job: figures, and adapters at checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from isthmus.edge.config.training_config import TuningConfig
from isthmus.edge.data.batches import Batch, label_count
from isthmus.edge.run_report import WireMeter

SaveAdapter = Callable[[Path], None]
"""Writes the adapter as it is now into a folder, whole or not at all; an older one is replaced."""


class RunListener(Protocol):
    """It is called by the run's own thread. The run has the same bits with one and without; its log has, for most ways
    of training, `accuracy` besides.

    What a method raises ends the run as an error of the run's own does.

    Attributes:
        go_on: What a user does to go on with a run that has ended early, as messages say it: "repeat the command".
    """

    go_on: str

    def began(self, step: int, total: int, save: SaveAdapter, meter: WireMeter | None) -> None:
        """Called before the first step that this process makes of `total`, after `step` applied ones.

        Args:
            meter: Says what has crossed, at any time and in any thread; None where nothing does.
        """

    def stepped(self, line: Mapping[str, Any], seconds: float) -> None:
        """Called when a step that took so long is in the log, as this line."""

    def evaluated(self, step: int, loss: float) -> None:
        """Called with the loss on held-out data after `step` steps."""

    def saved(self, step: int, save: SaveAdapter) -> None:
        """Called after a checkpoint that was due, and after the evaluation if one was due as well."""


class TokenAccuracy:
    """The share of a step's labels that are the model's likeliest token, before the step moves the model."""

    def __init__(self) -> None:
        self._hits, self._labels = 0, 0

    def begin_step(self) -> None:
        """Begin to count."""
        self._hits, self._labels = 0, 0

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Count a micro-batch, whose logits are `[B, S, V]`."""
        labels = batch["labels"][:, 1:]
        self._hits += int((logits.argmax(-1)[:, :-1].to(labels.device) == labels).sum())  # no token is -100
        self._labels += label_count(batch)

    @property
    def value(self) -> float:
        """Between 0 and 1; 0 of a step without labels."""
        return self._hits / max(1, self._labels)


def accuracy_for(config: TuningConfig) -> TokenAccuracy | None:
    """What counts a run's accuracy; None for a way of training whose logits are not those of its batch and model."""
    return None if config.method == "prompt" or config.optimizer == "mezo" else TokenAccuracy()

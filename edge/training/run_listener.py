"""Who hears how a run goes on, such as a daemon's job: figures, and adapters at checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from isthmus.edge.run_report import WireMeter

SaveAdapter = Callable[[Path], None]
"""Writes the adapter as it is now into a folder, whole or not at all; an older one is replaced."""


class RunListener(Protocol):
    """It is called by the run's own thread. The run has the same bits with one and without.

    What a method raises ends the run as an error of the run's own does.
    """

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

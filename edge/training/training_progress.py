"""Progress of training on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from isthmus.common.progress import StepProgress
from isthmus.common.readable import size
from isthmus.edge.run_report import StripTotals


class TrainProgress(StepProgress):
    """Shows the loss, tokens per second, bytes up and down where there is a strip, and the time left.

    Args:
        total: Steps of the run.
        log_every: Steps between lines where the output is not a terminal.
        console: Where to show; standard error by default.
        clock: Seconds, for the time left of plain lines.
    """

    def __init__(
        self,
        total: int,
        log_every: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("step", total, console, every=log_every, clock=clock)

    def update(self, step: int, loss: float, tokens_per_s: float, strip: StripTotals) -> None:
        """Step `step` has been applied; `strip` is what crossed so far, and is not shown where nothing does."""
        figures = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if strip != StripTotals():
            figures += f"  up {size(strip.bytes_up)}  down {size(strip.bytes_down)}"
        self.show(step, figures)

"""Progress on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isthmus.edge.report import StripTotals


class TrainProgress:
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
        self._total = total
        self._log_every = log_every
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start_step = 0
        self._start_time = clock()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, figures="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, step: int) -> None:
        """The run goes on from `step` applied steps."""
        self._start_step, self._start_time = step, self._clock()
        self._bar.update(self._task, completed=step)

    def update(self, step: int, loss: float, tokens_per_s: float, strip: StripTotals) -> None:
        """Step `step` has been applied; `strip` is what crossed so far, and is not shown where nothing does."""
        figures = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s"
        if strip != StripTotals():
            figures += f"  up {size(strip.bytes_up)}  down {size(strip.bytes_down)}"
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (step % self._log_every == 0 or step == self._total):
            self.message(f"step {step}/{self._total}  {figures}  left {duration(self._left(step))}")

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _left(self, step: int) -> float:
        done = step - self._start_step
        return (self._clock() - self._start_time) / done * (self._total - step) if done else 0.0


def size(n_bytes: float) -> str:
    """Bytes for people: 1.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 1:02:03, or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"

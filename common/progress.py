"""Progress of work that takes a while, on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20
"""Of a whole run, where nobody looks at a terminal."""


@contextmanager
def bar(console: Console | None, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on a terminal while the block runs, which calls the yielded function after each of `total` items."""
    shown = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class StepProgress:
    """The steps of a run, with figures and the time left.

    Args:
        what: Opens each line: "step", or "distilling: step".
        total: Steps of the run.
        console: Where to show; None for standard error.
        every: Steps between lines where the output is not a terminal; None for some twenty lines in all.
        clock: Seconds, for the time left of plain lines.
    """

    def __init__(
        self,
        what: str,
        total: int,
        console: Console | None = None,
        *,
        every: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total = what, total
        self._every = every or max(1, total // LINES)
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._start_step, self._start_time = 0, clock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, figures="")

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

    def show(self, step: int, figures: str) -> None:
        """Step `step` has been applied."""
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._total):
            self.message(f"{self._what} {step}/{self._total}  {figures}  left {duration(self._left(step))}")

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _left(self, step: int) -> float:
        done = step - self._start_step
        return (self._clock() - self._start_time) / done * (self._total - step) if done else 0.0


def duration(seconds: float) -> str:
    """Seconds for people: 1:02:03, or 02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"

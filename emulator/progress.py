"""Progress of work that takes a while, on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 20  # where nobody looks at a terminal


@contextmanager
def bar(console: Console | None, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar while the block runs, on a terminal; the block calls what it gets once for each of `total` pieces."""
    shown = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


class StepProgress:
    """A bar over the steps of a run with figures and tokens per second; some twenty lines without a terminal.

    Args:
        what: What is done.
        total: Steps of the run.
        console: Where to show; None for standard error.
    """

    def __init__(self, what: str, total: int, console: Console | None = None) -> None:
        self._what, self._total = what, total
        self._console = console or Console(stderr=True, highlight=False)
        self._started, self._first = time.monotonic(), 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
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
        self._started, self._first = time.monotonic(), step
        self._bar.update(self._task, completed=step)

    def update(self, step: int, figures: str, tokens_per_s: float) -> None:
        """Step `step` has been applied."""
        text = f"{figures}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, figures=text)
        if not self._console.is_terminal and (step % max(1, self._total // _LINES) == 0 or step == self._total):
            left = (time.monotonic() - self._started) / (step - self._first) * (self._total - step)
            self.message(f"{self._what}: step {step}/{self._total}  {text}  {left:,.0f} s left")

    def message(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)
